"""Which users are connected to which host, as the hosts write it to Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

from models.shared.presence import Presence
from models.shared.redis_link import RedisAwayError, RedisLink

BEAT_SECONDS = 1.0  # between two writes of a host
MISSED_BEATS = 6  # before its users are gone
HOSTS = "parley:hosts"  # the ids of all hosts, also of some that have just ended

_decode = msgspec.json.Decoder(list[str]).decode


class RedisPresence(Presence):
    """Writes the users of this host with every beat, and reads those of the others: after a beat, or a `look`.

    What is written expires, so the users of a host that is frozen or cut off are gone after some missed beats. While
    Redis is away, the users of all other hosts stay as long. `on_written` is called when others should look.
    """

    def __init__(
        self,
        link: RedisLink,
        host: str,
        on_written: Callable[[], None],
        seconds: float = BEAT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._link = link
        self._host = host
        self._on_written = on_written
        self._seconds = seconds
        self._clock = clock
        self._here: set[str] = set()
        self._written: list[str] = []
        self._users_of: Mapping[str, frozenset[str]] = {}  # the other hosts
        self._away = False
        self._kept_until = 0.0  # hosts that are not found stay until then
        self._due = asyncio.Event()

    def came(self, user: str) -> None:
        """A user's first connection to this host has opened."""
        self._here.add(user)
        self._due.set()

    def went(self, user: str) -> None:
        """A user's last connection to this host has closed."""
        self._here.discard(user)
        self._due.set()

    def look(self) -> None:
        """Read the users of the other hosts soon."""
        self._due.set()

    async def keep_beating(self) -> None:
        """Write and read for ever. A beat also finds out whether Redis is back."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await self._due.wait()
            if not await self.beat():
                await asyncio.sleep(self._seconds)  # else each change here would be an attempt

    async def beat(self) -> bool:
        """Write the users of this host, and read those of the others. Returns whether Redis is there."""
        self._due.clear()
        users = sorted(self._here)
        try:
            users_of = await self._link.attempt(lambda: self._exchange(users))
        except RedisAwayError:
            if not self._away:
                self._away, self._kept_until = True, self._clock() + MISSED_BEATS * self._seconds
            self._see({})
            await self._link.drop_idle()
            return False
        if self._away:  # the others may find out a little later that Redis is back
            self._away, self._kept_until = False, self._clock() + MISSED_BEATS / 2 * self._seconds
        self._link.recovered()
        self._see(users_of)
        if users != self._written:
            self._written = users
            self._on_written()
        return True

    async def leave(self) -> None:
        """Remove this host."""
        with suppress(RedisAwayError):
            await self._link.ask(lambda: self._link.client.delete(_key(self._host)))

    async def _exchange(self, users: list[str]) -> dict[str, frozenset[str]]:
        """Write the users of this host; returns the users of each other one."""
        client = self._link.client
        async with client.pipeline() as pipeline:
            pipeline.set(_key(self._host), msgspec.json.encode(users), px=round(1000 * MISSED_BEATS * self._seconds))
            pipeline.sadd(HOSTS, self._host)
            pipeline.smembers(HOSTS)
            *_, ids = await pipeline.execute()
        hosts = sorted({id.decode() for id in ids} - {self._host})
        written = dict(zip(hosts, await client.mget([_key(host) for host in hosts]), strict=True)) if hosts else {}
        if ended := [host for host, users in written.items() if users is None]:
            await client.srem(HOSTS, *ended)
        return {host: frozenset(_decode(users)) for host, users in written.items() if users is not None}

    def _see(self, users_of: Mapping[str, frozenset[str]]) -> None:
        """Take over the users of the other hosts, and tell who has come and gone."""
        if self._clock() < self._kept_until:
            users_of = {**self._users_of, **users_of}
        before, self._users_of = self.elsewhere, users_of
        self.elsewhere = frozenset().union(*users_of.values())
        for user in sorted(before ^ self.elsewhere):
            self.on_change(user)


def _key(host: str) -> str:
    return f"parley:users:{host}"
