from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncEngine

from models.errors import DatabaseInUseError
from models.store.database import owner_table
from models.store.ownership import Owner, Ownership
from tests.support.process import fork

pytestmark = pytest.mark.anyio

BEAT = 0.02  # seconds
LONG = 0.5  # for a process that waits for beats: the first one that it sees ends the test


async def holder(database: AsyncEngine) -> Owner | None:
    return await Ownership(database)._holder()


async def write(database: AsyncEngine, owner: Owner) -> None:
    """Write an owner, as another process would."""
    async with database.begin() as connection:
        await connection.execute(owner_table.insert().values(place=1, **owner._asdict()))


def another(database: AsyncEngine, **fields: Any) -> Owner:
    """Another process on this machine that is alive: this one."""
    return Ownership(database).owner._replace(**fields)


def nothing() -> None:
    """What a process does that ends at once."""


def ended_process() -> int:
    """The id of a process that has ended."""
    process = fork(nothing)
    process.join()
    assert process.pid
    return process.pid


async def test_an_owner_is_stored_until_it_leaves(empty_tables: AsyncEngine) -> None:
    async with Ownership.taken(empty_tables) as ownership:
        assert await holder(empty_tables) == ownership.owner
    assert await holder(empty_tables) is None


async def test_a_second_process_is_refused_while_the_first_one_beats(empty_tables: AsyncEngine) -> None:
    async with Ownership.taken(empty_tables, BEAT) as first:
        with pytest.raises(
            DatabaseInUseError, match=f"another Parley uses this database, process {first.owner.pid} on"
        ):
            async with Ownership.taken(empty_tables, LONG):
                pass
        assert not first.lost.is_set()


async def test_an_owner_that_has_ended_is_replaced_at_once(empty_tables: AsyncEngine) -> None:
    await write(empty_tables, another(empty_tables, pid=ended_process()))
    async with asyncio.timeout(20), Ownership.taken(empty_tables, 60) as ownership:
        assert await holder(empty_tables) == ownership.owner


async def test_an_owner_that_no_longer_beats_is_replaced(empty_tables: AsyncEngine) -> None:
    await write(empty_tables, another(empty_tables, machine="elsewhere", pid=ended_process()))
    async with Ownership.taken(empty_tables, BEAT) as ownership:
        now = await holder(empty_tables)
        assert now
        assert now.id == ownership.owner.id


async def test_an_owner_that_leaves_meanwhile_is_followed(
    empty_tables: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        async with Ownership.taken(empty_tables, 60):
            entering = asyncio.create_task(stack.enter_async_context(Ownership.taken(empty_tables, BEAT)))
            while "waiting to see whether it still runs" not in caplog.text:  # noqa: ASYNC110  # a log has no event
                await asyncio.sleep(0)
        next_one, now = await entering, await holder(empty_tables)
        assert now
        assert now.id == next_one.owner.id


async def test_of_two_processes_that_start_together_one_is_refused(empty_tables: AsyncEngine) -> None:
    finished = asyncio.Event()

    async def run() -> None:
        async with Ownership.taken(empty_tables, LONG):
            await finished.wait()

    processes = {asyncio.create_task(run()), asyncio.create_task(run())}
    async with asyncio.timeout(20):
        refused, running = await asyncio.wait(processes, return_when=asyncio.FIRST_COMPLETED)
    assert [type(process.exception()) for process in refused] == [DatabaseInUseError]
    finished.set()
    await asyncio.gather(*running)


async def test_an_owner_that_was_replaced_is_told(empty_tables: AsyncEngine, caplog: pytest.LogCaptureFixture) -> None:
    async with Ownership.taken(empty_tables, BEAT) as first:
        async with empty_tables.begin() as connection:
            await connection.execute(update(owner_table).values(id="other"))
        async with asyncio.timeout(20):
            await first.lost.wait()
    assert "another process has taken this database" in caplog.text
    now = await holder(empty_tables)
    assert now
    assert now.id == "other", "it must not remove the other one"
