"""Lists of items, as OpenAI's API has them: in pages, in either order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

from models.protocols.responses.input_items import render_message
from models.protocols.responses.resource import render_output
from models.store.item import Item, Status
from models.validation import Json, Text, convert

Limit = Annotated[str, Meta(pattern=r"\A([1-9][0-9]?|100)\Z", description="a whole number from 1 to 100")]


class _ListQuery(Struct):
    limit: Limit = "20"
    order: Annotated[Literal["asc", "desc"], Meta(description="asc or desc")] = "desc"
    after: Text | None = None


class ListQuery(Struct, frozen=True):
    """Which page of a list: at most `limit` items behind the one with the id `after`."""

    limit: int
    ascending: bool
    after: str | None

    @classmethod
    def parse(cls, parameters: Mapping[str, str]) -> ListQuery:
        """The page that the parameters of a URL ask for. Raises InvalidValueError."""
        query = convert(dict(parameters), _ListQuery)
        return cls(int(query.limit), query.order == "asc", query.after)


def render_node(node: Item) -> list[Json]:
    """The items of a node: one input item, or all output items of a response."""
    if node.status == Status.DELETED:
        return []
    if node.is_reply:
        return render_output(node)
    return [render_message(node.id, node.message)]


def render_nodes(nodes: Iterable[Item], has_more: bool, query: ListQuery) -> Json:
    """A page of the items of some nodes, which are in the order of the query and begin with that of `after`."""
    items = [item for node in nodes for item in (render_node(node) if query.ascending else render_node(node)[::-1])]
    ids = [item["id"] for item in items]
    if query.after in ids:
        items = items[ids.index(query.after) + 1 :]
    return render_list(items[: query.limit], has_more or len(items) > query.limit)


def render_list(data: Sequence[Json], has_more: bool) -> Json:
    """A page of a list."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
