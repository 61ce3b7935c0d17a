from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from models.settings import Settings
from models.store.database import Database, ended_sessions_table, open_database
from models.users.sessions import ENDED_PER_USER, Session, Sessions

pytestmark = pytest.mark.anyio

KEY = b"k" * 32


class BreakableDatabase:
    """A database that cannot be written while `broken` is True."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.broken = False

    def begin(self) -> Any:
        if self.broken:
            raise OSError("no space left on device")
        return self.database.begin()


@pytest.fixture
async def database(empty_database: Settings) -> AsyncIterator[BreakableDatabase]:
    async with open_database(empty_database) as database:
        yield BreakableDatabase(database)


@pytest.fixture
def here(database: BreakableDatabase) -> Sessions:
    """The sessions of this process."""
    return Sessions(KEY, database)  # type: ignore[arg-type]


@pytest.fixture
def elsewhere(database: BreakableDatabase) -> Sessions:
    """The sessions of another process."""
    return Sessions(KEY, database.database)


async def refresh(sessions: Sessions, database: BreakableDatabase) -> list[Session]:
    """Read the ended sessions, as the users are read; returns the new ones."""
    async with database.database.connect() as connection:
        return sessions.learn(await sessions.fetch_ended(connection))


async def end(sessions: Sessions, session: Session) -> None:
    """End a session, and store that."""
    sessions.end(session)
    await sessions.save()


async def stored(database: BreakableDatabase) -> set[str]:
    async with database.database.connect() as connection:
        return {row.id for row in await connection.execute(ended_sessions_table.select())}


def new_session(sessions: Sessions, user: str = "ann") -> tuple[str, Session]:
    """A token and its session."""
    token = sessions.token(user, "fingerprint")
    found = sessions.read(token)
    assert found
    return token, found[0]


async def test_a_token_holds_its_session(here: Sessions) -> None:
    token = here.token("ann", "fingerprint")
    found = here.read(token)
    assert found
    session, fingerprint = found
    assert (session.user_id, fingerprint) == ("ann", "fingerprint")
    assert session.expires > time.time()
    assert new_session(here)[1].id != session.id


async def test_an_ended_session_is_refused_at_once_and_others_are_not(here: Sessions) -> None:
    (ended, session), (other, _) = new_session(here), new_session(here)
    await end(here, session)
    assert here.read(ended) is None
    assert here.read(other)


async def test_another_process_learns_of_an_ended_session(
    here: Sessions, elsewhere: Sessions, database: BreakableDatabase
) -> None:
    token, session = new_session(here)
    await end(here, session)
    assert elsewhere.read(token)
    assert await refresh(elsewhere, database) == [session]
    assert elsewhere.read(token) is None
    assert await refresh(elsewhere, database) == []
    assert await refresh(here, database) == []
    assert here.read(token) is None


async def test_a_read_from_before_the_end_brings_no_session_back(here: Sessions, database: BreakableDatabase) -> None:
    token, session = new_session(here)
    async with database.database.connect() as connection:
        early = await here.fetch_ended(connection)
    await end(here, session)
    here.learn(early)
    assert here.read(token) is None


async def test_a_logout_that_cannot_be_stored_is_tried_again(
    here: Sessions, database: BreakableDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    token, session = new_session(here)
    database.broken = True
    await end(here, session)
    await here.save()
    assert here.read(token) is None
    assert await stored(database) == set()
    assert caplog.messages == ["a logout cannot be stored, and is tried again: OSError: no space left on device"]
    database.broken = False
    await here.save()
    assert await stored(database) == {session.id}


async def test_logouts_at_once_are_all_stored(here: Sessions, database: BreakableDatabase) -> None:
    ended = [new_session(here)[1] for _ in range(20)]
    await asyncio.gather(*(end(here, session) for session in ended))
    assert await stored(database) == {session.id for session in ended}


async def test_a_session_can_be_ended_in_two_processes(
    here: Sessions, elsewhere: Sessions, database: BreakableDatabase
) -> None:
    _, session = new_session(here)
    await end(here, session)
    await end(elsewhere, session)
    assert await stored(database) == {session.id}


async def test_expired_sessions_are_deleted(here: Sessions, database: BreakableDatabase) -> None:
    await end(here, Session("old", "ann", time.time() - 1))
    assert await refresh(here, database) == []
    await end(here, Session("new", "bob", time.time() + 60))
    assert await stored(database) == {"new"}


async def test_a_user_cannot_fill_the_table(here: Sessions, database: BreakableDatabase) -> None:
    async with database.database.begin() as connection:
        rows = [{"id": f"s{n}", "user_id": "ann", "expires": time.time() + 60 + n} for n in range(ENDED_PER_USER)]
        await connection.execute(ended_sessions_table.insert(), rows)
    await end(here, Session("bob's", "bob", time.time() + 1))
    await end(here, Session("last", "ann", time.time() + 10_000))
    assert len(await stored(database)) == ENDED_PER_USER + 2
    assert {"bob's", "last", "all:ann"} <= await stored(database)
    assert "s0" not in await stored(database)


async def test_a_session_that_ended_stays_ended_whatever_ends_after_it(
    here: Sessions, database: BreakableDatabase
) -> None:
    token, bobs = here.token("ann", "print"), here.token("bob", "print")
    session, _ = here.read(token) or pytest.fail("no session")
    await end(here, session)
    async with database.database.begin() as connection:
        rows = [{"id": f"s{n}", "user_id": "ann", "expires": session.expires + 1 + n} for n in range(ENDED_PER_USER)]
        await connection.execute(ended_sessions_table.insert(), rows)
    await end(here, Session("last", "ann", session.expires + 10_000))
    assert session.id not in await stored(database)
    later = Sessions(KEY, database)  # type: ignore[arg-type]
    async with database.database.connect() as connection:
        later.learn(await later.fetch_ended(connection))
    assert (later.read(token), bool(later.read(bobs))) == (None, True)


async def test_a_late_logout_of_an_old_session_brings_no_other_one_back(
    here: Sessions, database: BreakableDatabase
) -> None:
    async with database.database.begin() as connection:
        rows = [{"id": f"s{n}", "user_id": "ann", "expires": time.time() + 60 + n} for n in range(ENDED_PER_USER)]
        await connection.execute(ended_sessions_table.insert(), rows)
    await end(here, Session("last", "ann", time.time() + 10_000))
    async with database.database.connect() as connection:
        (before,) = [one for one in await here.fetch_ended(connection) if one.id == "all:ann"]
    await end(here, Session("older", "ann", time.time() + 10))
    async with database.database.connect() as connection:
        assert before in await here.fetch_ended(connection)
