"""One part of a reply: its reasoning, a message, or a call of a tool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

OutputType = Literal["reasoning", "message", "function_call"]


class TokenLogprob(NamedTuple):
    """The natural logarithm of a token's probability, and the most probable tokens in its place, with theirs.

    A token may be a part of a character, so it is bytes. No logarithm is infinite: the smallest one is -9999.
    """

    token: bytes
    logprob: float
    top: Sequence[tuple[bytes, float]] = ()


@dataclass
class OutputItem:
    """A part of a reply, which grows by pieces while it streams: text, or the arguments of a call."""

    type: OutputType
    pieces: list[str] = field(default_factory=list)
    name: str = ""  # of the function
    call_id: str = ""
    logprobs: list[Sequence[TokenLogprob]] | None = None  # of the tokens of each piece of a message
    complete: bool = False  # whether the model has ended it itself

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def is_deleted(self) -> bool:
        """Whether its content was deleted: all others have text, or a name, or were ended by the model."""
        return not (self.pieces or self.name or self.complete)
