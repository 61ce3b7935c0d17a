"""Makes sure that only one process runs the replies of a database."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import and_, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from models.errors import DatabaseInUseError
from models.store.database import Database, owner_table

logger = logging.getLogger("parley")

BEAT_SECONDS = 5.0
MISSED_BEATS = 3  # of another process, before it counts as ended

OWNER = owner_table.c


class Owner(NamedTuple):
    """A process, as it is stored. `beats` grows while it runs."""

    id: str
    machine: str
    pid: int
    beats: int

    @property
    def has_ended(self) -> bool:
        """Whether the process has certainly ended: it ran on this machine, and is not there any more."""
        if self.machine != _machine() or os.name != "posix":  # on Windows, `kill` with 0 would not only ask
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


class Ownership:
    """The right to run replies in a database. A heartbeat keeps it; `lost` is set if another process has taken it."""

    def __init__(self, database: Database, seconds: float = BEAT_SECONDS) -> None:
        self.owner = Owner(uuid.uuid4().hex, _machine(), os.getpid(), 0)
        self.lost = asyncio.Event()
        self._leaving = asyncio.Event()
        self._database = database
        self._seconds = seconds

    @classmethod
    @asynccontextmanager
    async def taken(cls, database: Database, seconds: float = BEAT_SECONDS) -> AsyncIterator[Ownership]:
        """The ownership for as long as the context lasts; `seconds` is the time between two beats.

        Waits for some beats of an earlier owner that may have ended. Raises DatabaseInUseError if it has not.
        """
        ownership = cls(database, seconds)
        await ownership._take()
        beating = asyncio.create_task(ownership._beat())
        try:
            yield ownership
        finally:
            ownership._leaving.set()
            await beating
            with suppress(Exception):  # the next start sees that this process has ended
                await ownership._release()

    async def _take(self) -> None:
        holder = await self._holder()
        if holder and not holder.has_ended:
            logger.warning("process %d used this database: waiting to see whether it still runs", holder.pid)
            holder = await self._wait_for(holder)
        with suppress(IntegrityError):  # another start was faster
            if await self._replace(holder):
                return
        raise _in_use(await self._holder() or self.owner)

    async def _wait_for(self, holder: Owner) -> Owner | None:
        """The owner after some beats that it missed, or None if it left. Raises DatabaseInUseError if it beats."""
        for _ in range(MISSED_BEATS):
            await asyncio.sleep(self._seconds)
            now = await self._holder()
            if now is None or now.has_ended:
                return now
            if now != holder:
                raise _in_use(now)
        return holder

    async def _holder(self) -> Owner | None:
        async with self._database.connect() as connection:
            row = (await connection.execute(select(*(OWNER[name] for name in Owner._fields)))).one_or_none()
        return Owner(*row) if row else None

    async def _replace(self, holder: Owner | None) -> bool:
        """Write this process in place of the owner that was read. Returns False if another process was faster."""
        async with self._database.begin() as connection:
            if holder is None:
                await connection.execute(insert(owner_table).values(place=1, **self.owner._asdict()))
                return True
            same = and_(OWNER.id == holder.id, OWNER.beats == holder.beats)
            replaced = await connection.execute(update(owner_table).where(same).values(self.owner._asdict()))
            return replaced.rowcount == 1

    async def _beat(self) -> None:
        while not await self._pause():
            try:
                async with self._database.begin() as connection:
                    mine = update(owner_table).where(OWNER.id == self.owner.id)
                    kept = (await connection.execute(mine.values(beats=OWNER.beats + 1))).rowcount
            except Exception:  # the write buffer tells that the database is away
                continue
            if not kept:
                logger.critical("another process has taken this database, since this one did not answer: it ends")
                return self.lost.set()

    async def _pause(self) -> bool:
        """Wait until the next beat is due. Returns whether there is none, since this process leaves."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                return await self._leaving.wait()
        return False

    async def _release(self) -> None:
        async with self._database.begin() as connection:
            await connection.execute(delete(owner_table).where(OWNER.id == self.owner.id))


def _in_use(owner: Owner) -> DatabaseInUseError:
    return DatabaseInUseError(owner.machine.partition(" ")[0], owner.pid)


def _machine() -> str:
    """The host, and the space in which its process ids are unique, which may be that of a container."""
    namespace = Path("/proc/self/ns/pid")
    return f"{platform.node()} {namespace.stat().st_ino if namespace.exists() else ''}"
