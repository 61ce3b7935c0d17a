"""Tells the clients of a user which conversations have changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from models.errors import ConversationNotFoundError, one_line
from models.shared.news import News
from models.store.conversations import Conversation, Conversations
from models.users.connections import ConnectionRegistry

logger = logging.getLogger("parley")

WAITING = 10_000  # changes; each is one of another conversation


class ConversationFeed:
    """Tells all connections of a user what a conversation is after a change, in the order of the first changes.

    A change may be of this host, or news from another one. Nobody waits for it. It reads a conversation just before it
    tells of it, so many changes in a row may be told as one, and the last state is always told. If the database cannot
    be read, nothing is told. Trees that are not listed are not found, so nothing is told of them.
    """

    def __init__(self, conversations: Conversations, connections: ConnectionRegistry, news: News | None = None) -> None:
        self._conversations = conversations
        self._connections = connections
        self._news = news or News()
        self._news.on_news = self._note
        self._waiting: dict[tuple[str, str], bool] = {}  # user and conversation; the value: whether it was deleted
        self._changed = asyncio.Event()
        self._failing = False

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, conversations: Conversations, connections: ConnectionRegistry, news: News | None = None
    ) -> AsyncIterator[ConversationFeed]:
        """A feed that tells of changes until the context ends."""
        feed = cls(conversations, connections, news)
        telling = asyncio.create_task(feed._tell_all())
        try:
            yield feed
        finally:
            telling.cancel()
            await asyncio.wait([telling])

    def changed(self, user: str, id: str) -> None:
        """A conversation of a user has changed, in the database."""
        self._note(user, id, deleted=False)
        self._news.tell(user, id, deleted=False)

    def deleted(self, user: str, id: str) -> None:
        """A conversation of a user was deleted from the database."""
        self._note(user, id, deleted=True)
        self._news.tell(user, id, deleted=True)

    def _note(self, user: str, id: str, deleted: bool) -> None:
        """Tell the connections of this process soon. It reads the database first, so that late news do no harm."""
        if not self._connections.count(user):
            return
        self._waiting[user, id] = deleted or self._waiting.get((user, id), False)
        if len(self._waiting) > WAITING:
            del self._waiting[next(iter(self._waiting))]
        self._changed.set()

    async def _tell_all(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._waiting:
                user, id = next(iter(self._waiting))
                await self._tell(user, id, self._waiting.pop((user, id)))

    async def _tell(self, user: str, id: str, deleted: bool) -> None:
        try:
            conversation = await self._find(user, id)
        except Exception as error:
            if not self._failing:
                logger.error("changes of conversations cannot be told: %s", one_line(error))
            self._failing = True
            return
        self._failing = False
        if conversation or deleted:
            self._connections.conversation_changed(user, id, conversation)

    async def _find(self, user: str, id: str) -> Conversation | None:
        try:
            return await self._conversations.find(user, id)
        except ConversationNotFoundError:
            return None
