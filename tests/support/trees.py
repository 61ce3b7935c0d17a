"""Items for tests of the store, and short ways to put them there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from models.output_item import OutputItem
from models.store.conversations import Conversations
from models.store.item import Item, Status
from models.store.place import Place


def message(id: str, content: str = "Hi") -> Item:
    """A message of the user."""
    return Item(id, "user", content, 1.0)


def reply(id: str, *pieces: str, status: Status = Status.COMPLETED, **fields: Any) -> Item:
    """A reply with one message, in some pieces; without pieces, its output is empty."""
    output = [OutputItem("message", [*pieces], complete=status is Status.COMPLETED)] if pieces else []
    return Item.of_reply(id, 2.0, output, status=status, **{"options": {}, "usage": {}, "left_out": 0, **fields})


def growing(id: str, *pieces: str, **fields: Any) -> Item:
    """A reply that is in progress."""
    return reply(id, *pieces, status=Status.IN_PROGRESS, **fields)


async def begin(store: Conversations, id: str, *items: Item, user: str = "ann", listed: bool = True) -> None:
    """Begin a conversation with some messages and, at last, a reply."""
    *input, last = items
    await store.begin_turn(user, id, Place(new=True, listed=listed), input, last)


async def go_on(store: Conversations, id: str, *items: Item, user: str = "ann") -> None:
    """Add some messages and, at last, a reply behind the leaf of a conversation."""
    *input, last = items
    leaf = (await store.find(user, id)).leaf
    await store.begin_turn(user, id, Place(leaf, leaf), input, last)


async def fork(store: Conversations, id: str, parent: str | None, *items: Item, user: str = "ann") -> None:
    """Add some messages and, at last, a reply below any node; the leaf of a listed conversation stays."""
    *input, last = items
    await store.begin_turn(user, id, Place(parent, advances=False), input, last)


async def contents(store: Conversations, id: str, user: str = "ann") -> list[str]:
    """The contents of the current branch of a conversation."""
    return contents_of((await store.path(user, id)).items)


def contents_of(items: Iterable[Item]) -> list[str]:
    return [item.content for item in items]


def ids_of(items: Iterable[Item]) -> list[str]:
    return [item.id for item in items]
