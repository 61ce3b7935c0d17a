"""News of conversations, in a stream of Redis that all hosts read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import islice
from typing import Any

import msgspec

from models.shared.news import News
from models.shared.redis_link import RedisAwayError, RedisLink

STREAM = "parley:news"
KEPT = 10_000  # bulletins in the stream, for hosts that were cut off
WAITING = 10_000  # changes that wait to be sent, while Redis is away
SENT_TOGETHER = 100  # changes
READ_TOGETHER = 100  # bulletins
READ_SECONDS = 1.0  # how long Redis holds a question for news


class Bulletin(msgspec.Struct, array_like=True):
    """What a host tells the others: changes of conversations, and whether its users have changed.

    A change is a user, a conversation, and whether it was deleted.
    """

    host: str
    changes: list[tuple[str, str, bool]]
    presence: bool


_decode = msgspec.json.Decoder(Bulletin).decode


class RedisNews(News):
    """Sends changes to the other hosts, and reads theirs. It keeps those that Redis cannot take yet.

    `on_presence` is called when the users of another host have changed.
    """

    def __init__(self, link: RedisLink, host: str) -> None:
        super().__init__()
        self.on_presence: Callable[[], None] = lambda: None
        self._link = link
        self._host = host
        self._waiting: dict[tuple[str, str], bool] = {}  # user and conversation; the value: whether it was deleted
        self._presence = False
        self._unsent = asyncio.Event()
        self._read: bytes | None = None  # the id of the last bulletin that was read

    def tell(self, user: str, conversation: str, deleted: bool) -> None:
        """Tell the other hosts soon that a conversation has changed, in the database."""
        self._waiting[user, conversation] = deleted or self._waiting.get((user, conversation), False)
        if len(self._waiting) > WAITING:
            del self._waiting[next(iter(self._waiting))]
        self._unsent.set()

    def tell_presence(self) -> None:
        """Tell the other hosts soon that the users of this host have changed, in Redis."""
        self._presence = True
        self._unsent.set()

    async def keep_sending(self) -> None:
        """Send what waits, for ever."""
        while True:
            await self._unsent.wait()
            await self._link.wait_there()
            await self.send()

    async def keep_reading(self) -> None:
        """Read what the other hosts send, for ever."""
        while True:
            await self._link.wait_there()
            try:
                await self.read()
            except RedisAwayError:
                continue

    async def read(self) -> None:
        """Read the bulletins of the next second; the first time, skip what is there. Raises RedisAwayError."""
        client, read = self._link.client, self._read
        if read is None:
            last: Any = await self._link.ask(lambda: client.xrevrange(STREAM, count=1))
            self._read = last[0][0] if last else b"0-0"
            return
        found: Any = await self._link.ask(
            lambda: client.xread({STREAM: read}, READ_TOGETHER, round(1000 * READ_SECONDS)),
            READ_SECONDS,
        )
        for id, fields in found[0][1] if found else ():
            self._read = id
            self._hear(_decode(fields[b"bulletin"]))

    async def send(self) -> None:
        """Send what waits, or some of it."""
        if not self._waiting and not self._presence:
            return
        changes = dict(islice(self._waiting.items(), SENT_TOGETHER))
        bulletin = Bulletin(self._host, [(*key, deleted) for key, deleted in changes.items()], self._presence)
        self._waiting = dict(islice(self._waiting.items(), SENT_TOGETHER, None))
        self._presence = False
        if not self._waiting:
            self._unsent.clear()
        fields: Any = {"bulletin": msgspec.json.encode(bulletin)}
        try:
            await self._link.ask(lambda: self._link.client.xadd(STREAM, fields, maxlen=KEPT))
        except RedisAwayError:
            self._presence = self._presence or bulletin.presence
            for user, conversation, deleted in bulletin.changes:
                self.tell(user, conversation, deleted)
            self._unsent.set()

    def _hear(self, bulletin: Bulletin) -> None:
        if bulletin.host == self._host:
            return
        for change in bulletin.changes:
            self.on_news(*change)
        if bulletin.presence:
            self.on_presence()
