"""What a request for conversations over HTTP may say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from models.options import text
from models.refused import InvalidValue

TITLE_CHARACTERS = QUERY_CHARACTERS = 256


@dataclass(frozen=True)
class Listing:
    """Which conversations to list: at most `limit`, behind the one with the id `after`, with `query` in them."""

    limit: int
    after: str | None
    query: str

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Listing:
        """What the parameters of a URL ask for. Raises InvalidValue."""
        limit, query = parameters.get("limit", "50"), parameters.get("query", "")
        if not re.fullmatch("[1-9][0-9]?|100", limit):
            raise InvalidValue("limit must be a whole number from 1 to 100", "limit")
        if len(query) > QUERY_CHARACTERS:
            raise InvalidValue(f"query may have {QUERY_CHARACTERS} characters", "query")
        return cls(int(limit), parameters.get("after"), query)


def new_title(body: bytes) -> str:
    """The title in a JSON object. Raises InvalidValue."""
    try:
        title = " ".join(text(json.loads(body)["title"]).split())
    except (ValueError, TypeError, KeyError, RecursionError):
        title = ""
    if not 1 <= len(title) <= TITLE_CHARACTERS:
        raise InvalidValue(f'send {{"title": "..."}}, of 1 to {TITLE_CHARACTERS} characters', "title")
    return title
