"""Blocks addresses from which too many logins fail."""

from __future__ import annotations

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from models.errors import TooManyLoginsError

FAILURES = "10/minute"


class LoginLimiter:
    """Counts failed logins of each address. The window starts at the first failure.

    A moving window would keep an entry for each address forever (limits 5.8, in memory).
    """

    def __init__(self, limit: str = FAILURES) -> None:
        self._limit = parse(limit)
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    def check(self, address: str) -> None:
        """Raise TooManyLoginsError if an address has failed too often."""
        if not self._limiter.test(self._limit, address):
            raise TooManyLoginsError

    def count_failure(self, address: str) -> None:
        """Count one failed login."""
        self._limiter.hit(self._limit, address)
