"""A storage of limits that counts when a test wants it."""

from __future__ import annotations

import asyncio

from limits.aio.storage import MemoryStorage


class HeldStorage(MemoryStorage):
    """Counts while `may_count` is set, at first not. `asked` is set by each question, `counted` after each count."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.may_count, self.counted = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        await self._wait()
        count = await super().incr(key, expiry, amount)
        self.counted.set()
        return count

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        await self._wait()
        allowed = await super().acquire_entry(key, limit, expiry, amount)
        self.counted.set()
        return allowed

    async def _wait(self) -> None:
        self.asked.set()
        await self.may_count.wait()
