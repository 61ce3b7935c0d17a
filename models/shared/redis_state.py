"""What this host shares with the others through Redis."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from models.shared.limit_storage import LimitStorage
from models.shared.redis_link import ANSWER_SECONDS, RedisAwayError, RedisLink
from models.shared.redis_news import RedisNews
from models.shared.redis_presence import BEAT_SECONDS, RedisPresence


class RedisState:
    """The `SharedState` that all hosts with one Redis share. While Redis is away, each host is alone."""

    def __init__(self, link: RedisLink, seconds: float = BEAT_SECONDS) -> None:
        host = uuid.uuid4().hex
        self.link = link
        self.limits = LimitStorage(link)
        self.news = RedisNews(link, host)
        self.presence = RedisPresence(link, host, self.news.tell_presence, seconds)
        self.news.on_presence = self.presence.look

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, url: str, seconds: float = BEAT_SECONDS, answer: float = ANSWER_SECONDS
    ) -> AsyncIterator[RedisState]:
        """The state for as long as the context lasts. Raises SettingsError.

        `seconds` is the time between two beats, `answer` how long Redis may take for an answer.
        """
        state = cls(RedisLink(url, answer), seconds)
        await state.presence.beat()
        with suppress(RedisAwayError):
            await state.news.read()  # only what comes from now on is news
        loops = (state.presence.keep_beating(), state.news.keep_sending(), state.news.keep_reading())
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            yield state
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await state.news.send()
            await state.presence.leave()
            await state.link.close()

    @property
    def trouble(self) -> str | None:
        """Why nothing is shared at the moment; None if all is well."""
        return self.link.trouble
