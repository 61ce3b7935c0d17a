"""Items for tests of the store, and short ways to put them there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncEngine

from models.output_item import OutputItem
from models.store.conversations import Conversations
from models.store.database import conversations_table
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


SYSTEM = Item("item_0", "system", "Be brief.", 1.25)
QUESTION = Item("msg_1", "user", "How are you?", 1700000000.123456)
ANSWER = reply("resp_1", "We", "ll.", reason="stop", usage={"total_tokens": 9}, ended=1700000001.5, decode_seconds=0.5)


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


async def set_updated(engine: AsyncEngine, times: dict[str, float]) -> None:
    """Change when conversations were last updated."""
    async with engine.begin() as connection:
        for id, time in times.items():
            change = update(conversations_table).where(conversations_table.c.id == id).values(updated=time)
            await connection.execute(change)
