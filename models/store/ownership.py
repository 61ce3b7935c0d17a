"""The right of a process to run replies in a database, and the end of those that do not run any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from sqlalchemy import delete, exists, insert, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from models.errors import DatabaseInUseError, one_line
from models.store.database import Database, owners_table
from models.store.owner import OWNER, Owner, remove_owners
from models.store.responses import Responses

logger = logging.getLogger("parley")

BEAT_SECONDS = 5.0
MISSED_BEATS = 3  # of another process, before it counts as ended


class Ownership:
    """The right to run replies in a database. A heartbeat keeps it; `lost` is set if another process has ended it.

    PostgreSQL may have several owners at once, SQLite has one. `seconds` is the time between two beats. Before it runs
    replies, which `watched` begins, a process may stand still, such as while it loads a model; then it enters again.
    """

    def __init__(self, database: Database, seconds: float = BEAT_SECONDS, address: str | None = None) -> None:
        self.owner = Owner.of_this_process(address)
        self.lost = asyncio.Event()
        self.alone = database.dialect.name == "sqlite"  # no other process has replies in this database
        self._beats = 0
        self._runs_replies = False
        self._leaving = asyncio.Event()
        self._database = database
        self._seconds = seconds
        self._due = asyncio.get_running_loop().time() + seconds  # when the next beat is

    @classmethod
    @asynccontextmanager
    async def taken(
        cls, database: Database, seconds: float = BEAT_SECONDS, address: str | None = None
    ) -> AsyncIterator[Ownership]:
        """The ownership for as long as the context lasts; other hosts reach this process at `address`.

        Of SQLite, it waits for some beats of an earlier owner that may have ended. Raises DatabaseInUseError if it has
        not.
        """
        ownership = cls(database, seconds, address)
        await ownership._take()
        beating = asyncio.create_task(ownership._beat())
        try:
            yield ownership
        finally:
            ownership._leaving.set()
            await beating
            with suppress(Exception):  # others see that this process has ended
                await ownership._release()

    @asynccontextmanager
    async def watched(self, responses: Responses, on_failed: Callable[[str, str], None]) -> AsyncIterator[None]:
        """While the context lasts, fail the replies of processes that have ended; first of all those of earlier ones.

        `on_failed` is called with the user and the conversation of each reply. Raises DatabaseInUseError if another
        process has taken SQLite meanwhile.
        """
        async with self._database.connect() as connection:
            if not await self._beat_once(connection):
                raise await self._refusal()
        self._runs_replies = True
        missed = await self._look({}, responses, on_failed)
        watching = asyncio.create_task(self._watch(missed, responses, on_failed))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def wait_alone(self) -> Sequence[Owner]:
        """The other owners, once it is sure that all have ended; waits for some beats of those that may still run.

        Raises DatabaseInUseError if one runs.
        """
        others = await self._others()
        for missed in range(MISSED_BEATS):
            if all(other.has_ended for other in others):
                break
            if not missed:
                logger.warning("process %d used this database: waiting to see whether it still runs", others[0].pid)
            await asyncio.sleep(self._seconds)
            earlier, others = others, await self._others()
            for other in others:
                if other not in earlier and not other.has_ended:
                    raise DatabaseInUseError(other.host, other.pid)
        return others

    async def _take(self) -> None:
        ended = await self.wait_alone() if self.alone else ()
        async with self._database.begin() as connection:
            await remove_owners(connection, ended)
            entered = await self._enter(connection)
        if not entered:  # another process was faster
            raise await self._refusal()

    async def _refusal(self) -> DatabaseInUseError:
        winner = next(iter(await self._others()), self.owner)
        return DatabaseInUseError(winner.host, winner.pid)

    async def _others(self) -> list[Owner]:
        chosen = select(*(OWNER[name] for name in Owner._fields)).where(OWNER.id != self.owner.id)
        async with self._database.connect() as connection:
            return [Owner(*row) for row in await connection.execute(chosen)]

    async def _enter(self, connection: AsyncConnection) -> bool:
        """Write this process, unless it is there, or, on SQLite, another one is. Returns whether it was written."""
        present = self.owner._replace(beats=self._beats)._asdict()
        values = [literal(value, OWNER[name].type) for name, value in present.items()]
        rivals = select(OWNER.id) if self.alone else select(OWNER.id).where(OWNER.id == self.owner.id)
        entered = insert(owners_table).from_select(Owner._fields, select(*values).where(~exists(rivals)))
        return (await connection.execute(entered)).rowcount == 1

    async def _beat(self) -> None:
        while not await self._pause():
            with suppress(Exception):  # the write buffer tells that the database is away
                # The connection is kept, so that no beat waits while all others of the pool are in use.
                async with self._database.connect() as connection:
                    while await self._beat_once(connection):
                        if await self._pause():
                            return
                return

    async def _beat_once(self, connection: AsyncConnection) -> bool:
        """Beat. Returns False if this process is no owner any more."""
        self._beats += 1
        mine = update(owners_table).where(OWNER.id == self.owner.id).values(beats=self._beats)
        async with connection.begin():
            if not self._runs_replies:
                await self._enter(connection)
            kept = (await connection.execute(mine)).rowcount
        if not kept:
            logger.critical("another process has taken over from this one, since it did not answer: it ends")
            self.lost.set()
        return bool(kept)

    async def _pause(self) -> bool:
        """Wait until the next beat is due. Returns whether there is none, since this process leaves."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._due):
                return await self._leaving.wait()
        self._due = asyncio.get_running_loop().time() + self._seconds  # also if the beat takes long
        return False

    async def _release(self) -> None:
        async with self._database.begin() as connection:
            await connection.execute(delete(owners_table).where(OWNER.id == self.owner.id))

    async def _watch(
        self, missed: dict[Owner, int], responses: Responses, on_failed: Callable[[str, str], None]
    ) -> None:
        trouble = False
        while True:
            await asyncio.sleep(self._seconds)
            try:
                missed = await self._look(missed, responses, on_failed)
                trouble = False
            except Exception as error:
                if not trouble:
                    logger.error("it cannot be seen which processes have ended: %s", one_line(error))
                trouble = True

    async def _look(
        self, missed: dict[Owner, int], responses: Responses, on_failed: Callable[[str, str], None]
    ) -> dict[Owner, int]:
        """Fail the replies of processes that have ended. Takes and returns how many beats each other owner has missed.

        Beats are counted in looks that succeed, not in seconds: this process may have stood still, or the database.
        """
        missed = {other: missed.get(other, -1) + 1 for other in await self._others()}
        ended = [other for other, beats in missed.items() if beats >= MISSED_BEATS or other.has_ended]
        for other in ended:
            logger.warning("process %d on %s has ended, or does not answer any more", other.pid, other.host)
        failed = await responses.fail_unfinished(ended)
        if failed:
            logger.warning("%d replies were cut off when their server ended; their text so far is kept", len(failed))
        for user, conversation in failed:
            on_failed(user, conversation)
        return missed
