"""Stores of conversations that are slow, or fail, when a test wants it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from sqlalchemy.ext.asyncio import AsyncEngine

from models.store.conversations import Conversations
from models.store.item import Item


class SlowConversations(Conversations):
    """A store whose writes wait or fail.

    Items are put while `may_put` is set, and replies are updated while `may_update` is set. `put_asked` is set by each
    call that puts items, `updated` when replies were updated, or put late. While `broken` is True, both calls raise.
    """

    def __init__(self, database: AsyncEngine) -> None:
        super().__init__(database)
        self.may_put, self.put_asked = asyncio.Event(), asyncio.Event()
        self.may_update, self.updated = asyncio.Event(), asyncio.Event()
        self.put_late = False
        self.may_put.set()
        self.may_update.set()
        self.broken = False

    async def put_items(self, user: str, id: str, position: int, new: Sequence[Item], accepted: bool = False) -> None:
        self.put_asked.set()
        await self.may_put.wait()
        if self.broken:
            raise OSError("the disk is full")
        await super().put_items(user, id, position, new, accepted)
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

    `putting` is set when items are about to be put, `back` after each update that succeeds, even one of no replies.
    """

    def __init__(self, database: AsyncEngine) -> None:
        super().__init__(database)
        self.broken = self.unreadable = False
        self.putting = asyncio.Event()
        self.back = asyncio.Event()

    async def put_items(self, user: str, id: str, position: int, new: Sequence[Item], accepted: bool = False) -> None:
        self._check(self.broken)
        self.putting.set()
        await super().put_items(user, id, position, new, accepted)

    async def update_replies(self, replies: Iterable[Item]) -> None:
        self._check(self.broken)
        await super().update_replies(replies)
        self.back.set()

    async def items(self, user: str, id: str) -> list[Item]:
        self._check(self.unreadable)
        return await super().items(user, id)

    def _check(self, away: bool) -> None:
        if away:
            self.back.clear()
            raise OSError("the database is away")
