"""The connection to Redis, which may be away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

from models.errors import ParleyError, SettingsError, one_line

logger = logging.getLogger("parley")

T = TypeVar("T")

ANSWER_SECONDS = 0.5  # a Redis that takes longer counts as away
LATE_SECONDS = 0.1  # a timeout that comes this late says that this host was too busy to hear the answer
CONNECTIONS = 32  # further questions wait for one of these, not longer than for an answer


class RedisAwayError(ParleyError):
    """Redis does not answer, or refuses."""


class RedisLink:
    """Asks Redis. Once a question has failed, nobody waits for Redis until an `attempt` and `recovered` say it is back.

    `trouble` says that it is away; `seconds` is how long it may take for an answer. Raises SettingsError if the URL
    cannot be read.
    """

    def __init__(self, url: str, seconds: float = ANSWER_SECONDS) -> None:
        try:
            # Each question has one timeout for all its steps, so its steps need none.
            self.pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=None,
                socket_timeout=None,
                socket_connect_timeout=seconds,  # for closing too
                protocol=2,
            )
            # It does not connect yet, but checks the options of the URL.
            self.pool.make_connection()  # type: ignore[no-untyped-call]
        except (ValueError, TypeError):  # their messages could show the password
            raise SettingsError(
                "PARLEY_REDIS_URL cannot be read: it must be redis://:password@host:6379/0, with %40 for @ and so on "
                "in a password"
            ) from None
        self.client = Redis(connection_pool=self.pool)
        self.trouble: str | None = None
        self._seconds = seconds
        self._there = asyncio.Event()
        self._there.set()

    async def ask(self, question: Callable[[], Awaitable[T]], held: float = 0.0) -> T:
        """The answer to a question, which Redis may hold for some seconds. Raises RedisAwayError.

        While Redis is away, it is raised at once.
        """
        if self.trouble:
            raise RedisAwayError
        return await self.attempt(question, held)

    async def attempt(self, question: Callable[[], Awaitable[T]], held: float = 0.0) -> T:
        """The answer to a question, also while Redis is away. Raises RedisAwayError."""
        loop = asyncio.get_running_loop()
        seconds = self._seconds + held
        deadline = loop.time() + seconds
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    return await question()
            except TimeoutError:
                if loop.time() < deadline + LATE_SECONDS:
                    raise
            async with asyncio.timeout(seconds):
                return await question()
        except (RedisError, OSError, TimeoutError) as error:
            if not self.trouble:
                logger.warning("Redis is away, so each host counts for itself: %s", one_line(error))
            self.trouble = "Redis is away: limits and presence are those of this host alone"
            self._there.clear()
            raise RedisAwayError from error

    def recovered(self) -> None:
        """Note that Redis has answered an attempt."""
        if self.trouble:
            logger.warning("Redis is back")
        self.trouble = None
        self._there.set()

    async def wait_there(self) -> None:
        """Wait until Redis is there, as far as anybody knows."""
        await self._there.wait()

    async def drop_idle(self) -> None:
        """Close the connections that wait to be used again: after a cut, each of them would fail once."""
        with suppress(RedisError, OSError):
            await self.pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        """Close all connections."""
        with suppress(RedisError, OSError):
            await self.pool.disconnect()
