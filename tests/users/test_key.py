"""The key that secrets are hashed with: where it comes from, and which one belongs to a database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect
from sqlalchemy.ext.asyncio import AsyncEngine

from models.errors import UsersError
from models.settings import Settings
from models.store.database import key_fingerprint_table, open_database
from models.store.ownership import Ownership
from models.users.users import Users
from tests.support.owners import write_owner

pytestmark = pytest.mark.anyio

KEY, OTHER_KEY = "k" * 32, "another key, which is long enough"
BEAT = 0.02  # seconds
REFUSED = "belong to another key: set PARLEY_KEY to the same value on all hosts, or copy the file data/key"


@pytest.fixture
def settings(empty_database: Settings) -> Settings:
    """An empty database of either kind, and a key."""
    return replace(empty_database, key=KEY)


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[tuple[Users, AsyncEngine]]:
    async with open_database(settings) as database:
        yield Users.open(settings, database), database


async def check(settings: Settings) -> None:
    """Check the key as a server does that starts."""
    async with opened(settings) as (users, database):
        await users.check_key(Ownership(database, BEAT))


async def add(settings: Settings, user: str) -> str:
    """Add a user, as the command does. Returns the secret."""
    async with opened(settings) as (users, database):
        await users.check_key(Ownership(database, BEAT))
        return await users.create(user)


def moved(settings: Settings, folder: Path, **changes: Any) -> Settings:
    """The settings of another host, which has the same database."""
    url = settings.database_url or f"sqlite:///{settings.data / 'parley.db'}"
    return replace(settings, data=folder, database_url=url, **changes)


async def test_hosts_with_one_key_know_the_same_secrets_and_sessions(settings: Settings, tmp_path: Path) -> None:
    secret = await add(settings, "ann")
    async with opened(settings) as (first, _), opened(moved(settings, tmp_path / "other")) as (second, database):
        await second.check_key(Ownership(database, BEAT))
        ann = await second.find(secret)
        assert ann
        assert first.session(second.session_token(await first.find(secret) or ann))
    assert not (settings.data / "key").exists()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("key", [OTHER_KEY, KEY + "k", None], ids=["another", "a longer one", "that of a file"])
async def test_a_host_with_another_key_is_refused(settings: Settings, tmp_path: Path, key: str | None) -> None:
    await add(settings, "ann")
    with pytest.raises(UsersError, match=REFUSED):
        await check(moved(settings, tmp_path / "other", key=key))
    await check(settings)


async def test_a_copied_key_file_is_accepted(empty_database: Settings, tmp_path: Path) -> None:
    secret = await add(empty_database, "ann")
    other = moved(empty_database, tmp_path / "other")
    with pytest.raises(UsersError, match=REFUSED):
        await check(other)
    (other.data / "key").write_bytes((empty_database.data / "key").read_bytes())
    async with opened(other) as (users, database):
        await users.check_key(Ownership(database, BEAT))
        assert await users.find(secret)


async def test_a_database_without_a_fingerprint_takes_the_first_key(settings: Settings) -> None:
    await add(settings, "ann")
    async with open_database(settings) as database, database.begin() as connection:
        await connection.execute(key_fingerprint_table.delete())
    await check(settings)
    with pytest.raises(UsersError, match=REFUSED):
        await check(replace(settings, key=OTHER_KEY))


async def test_after_a_lost_key_the_users_can_be_removed_and_added_again(settings: Settings) -> None:
    await add(settings, "ann")
    renewed = replace(settings, key=OTHER_KEY)
    with pytest.raises(UsersError, match=REFUSED):
        await add(renewed, "bob")
    async with opened(renewed) as (users, _):
        await users.remove("ann")
    secret = await add(renewed, "ann")
    async with opened(renewed) as (users, _):
        assert await users.find(secret)
    with pytest.raises(UsersError, match=REFUSED):
        await check(settings)


async def test_the_key_is_not_replaced_while_another_process_runs(settings: Settings) -> None:
    renewed = replace(settings, key=OTHER_KEY)
    await check(settings)
    async with open_database(settings) as database, Ownership.taken(database, BEAT):
        async with opened(renewed) as (users, own):
            with pytest.raises(UsersError, match=REFUSED):
                await users.check_key(Ownership(own, 0.5))
    await check(settings)


async def test_the_key_is_replaced_after_a_process_that_does_not_run_any_more(settings: Settings) -> None:
    await check(settings)
    async with open_database(settings) as database:
        await write_owner(database, machine="elsewhere")
    await check(replace(settings, key=OTHER_KEY))
    await check(replace(settings, key=OTHER_KEY))


@pytest.mark.postgresql
async def test_of_hosts_that_start_together_with_two_keys_no_two_go_on_with_different_ones(
    empty_postgresql: str, tmp_path: Path
) -> None:
    started = list[str]()
    checked = asyncio.Barrier(4)

    async def start(key: str) -> None:
        settings = Settings(data=tmp_path, database_url=empty_postgresql, key=key)
        async with opened(settings) as (users, database), Ownership.taken(database, BEAT) as ownership:
            with suppress(UsersError):
                await users.check_key(ownership)
                started.append(key)
            await checked.wait()

    await asyncio.gather(*(start(key) for key in [KEY, OTHER_KEY] * 2))
    assert len(started) == 2
    assert len({*started}) == 1


async def test_the_database_does_not_have_the_key(settings: Settings) -> None:
    secret = await add(settings, "ann")
    async with opened(settings) as (users, database):
        async with database.connect() as connection:
            tables = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
            dump = [row for name in tables for row in await connection.exec_driver_sql(f"SELECT * FROM {name}")]
        values = b"|".join(value if isinstance(value, bytes) else str(value).encode() for row in dump for value in row)
        assert b"ann" in values
        for hidden in (KEY.encode(), users._key, users._key.hex().encode(), secret.encode()):
            assert hidden not in values


async def test_hosts_with_one_key_have_one_key_for_another_purpose(tmp_path: Path) -> None:
    def derived(key: str, purpose: bytes) -> bytes:
        return Users.open(Settings(data=tmp_path, key=key), None).key_for(purpose)  # type: ignore[arg-type]

    assert derived("a" * 32, b"hosts") == derived("a" * 32, b"hosts")
    assert len({derived("a" * 32, b"hosts"), derived("b" * 32, b"hosts"), derived("a" * 32, b"other")}) == 3
