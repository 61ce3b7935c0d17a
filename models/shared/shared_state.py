"""What this host shares with the other hosts of one Parley: counts for limits, presence, and news of conversations."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from limits.aio.storage import MemoryStorage, Storage

from models.shared.news import News
from models.shared.presence import Presence


class SharedState(Protocol):
    """What counts for limits, and what knows and tells the other hosts."""

    @property
    def limits(self) -> Storage: ...

    @property
    def presence(self) -> Presence: ...

    @property
    def news(self) -> News: ...

    @property
    def trouble(self) -> str | None:
        """Why nothing is shared at the moment, although it should be; None if all is well."""


class OwnState:
    """The state of a host that is alone."""

    trouble = None

    def __init__(self) -> None:
        self.limits = MemoryStorage()
        self.presence = Presence()
        self.news = News()


@asynccontextmanager
async def open_shared_state(redis_url: str | None) -> AsyncIterator[SharedState]:
    """The state that all hosts with this Redis share; without one, that of a host alone. Raises SettingsError."""
    if redis_url is None:
        yield OwnState()
        return
    from models.shared.redis_state import RedisState  # only here: a host that is alone does without redis-py

    async with RedisState.opened(redis_url) as state:
        yield state
