from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from models.errors import DatabaseInUseError, DatabaseUnavailableError
from models.settings import Settings
from models.store.conversations import Conversations
from models.store.database import conversations_table, open_database, owners_table
from models.store.item import Item, Status
from models.store.owner import OWNER, Owner
from models.store.ownership import Ownership
from tests.support.owners import owned_store, read_owners, remove_owner, write_owner
from tests.support.process import fork, processes
from tests.support.trees import QUESTION, begin, growing, reply

pytestmark = pytest.mark.anyio

BEAT = 0.02  # seconds
LONG = 0.5  # for a process that waits for beats: the first one that it sees ends the test
NEVER = 60.0  # for a process that is not to beat
PATIENCE = 40.0  # seconds to wait for anything, before the test fails


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """An empty SQLite database."""
    async with open_database(Settings(data=tmp_path)) as database:
        yield database


@pytest.fixture
async def shared(empty_postgresql: str) -> AsyncIterator[AsyncEngine]:
    """An empty PostgreSQL database, which several processes may own."""
    async with open_database(Settings(database_url=empty_postgresql)) as database:
        yield database


def nothing() -> None:
    """What a process does that ends at once."""


def ended_process() -> int:
    """The id of a process that has ended."""
    process = fork(nothing)
    process.join()
    assert process.pid
    return process.pid


async def ids(database: AsyncEngine) -> list[str]:
    """The ids of all owners."""
    return [owner.id for owner in await read_owners(database)]


async def beats_of(database: AsyncEngine, owner: Owner) -> int:
    async with database.connect() as connection:
        return int((await connection.execute(select(OWNER.beats).where(OWNER.id == owner.id))).scalar_one())


async def until_beats(database: AsyncEngine, owner: Owner, number: int) -> None:
    """Wait until an owner has beaten so many times."""
    async with asyncio.timeout(PATIENCE):
        while await beats_of(database, owner) < number:
            pass


async def begin_reply(database: AsyncEngine, owner: str, conversation: str = "conv_1") -> str:
    """Begin a reply that an owner runs. Returns its id."""
    id = f"resp_{conversation}"
    await begin(Conversations(database, owner), conversation, growing(id, "half"))
    return id


async def find(database: AsyncEngine, id: str) -> Item:
    return (await Conversations(database).find_response("ann", id)).item


def untold(user: str, conversation: str) -> None:
    """Nobody wants to know."""


class Failures(asyncio.Queue[tuple[str, str]]):
    """The conversations whose replies have failed."""

    def note(self, user: str, conversation: str) -> None:
        self.put_nowait((user, conversation))

    async def next(self) -> tuple[str, str]:
        async with asyncio.timeout(PATIENCE):
            return await self.get()


@asynccontextmanager
async def watching(
    database: AsyncEngine, seconds: float, on_failed: Callable[[str, str], None] = untold
) -> AsyncIterator[Ownership]:
    """An owner that watches the others, from now on."""
    async with Ownership.taken(database, seconds) as ownership:
        async with ownership.watched(Conversations(database, ownership.owner.id), on_failed):
            yield ownership


# Either database


async def test_an_owner_is_stored_until_it_leaves(empty_tables: AsyncEngine) -> None:
    async with Ownership.taken(empty_tables, NEVER, "10.0.0.1:7778") as ownership:
        assert await read_owners(empty_tables) == [ownership.owner]
        assert ownership.owner.address == "10.0.0.1:7778"
        assert ownership.owner.pid == os.getpid()
    assert await read_owners(empty_tables) == []


async def test_an_owner_beats(empty_tables: AsyncEngine) -> None:
    async with Ownership.taken(empty_tables, BEAT) as ownership:
        await until_beats(empty_tables, ownership.owner, 3)


async def test_beats_do_not_wait_for_connections_that_are_all_in_use(empty_database: Settings) -> None:
    async with open_database(empty_database) as database, open_database(empty_database) as other:
        async with Ownership.taken(database, BEAT) as ownership, AsyncExitStack() as stack:
            await until_beats(other, ownership.owner, 1)
            for _ in range(14):
                await stack.enter_async_context(database.connect())
            await until_beats(other, ownership.owner, 5 + await beats_of(other, ownership.owner))


async def test_an_owner_that_was_removed_is_told(empty_tables: AsyncEngine, caplog: pytest.LogCaptureFixture) -> None:
    async with watching(empty_tables, BEAT) as first:
        await write_owner(empty_tables, id="other")
        await remove_owner(empty_tables, first.owner.id)
        async with asyncio.timeout(PATIENCE):
            await first.lost.wait()
    assert "another process has taken over from this one" in caplog.text
    assert await ids(empty_tables) == ["other"], "it must not remove the other one"


async def test_a_process_that_stands_still_before_it_runs_replies_enters_again(empty_tables: AsyncEngine) -> None:
    async with Ownership.taken(empty_tables, BEAT) as ownership:
        await until_beats(empty_tables, ownership.owner, 1)
        await remove_owner(empty_tables, ownership.owner.id)
        async with asyncio.timeout(PATIENCE):
            while await ids(empty_tables) != [ownership.owner.id]:
                pass
        assert not ownership.lost.is_set()


async def test_a_process_enters_again_before_it_runs_replies(empty_tables: AsyncEngine) -> None:
    async with Ownership.taken(empty_tables, NEVER) as ownership:
        await remove_owner(empty_tables, ownership.owner.id)
        store = Conversations(empty_tables, ownership.owner.id)
        async with ownership.watched(store, untold):
            assert await read_owners(empty_tables) == [ownership.owner._replace(beats=1)]
            await begin_reply(empty_tables, ownership.owner.id)


async def test_replies_of_earlier_processes_fail_before_new_ones_begin(
    empty_tables: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    id, failures = await begin_reply(empty_tables, ""), Failures()
    async with watching(empty_tables, NEVER, failures.note):
        found = await find(empty_tables, id)
        assert (found.content, found.status, found.reason) == ("half", Status.FAILED, "server_error")
        assert failures.get_nowait() == ("ann", "conv_1")
    assert "1 replies were cut off when their server ended; their text so far is kept" in caplog.text


@pytest.mark.parametrize("machine", ["same", "another"])
async def test_only_a_process_of_this_machine_has_certainly_ended(machine: str) -> None:
    owner = Owner.of_this_process()
    assert not owner.has_ended
    here = owner.machine if machine == "same" else owner.machine.replace(owner.machine.split()[1], "another-boot")
    assert owner._replace(pid=ended_process(), machine=here).has_ended == (machine == "same")


# SQLite, which has one owner


async def test_a_second_process_is_refused_while_the_first_one_beats(sqlite: AsyncEngine) -> None:
    async with Ownership.taken(sqlite, BEAT) as first:
        with pytest.raises(
            DatabaseInUseError, match=f"another Parley uses this database, process {first.owner.pid} on"
        ):
            async with Ownership.taken(sqlite, LONG):
                pass
        assert not first.lost.is_set()


async def test_an_owner_that_has_ended_is_replaced_at_once(sqlite: AsyncEngine) -> None:
    await write_owner(sqlite, pid=ended_process())
    async with asyncio.timeout(PATIENCE), Ownership.taken(sqlite, NEVER) as ownership:
        assert await read_owners(sqlite) == [ownership.owner]


async def test_an_owner_that_no_longer_beats_is_replaced(sqlite: AsyncEngine) -> None:
    await write_owner(sqlite, machine="elsewhere", pid=ended_process())
    async with Ownership.taken(sqlite, BEAT) as ownership:
        assert await ids(sqlite) == [ownership.owner.id]


async def test_an_owner_that_leaves_meanwhile_is_followed(
    sqlite: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        async with Ownership.taken(sqlite, NEVER):
            entering = asyncio.create_task(stack.enter_async_context(Ownership.taken(sqlite, BEAT)))
            while "waiting to see whether it still runs" not in caplog.text:  # noqa: ASYNC110  # a log has no event
                await asyncio.sleep(0)
        next_one = await entering
        assert await ids(sqlite) == [next_one.owner.id]


async def test_a_process_that_was_followed_before_it_runs_replies_is_refused(sqlite: AsyncEngine) -> None:
    async with Ownership.taken(sqlite, NEVER) as ownership:
        await remove_owner(sqlite, ownership.owner.id)
        other = await write_owner(sqlite)
        with pytest.raises(DatabaseInUseError):
            async with ownership.watched(Conversations(sqlite, ownership.owner.id), untold):
                pass
    assert await read_owners(sqlite) == [other]


@pytest.mark.parametrize("earlier", [False, True], ids=["first start", "after a crash"])
async def test_of_two_processes_that_start_together_one_is_refused(sqlite: AsyncEngine, earlier: bool) -> None:
    if earlier:
        await write_owner(sqlite, pid=ended_process())
    finished = asyncio.Event()

    async def run() -> None:
        async with Ownership.taken(sqlite, LONG):
            await finished.wait()

    owners = {asyncio.create_task(run()), asyncio.create_task(run())}
    async with asyncio.timeout(PATIENCE):
        refused, running = await asyncio.wait(owners, return_when=asyncio.FIRST_COMPLETED)
    assert [type(owner.exception()) for owner in refused] == [DatabaseInUseError]
    finished.set()
    await asyncio.gather(*running)


# PostgreSQL, which has several


async def test_several_processes_own_a_shared_database_at_once(shared: AsyncEngine) -> None:
    await write_owner(shared, id="a", machine="elsewhere")
    async with Ownership.taken(shared, NEVER) as first, Ownership.taken(shared, NEVER, "b:1") as second:
        assert {*await ids(shared)} == {"a", first.owner.id, second.owner.id}
        await begin_reply(shared, first.owner.id, "conv_1")
        await begin_reply(shared, second.owner.id, "conv_2")
    assert await ids(shared) == ["a"]


async def test_the_replies_of_an_owner_that_has_ended_fail_at_once(shared: AsyncEngine) -> None:
    ended = await write_owner(shared, pid=ended_process())
    id = await begin_reply(shared, ended.id)
    async with watching(shared, NEVER) as ownership:
        assert (await find(shared, id)).status is Status.FAILED
        assert await ids(shared) == [ownership.owner.id]


async def test_the_replies_of_an_owner_that_no_longer_beats_fail(shared: AsyncEngine) -> None:
    silent, failures = await write_owner(shared, machine="elsewhere"), Failures()
    id = await begin_reply(shared, silent.id)
    async with watching(shared, BEAT, failures.note) as ownership:
        assert await failures.next() == ("ann", "conv_1")
        found = await find(shared, id)
        assert (found.content, found.status, found.reason) == ("half", Status.FAILED, "server_error")
        assert await ids(shared) == [ownership.owner.id]


async def test_an_owner_that_beats_is_not_removed_and_its_replies_go_on(shared: AsyncEngine) -> None:
    async with Ownership.taken(shared, BEAT) as other:
        id = await begin_reply(shared, other.owner.id)
        async with watching(shared, 10 * BEAT) as ownership:
            await until_beats(shared, ownership.owner, 6)  # it looks as often as it beats
        assert not other.lost.is_set()
        assert (await find(shared, id)).status is Status.IN_PROGRESS


async def test_an_owner_that_has_missed_some_beats_goes_on(shared: AsyncEngine) -> None:
    other = await write_owner(shared, machine="elsewhere")
    ownership, store = Ownership(shared), Conversations(shared)
    missed = dict[Owner, int]()
    for _ in range(6):
        async with shared.begin() as connection:
            await connection.execute(update(owners_table).values(beats=OWNER.beats + 1))
        for looks in range(3):
            missed = await ownership._look(missed, store, untold)
            assert [*missed.values()] == [looks]
    assert await ids(shared) == [other.id]
    await ownership._look(missed, store, untold)
    assert await ids(shared) == []


async def test_each_owner_removes_others_only_once_they_are_silent(shared: AsyncEngine) -> None:
    silent = [await write_owner(shared, machine=f"host-{number}") for number in range(5)]
    for number, owner in enumerate(silent):
        await begin_reply(shared, owner.id, f"conv_{number}")
    failures = Failures()
    async with watching(shared, BEAT, failures.note), watching(shared, BEAT, failures.note):
        told = [await failures.next() for _ in silent]
    assert sorted(told) == [("ann", f"conv_{number}") for number in range(5)], "each one once"
    assert failures.empty()


async def test_a_reply_in_a_locked_conversation_fails_later_and_holds_up_no_other(shared: AsyncEngine) -> None:
    store = await owned_store(shared, "me")
    for number in (1, 2):
        await begin_reply(shared, "", f"conv_{number}")
    async with shared.connect() as frozen:
        await frozen.execute(select(conversations_table).where(conversations_table.c.id == "conv_1").with_for_update())
        assert await store.fail_unfinished() == [("ann", "conv_2")]
    assert await store.fail_unfinished() == [("ann", "conv_1")]


async def write_after_a_stop(url: str, pipe: Connection) -> None:
    """Begin a reply, and write more when told. Sends the id of the owner, what becomes of each write, and its end."""
    async with open_database(Settings(database_url=url)) as database, watching(database, LONG) as ownership:
        store = Conversations(database, ownership.owner.id)
        await begin(store, "conv_1", QUESTION, growing("resp_1", "half"))
        pipe.send(ownership.owner.id)
        await asyncio.to_thread(pipe.recv)
        for write in (
            store.update_replies([reply("resp_1", "too late")]),
            store.update("ann", "conv_1", "Too late"),
            begin(store, "conv_2", growing("resp_2")),
            store.delete("ann", "conv_1"),
        ):
            try:
                await write
                pipe.send("written")
            except DatabaseUnavailableError:
                pipe.send("refused")
        await ownership.lost.wait()
        pipe.send("lost")


def run_write_after_a_stop(url: str, pipe: Connection) -> None:
    asyncio.run(write_after_a_stop(url, pipe))


async def test_a_process_that_stood_still_writes_nothing_when_it_goes_on(
    shared: AsyncEngine, empty_postgresql: str
) -> None:
    ours, theirs = processes.Pipe()
    process, failures = fork(run_write_after_a_stop, empty_postgresql, theirs), Failures()
    assert process.pid
    try:
        owner = await receive(ours)
        assert await ids(shared) == [owner]
        os.kill(process.pid, signal.SIGSTOP)
        async with watching(shared, BEAT, failures.note) as ownership:
            assert await failures.next() == ("ann", "conv_1")
            before = await Conversations(shared).find("ann", "conv_1")
            os.kill(process.pid, signal.SIGCONT)
            ours.send("go on")
            assert [await receive(ours) for _ in range(5)] == ["refused"] * 4 + ["lost"]
            assert await ids(shared) == [ownership.owner.id]
        found = await find(shared, "resp_1")
        assert (found.content, found.status) == ("half", Status.FAILED)
        assert await Conversations(shared).find("ann", "conv_1") == before
        assert not (await Conversations(shared).path("ann", "conv_2")).exists
    finally:
        process.kill()
        process.join()


async def receive(pipe: Connection) -> Any:
    """The next thing that another process sends."""
    assert await asyncio.to_thread(pipe.poll, PATIENCE), "it sends nothing"
    return pipe.recv()
