"""The REST API of conversations: parses requests, renders conversations and items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

from msgspec import Meta, Struct

from models.errors import InvalidValueError
from models.store.conversations import Conversation, ItemPage, Listing
from models.store.item import Item
from models.validation import NO_SURROGATE, Json, convert, parse_object

MAX_TITLE = MAX_QUERY = 256  # characters
TITLE = f"text of 1 to {MAX_TITLE} characters"


Limit = Annotated[str, Meta(pattern=r"\A([1-9][0-9]?|100)\Z", description="a whole number from 1 to 100")]


class _ListingQuery(Struct):
    """The query parameters of a listing."""

    limit: Limit = "50"
    after: str | None = None
    query: Annotated[str, Meta(max_length=MAX_QUERY, description=f"at most {MAX_QUERY} characters")] = ""


class _PageQuery(Struct):
    """The query parameters of a page of items."""

    limit: Limit = "100"
    before: str | None = None


class _Title(Struct):
    """The body of a request that renames a conversation."""

    title: Annotated[str, Meta(pattern=NO_SURROGATE, description=TITLE)]


def parse_listing(parameters: Mapping[str, str]) -> Listing:
    """The listing that the parameters of a URL ask for. Raises InvalidValueError."""
    query = convert(dict(parameters), _ListingQuery)
    return Listing(int(query.limit), query.after, query.query)


def parse_page(parameters: Mapping[str, str]) -> tuple[int, str | None]:
    """How many items the parameters of a URL ask for, and before which one. Raises InvalidValueError."""
    query = convert(dict(parameters), _PageQuery)
    return int(query.limit), query.before


def parse_title(body: bytes) -> str:
    """The title in a JSON object, as one line. Raises InvalidRequestError."""
    title = " ".join(convert(parse_object(body, "the body"), _Title).title.split())
    if not 1 <= len(title) <= MAX_TITLE:
        raise InvalidValueError(f"title must be {TITLE}", "title", TITLE)
    return title


def render_conversation(conversation: Conversation, page: ItemPage | None = None) -> Json:
    """A conversation, with some of its items if they are given."""
    rendered = asdict(conversation)
    if page is None:
        return rendered
    return rendered | {"items": [render_item(item) for item in page.items], "earlier": page.earlier}


def render_item(item: Item) -> Json:
    """An item of a conversation."""
    message = {"id": item.id, "role": item.role, "content": item.content, "created": item.created}
    if item.status is None:
        return message
    return message | {
        "status": item.status,
        "status_details": {"reason": item.reason},
        "usage": item.usage,
        "options": item.options,
        "left_out": item.left_out,
        "sequence_number": item.sequence_number,
        "decode_seconds": item.decode_seconds,
    }
