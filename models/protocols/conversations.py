"""The REST API of conversations: parses requests, renders conversations and items."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from models.errors import InvalidValueError
from models.store.conversations import Conversation, Listing
from models.store.item import Item
from models.validation import NO_SURROGATE, Json, convert, parse_object

MAX_TITLE = MAX_QUERY = 256  # characters
TITLE = f"text of 1 to {MAX_TITLE} characters"


class _ListingQuery(Struct):
    """The query parameters of a listing."""

    limit: Annotated[str, Meta(pattern=r"\A([1-9][0-9]?|100)\Z", description="a whole number from 1 to 100")] = "50"
    after: str | None = None
    query: Annotated[str, Meta(max_length=MAX_QUERY, description=f"at most {MAX_QUERY} characters")] = ""


class _Title(Struct):
    """The body of a request that renames a conversation."""

    title: Annotated[str, Meta(pattern=NO_SURROGATE, description=TITLE)]


def parse_listing(parameters: Mapping[str, str]) -> Listing:
    """The listing that the parameters of a URL ask for. Raises InvalidValueError."""
    query = convert(dict(parameters), _ListingQuery)
    return Listing(int(query.limit), query.after, query.query)


def parse_title(body: bytes) -> str:
    """The title in a JSON object, as one line. Raises InvalidRequestError."""
    title = " ".join(convert(parse_object(body, "the body"), _Title).title.split())
    if not 1 <= len(title) <= MAX_TITLE:
        raise InvalidValueError(f"title must be {TITLE}", "title", TITLE)
    return title


def render_conversation(conversation: Conversation, items: Iterable[Item] | None = None) -> Json:
    """A conversation, with its items if they are given."""
    rendered = asdict(conversation)
    return rendered if items is None else {**rendered, "items": [render_item(item) for item in items]}


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


class Document(NamedTuple):
    """A conversation as a file for download."""

    name: str
    media_type: str
    text: str


def render_document(conversation: Conversation, items: Iterable[Item], format: str) -> Document:
    """A conversation with its items as `markdown` or `json`. Raises InvalidValueError."""
    if format == "json":
        text = json.dumps(render_conversation(conversation, items), ensure_ascii=False, indent=2)
        return Document(f"{conversation.id}.json", "application/json", text)
    if format == "markdown":
        messages = [f"**{item.role.capitalize()}**\n\n{item.content}" for item in items]
        text = "\n\n".join([f"# {conversation.title}", *messages]) + "\n"
        return Document(f"{conversation.id}.md", "text/markdown", text)
    raise InvalidValueError("format must be markdown or json", "format")
