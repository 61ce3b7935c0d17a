"""Blocks those from whom too many logins fail."""

from __future__ import annotations

from dataclasses import dataclass

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from models.errors import TooManyLoginsError
from models.ops.logs import log
from models.users.addresses import counted

FAILURES = "10/minute"
FAILURES_OF_ADDRESS = "100/minute"  # over all user ids that it names
ID_LENGTH = 65  # characters of a user id that count; no user has a longer id than 64


@dataclass(frozen=True)
class Guesser:
    """Who tries to log in: an address, the user id that it names, if any, and whose device shows its cookie, if any."""

    address: str
    user_id: str | None = None
    device_of: str | None = None


class LoginLimiter:
    """Counts failed logins. The window starts at the first failure.

    They count for each address, or where a user id is named, for each address and id; for each address over all ids;
    and for the devices of each user. A moving window would keep an entry for each address forever (limits 5.8, in
    memory).
    """

    def __init__(self, limit: str = FAILURES, of_address: str = FAILURES_OF_ADDRESS) -> None:
        self._limit = parse(limit)
        self._of_address = parse(of_address)
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    def check(self, guesser: Guesser) -> None:
        """Raise TooManyLoginsError if an address has failed too often, with this user id or with all of them."""
        if self._is_blocked(guesser):
            raise TooManyLoginsError

    def check_device(self, guesser: Guesser) -> None:
        """Raise TooManyLoginsError if no device is shown, or if the devices of its user have failed too often."""
        if guesser.device_of is None or not self._limiter.test(self._limit, "device", guesser.device_of):
            raise TooManyLoginsError

    def count_failure(self, guesser: Guesser) -> None:
        """Count one failed login. Logs a line if it was one too many."""
        blocked_before = self._is_blocked(guesser)
        self._limiter.hit(self._limit, *self._key(guesser))
        self._limiter.hit(self._of_address, "address", counted(guesser.address))
        if guesser.device_of is not None:
            self._limiter.hit(self._limit, "device", guesser.device_of)
        if self._is_blocked(guesser) and not blocked_before:
            log("logins blocked", address=guesser.address)

    def _is_blocked(self, guesser: Guesser) -> bool:
        return not (
            self._limiter.test(self._limit, *self._key(guesser))
            and self._limiter.test(self._of_address, "address", counted(guesser.address))
        )

    @staticmethod
    def _key(guesser: Guesser) -> tuple[str, ...]:
        address = counted(guesser.address)
        return ("no id", address) if guesser.user_id is None else ("id", address, guesser.user_id[:ID_LENGTH])
