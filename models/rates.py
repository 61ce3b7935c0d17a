"""How much a user may ask for in a span of time."""

from __future__ import annotations

import math
import time

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, RateLimiter

from models.refused import Refused


class RateLimitExceeded(Refused):
    """A user who asked as often, or for as many tokens, as may be; `retry_after` says when there is room again."""

    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, limit: RateLimitItem, of: str, retry_after: int) -> None:
        super().__init__(f"you may have {str(limit).replace(' per', f' {of} per', 1)}: try again in {retry_after} s")
        self.retry_after = retry_after


class Rates:
    """Counts each user's requests and tokens against limits such as "60/minute"; None is no limit.

    Requests count in any span of the length, tokens in one that begins with the first of them, since a moving one
    would note each.
    """

    def __init__(self, requests: str | None = None, tokens: str | None = None) -> None:
        self._requests = parse(requests) if requests else None
        self._tokens = parse(tokens) if tokens else None
        storage = MemoryStorage()
        self._asked, self._spent = MovingWindowRateLimiter(storage), FixedWindowRateLimiter(storage)

    def ask(self, user: str) -> None:
        """Count a request, where it may be made. Raises RateLimitExceeded."""
        if self._tokens and not self._spent.test(self._tokens, "tokens", user):
            raise RateLimitExceeded(self._tokens, "tokens", _seconds(self._spent, self._tokens, "tokens", user))
        if self._requests and not self._asked.hit(self._requests, "requests", user):
            raise RateLimitExceeded(self._requests, "requests", _seconds(self._asked, self._requests, "requests", user))

    def spend(self, user: str, tokens: int) -> None:
        """Count tokens that were read and written."""
        if self._tokens:
            self._spent.hit(self._tokens, "tokens", user, cost=tokens)


def _seconds(limiter: RateLimiter, limit: RateLimitItem, *key: str) -> int:
    """Until there is room again."""
    return max(1, math.ceil(limiter.get_window_stats(limit, *key).reset_time - time.time()))
