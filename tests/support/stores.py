"""Stores of conversations that are slow, or fail, when a test wants it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from sqlalchemy.ext.asyncio import AsyncEngine

from models.store.conversations import Conversations, Path
from models.store.item import Edge, Item
from models.store.place import Place
from models.store.responses import Found, FoundPath
from models.users.connections import ConnectionRegistry
from models.users.conversation_feed import ConversationFeed


def silent_feed(conversations: Conversations) -> ConversationFeed:
    """A feed of users who have no connections."""
    return ConversationFeed(conversations, ConnectionRegistry(announce=False, per_user=1))


class SlowConversations(Conversations):
    """A store whose writes wait or fail.

    Turns are put while `may_put` is set, and replies are updated while `may_update` is set. `put_asked` is set by each
    call that puts a turn, `updated` when replies were updated, or put late. While `broken` is True, both calls raise.
    """

    def __init__(self, database: AsyncEngine) -> None:
        super().__init__(database)
        self.may_put, self.put_asked = asyncio.Event(), asyncio.Event()
        self.may_update, self.updated = asyncio.Event(), asyncio.Event()
        self.put_late = False
        self.may_put.set()
        self.may_update.set()
        self.broken = False

    async def begin_turn(
        self, user: str, id: str, place: Place, input: Sequence[Item], reply: Item, accepted: bool = False
    ) -> None:
        self.put_asked.set()
        await self.may_put.wait()
        if self.broken:
            raise OSError("the disk is full")
        await super().begin_turn(user, id, place, input, reply, accepted)
        self.put_late = self.put_late or accepted

    async def update_replies(self, replies: Iterable[Item]) -> None:
        await self.may_update.wait()
        if self.broken:
            raise OSError("the disk is full")
        replies = list(replies)
        await super().update_replies(replies)
        if replies or self.put_late:
            self.put_late = False
            self.updated.set()


class AwayConversations(Conversations):
    """A store that cannot be written while `broken` is True, nor read while `unreadable` is True.

    `putting` is set when a turn is about to be put, `back` after each update that succeeds, even one of no replies.
    """

    def __init__(self, database: AsyncEngine) -> None:
        super().__init__(database)
        self.broken = self.unreadable = False
        self.putting = asyncio.Event()
        self.back = asyncio.Event()

    async def begin_turn(
        self, user: str, id: str, place: Place, input: Sequence[Item], reply: Item, accepted: bool = False
    ) -> None:
        self._check(self.broken)
        self.putting.set()
        await super().begin_turn(user, id, place, input, reply, accepted)

    async def update_replies(self, replies: Iterable[Item]) -> None:
        self._check(self.broken)
        await super().update_replies(replies)
        self.back.set()

    async def path(self, user: str, id: str, after: str | Edge = Edge.END) -> Path:
        self._check(self.unreadable)
        return await super().path(user, id, after)

    async def find_response(self, user: str, id: str) -> Found:
        self._check(self.unreadable)
        return await super().find_response(user, id)

    async def path_of_response(self, user: str, id: str) -> FoundPath:
        self._check(self.unreadable)
        return await super().path_of_response(user, id)

    async def delete_response(self, user: str, id: str) -> str:
        self._check(self.broken)
        return await super().delete_response(user, id)

    def _check(self, away: bool) -> None:
        if away:
            self.back.clear()
            raise OSError("the database is away")
