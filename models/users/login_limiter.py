"""Blocks addresses from which too many logins fail."""

from __future__ import annotations

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from models.errors import TooManyLoginsError
from models.ops.logs import log
from models.users.addresses import counted

FAILURES = "10/minute"


class LoginLimiter:
    """Counts failed logins of each address, or /64 network of IPv6. The window starts at the first failure.

    A moving window would keep an entry for each address forever (limits 5.8, in memory).
    """

    def __init__(self, limit: str = FAILURES) -> None:
        self._limit = parse(limit)
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    def check(self, address: str) -> None:
        """Raise TooManyLoginsError if an address has failed too often."""
        if not self._limiter.test(self._limit, counted(address)):
            raise TooManyLoginsError

    def count_failure(self, address: str) -> None:
        """Count one failed login. Logs a line if there may be no more."""
        self._limiter.hit(self._limit, counted(address))
        if not self._limiter.test(self._limit, counted(address)):
            log("logins blocked", address=address)
