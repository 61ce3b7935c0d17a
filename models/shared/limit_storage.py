"""Where limits are counted: in Redis, or in memory while it is away."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from limits.aio.storage import MemoryStorage, MovingWindowSupport, RedisStorage, Storage

from models.shared.redis_link import RedisAwayError, RedisLink

T = TypeVar("T")


class LimitStorage(Storage, MovingWindowSupport):
    """The storage that strategies of `limits` take: all hosts count together, but each for itself without Redis."""

    STORAGE_SCHEME = None

    def __init__(self, link: RedisLink) -> None:
        super().__init__()
        self._link = link
        self._memory = MemoryStorage()
        self._redis = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix="parley:limits",
            connection_pool=link.pool,  # type: ignore[arg-type]
        )

    @property
    def base_exceptions(self) -> type[Exception]:
        return RedisAwayError

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        return await self._ask(lambda storage: storage.incr(key, expiry, amount))

    async def get(self, key: str) -> int:
        return await self._ask(lambda storage: storage.get(key))

    async def get_expiry(self, key: str) -> float:
        return await self._ask(lambda storage: storage.get_expiry(key))

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        return await self._ask(lambda storage: storage.acquire_entry(key, limit, expiry, amount))

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        return await self._ask(lambda storage: storage.get_moving_window(key, limit, expiry))

    async def clear(self, key: str) -> None:
        await self._ask(lambda storage: storage.clear(key))

    async def reset(self) -> int | None:
        return await self._ask(lambda storage: storage.reset())

    async def check(self) -> bool:
        return not self._link.trouble

    async def _ask(self, question: Callable[[RedisStorage | MemoryStorage], Awaitable[T]]) -> T:
        try:
            return await self._link.ask(lambda: question(self._redis))
        except RedisAwayError:
            return await question(self._memory)
