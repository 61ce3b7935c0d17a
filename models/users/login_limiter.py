"""Blocks those from whom too many logins fail."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from limits import parse
from limits.aio.storage import MemoryStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter

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
    and for the devices of each user. Without a storage, they count in memory.
    """

    def __init__(
        self, limit: str = FAILURES, of_address: str = FAILURES_OF_ADDRESS, storage: Storage | None = None
    ) -> None:
        self._limit = parse(limit)
        self._of_address = parse(of_address)
        self._limiter = FixedWindowRateLimiter(storage or MemoryStorage())

    async def check(self, guesser: Guesser) -> None:
        """Raise TooManyLoginsError if an address has failed too often, with this user id or with all of them."""
        if await self._is_blocked(guesser):
            raise TooManyLoginsError

    async def check_device(self, guesser: Guesser) -> None:
        """Raise TooManyLoginsError if no device is shown, or if the devices of its user have failed too often."""
        if guesser.device_of is None or not await self._limiter.test(self._limit, "device", guesser.device_of):
            raise TooManyLoginsError

    async def count_failure(self, guesser: Guesser) -> bool:
        """Count one failed login. Logs a line if it is the last one that is allowed.

        Returns False if it is one too many: hosts that count together may have checked at the same time.
        """
        own, of_address, of_device = await asyncio.gather(
            self._limiter.hit(self._limit, *self._key(guesser)),
            self._limiter.hit(self._of_address, "address", counted(guesser.address)),
            self._count_device(guesser),
        )
        if own and of_address and await self._is_blocked(guesser):
            log("logins blocked", address=guesser.address)
        return (own and of_address) or of_device

    async def _count_device(self, guesser: Guesser) -> bool:
        return guesser.device_of is not None and await self._limiter.hit(self._limit, "device", guesser.device_of)

    async def _is_blocked(self, guesser: Guesser) -> bool:
        allowed = await asyncio.gather(
            self._limiter.test(self._limit, *self._key(guesser)),
            self._limiter.test(self._of_address, "address", counted(guesser.address)),
        )
        return not all(allowed)

    @staticmethod
    def _key(guesser: Guesser) -> tuple[str, ...]:
        address = counted(guesser.address)
        return ("no id", address) if guesser.user_id is None else ("id", address, guesser.user_id[:ID_LENGTH])
