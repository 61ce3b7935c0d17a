"""The REST API of conversations: OpenAI's, and what Parley has beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

from msgspec import Meta, Struct

from models.errors import InvalidValueError, UnsupportedParameterError
from models.messages import Message
from models.model_info import ModelList
from models.protocols.parameters import convert_parameters
from models.protocols.responses.input_items import Id, ItemReference, parse_input, render_message
from models.protocols.responses.lists import Limit
from models.protocols.responses.request import Metadata
from models.protocols.responses.resource import render_details, render_response
from models.store.conversations import Conversation, ItemPage, Listing
from models.store.item import Item
from models.store.versions import Version
from models.validation import NO_SURROGATE, Json, convert, parse_object

MAX_TITLE = MAX_QUERY = 256  # characters
MAX_NEW_ITEMS = 20  # in one request, as in OpenAI's API
TITLE = f"text of 1 to {MAX_TITLE} characters"


class _ListingQuery(Struct):
    """The query parameters of a listing."""

    limit: Limit = "50"
    after: str | None = None
    query: Annotated[str, Meta(max_length=MAX_QUERY, description=f"at most {MAX_QUERY} characters")] = ""


class _BranchQuery(Struct):
    """The query parameters of a page of the current branch."""

    limit: Limit = "100"
    before: str | None = None


class ConversationChange(Struct, frozen=True, forbid_unknown_fields=True):
    """A new title, other metadata, another branch: what is not None."""

    title: Annotated[str, Meta(pattern=NO_SURROGATE, description=TITLE)] | None = None
    metadata: Metadata | None = None
    leaf: Id | None = None


def parse_listing(parameters: Mapping[str, str]) -> Listing:
    """The listing that the parameters of a URL ask for. Raises InvalidValueError."""
    query = convert(dict(parameters), _ListingQuery)
    return Listing(int(query.limit), query.after, query.query)


def parse_branch(parameters: Mapping[str, str]) -> tuple[int, str | None]:
    """How many nodes the parameters of a URL ask for, and before which item. Raises InvalidValueError."""
    query = convert(dict(parameters), _BranchQuery)
    return int(query.limit), query.before


def parse_change(body: bytes) -> ConversationChange:
    """The change of a conversation that a body asks for; its title is one line. Raises InvalidRequestError."""
    return _change(parse_object(body, "the body"))


def parse_new_conversation(body: bytes) -> tuple[ConversationChange, list[Message]]:
    """The title, the metadata and the first items of a new conversation. Raises InvalidRequestError."""
    values = parse_object(body, "the body") if body.strip() else {}
    if "leaf" in values:
        raise UnsupportedParameterError("leaf is not supported here: the last item is the leaf", "leaf")
    return _change({name: value for name, value in values.items() if name != "items"}), _items(values)


def parse_new_items(body: bytes) -> list[Message]:
    """The items that a body adds to a conversation. Raises InvalidRequestError."""
    if not (messages := _items(parse_object(body, "the body"))):
        told = f"a list of 1 to {MAX_NEW_ITEMS} items"
        raise InvalidValueError(f"items must be {told}", "items", told)
    return messages


def _change(values: Json) -> ConversationChange:
    change = convert_parameters(values, ConversationChange)
    if change.title is None:
        return change
    title = " ".join(change.title.split())
    if not 1 <= len(title) <= MAX_TITLE:
        raise InvalidValueError(f"title must be {TITLE}", "title", TITLE)
    return ConversationChange(title, change.metadata, change.leaf)


def _items(values: Json) -> list[Message]:
    """The items in a body, as messages. Raises InvalidValueError."""
    value = [] if values.get("items") is None else values["items"]
    told = f"a list of up to {MAX_NEW_ITEMS} items"
    if not isinstance(value, list) or len(value) > MAX_NEW_ITEMS:
        raise InvalidValueError(f"items must be {told}", "items", told)
    messages = []
    for item in parse_input(value, "items"):
        if isinstance(item, ItemReference):
            raise InvalidValueError(f"{item.param} must be an item with its text", item.param)
        messages.append(item)
    return messages


def render_conversation(conversation: Conversation) -> Json:
    """A conversation, without its items."""
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": int(conversation.created),
        "metadata": dict(conversation.metadata),
        "title": conversation.title,
        "updated_at": conversation.updated,
        "leaf": conversation.leaf,
        "response_id": conversation.response_id,
    }


def render_change(id: str, conversation: Conversation | None) -> Json:
    """The event that a conversation has changed, or that it is deleted: then it is None."""
    if conversation is None:
        return {"type": "parley.conversation.deleted", "conversation": render_deleted(id)}
    return {"type": "parley.conversation.updated", "conversation": render_conversation(conversation)}


def render_deleted(id: str) -> Json:
    """What is left of a conversation that was deleted."""
    return {"id": id, "object": "conversation.deleted", "deleted": True}


def render_branch(models: ModelList, conversation: Conversation, page: ItemPage) -> Json:
    """A page of the current branch: input items, and whole responses."""
    nodes = [render_turn(models, conversation.id, node, page.versions[node.id]) for node in page.items]
    return render_conversation(conversation) | {"data": nodes, "earlier": page.earlier}


def render_turn(models: ModelList, conversation: str, node: Item, version: Version) -> Json:
    """An input item, or a whole response, with what a chat page wants to know of it."""
    parley = {"parley": render_details(node) | {"versions": asdict(version)}}
    if not node.is_reply:
        return render_message(node.id, node.message) | {"created_at": int(node.created)} | parley
    return render_response(models, conversation, node) | parley
