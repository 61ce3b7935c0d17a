"""How a client reads a response: `GET /v1/responses/{id}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from models.validation import convert


class _RetrievalQuery(Struct):
    stream: Annotated[Literal["true", "false"], Meta(description="true or false")] = "false"
    starting_after: Annotated[str, Meta(pattern=r"\A[0-9]{1,9}\Z", description="a whole number")] | None = None


class Retrieval(NamedTuple):
    """How a response is read: whole, or as a stream of the events after a number."""

    stream: bool
    starting_after: int

    @classmethod
    def parse(cls, parameters: Mapping[str, str]) -> Retrieval:
        """What the parameters of a URL ask for. Raises InvalidValueError."""
        query = convert(dict(parameters), _RetrievalQuery)
        return cls(query.stream == "true", -1 if query.starting_after is None else int(query.starting_after))
