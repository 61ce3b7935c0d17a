"""Limits the requests and tokens of a user in a period of time."""

from __future__ import annotations

import math
import time

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, RateLimiter as Strategy

from models.errors import RateLimitExceededError


class RateLimiter:
    """Counts the requests and tokens of each user against limits such as "60/minute"; None is no limit.

    Requests count in a moving window. Tokens count in a fixed window that starts at the first token, since a moving
    window would keep an entry for each token. Without a storage, they count in memory.
    """

    def __init__(self, requests: str | None = None, tokens: str | None = None, storage: Storage | None = None) -> None:
        self._requests = parse(requests) if requests else None
        self._tokens = parse(tokens) if tokens else None
        storage = storage or MemoryStorage()
        self._asked, self._spent = MovingWindowRateLimiter(storage), FixedWindowRateLimiter(storage)

    async def count_request(self, user: str) -> None:
        """Count a request, if it is allowed. Raises RateLimitExceededError."""
        if self._tokens and not await self._spent.test(self._tokens, "tokens", user):
            raise await _exceeded(self._spent, self._tokens, "tokens", user)
        if self._requests and not await self._asked.hit(self._requests, "requests", user):
            raise await _exceeded(self._asked, self._requests, "requests", user)

    async def count_tokens(self, user: str, tokens: int) -> None:
        """Count tokens that were read and written."""
        if self._tokens:
            await self._spent.hit(self._tokens, "tokens", user, cost=tokens)


async def _exceeded(strategy: Strategy, limit: RateLimitItem, of: str, user: str) -> RateLimitExceededError:
    """The error that names the limit and says when to try again."""
    window = await strategy.get_window_stats(limit, of, user)
    seconds = max(1, math.ceil(window.reset_time - time.time()))
    allowed = str(limit).replace(" per", f" {of} per", 1)
    return RateLimitExceededError(f"you may have {allowed}: try again in {seconds} s", seconds)
