"""Failed logins, counted per address."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from models.refused import Refused


class TooManyFailures(Refused):
    """Logins that failed too often from one address."""

    type = "rate_limit_error"
    code = "too_many_failures"
    message = "too many failed logins from your address: wait a minute"
    retry_after = 60


class Throttle:
    """Says when an address has failed too often: `limit` times within `seconds`."""

    def __init__(self, limit: int = 10, seconds: float = 60, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.seconds = seconds
        self._clock = clock
        self._failures: dict[str, deque[float]] = {}

    def blocked(self, address: str) -> bool:
        """Whether the address has to wait."""
        self._forget()
        horizon = self._clock() - self.seconds
        return sum(time > horizon for time in self._failures.get(address, ())) >= self.limit

    def failed(self, address: str) -> None:
        """Count one failure."""
        times = self._failures.pop(address, deque(maxlen=self.limit))
        times.append(self._clock())
        self._failures[address] = times  # at the end: the dict stays ordered by the latest failure

    def _forget(self) -> None:
        """Drop what is too old to count, so that memory is bounded by a minute's failures."""
        horizon = self._clock() - self.seconds
        while self._failures and next(iter(self._failures.values()))[-1] <= horizon:
            del self._failures[next(iter(self._failures))]
