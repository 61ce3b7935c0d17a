from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, inspect
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from models import database
from models.conversations import Conversations
from models.database import DatabaseError, DataFolderError, conversations_table, items_table, users_table
from models.item import Item
from models.settings import Settings
from models.users import User, Users

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.databases"]

ALL_VERSIONS = list(range(1, len(database.MIGRATIONS) + 1))

RELEASED_FIRST = "CREATE TABLE users (id VARCHAR(64) PRIMARY KEY, digest {} NOT NULL UNIQUE)"


async def rows(engine: AsyncEngine, query: str) -> Sequence[Any]:
    async with engine.connect() as connection:
        return (await connection.exec_driver_sql(query)).all()


async def versions(engine: AsyncEngine) -> list[int]:
    return [number for (number,) in await rows(engine, "SELECT number FROM version ORDER BY number")]


def described(connection: Connection) -> dict[str, Any]:
    """Each table with its columns, indexes and constraints."""
    inspector = inspect(connection)
    return {
        name: (
            [(column["name"], column["nullable"]) for column in inspector.get_columns(name)],
            inspector.get_pk_constraint(name)["constrained_columns"],
            sorted(str(index["name"]) for index in inspector.get_indexes(name)),
            [constraint["column_names"] for constraint in inspector.get_unique_constraints(name)],
        )
        for name in inspector.get_table_names()
    }


async def schema(engine: AsyncEngine) -> dict[str, Any]:
    async with engine.connect() as connection:
        return await connection.run_sync(described)


@pytest.fixture
async def other_program(empty_database: Settings) -> AsyncIterator[AsyncEngine]:
    """The empty database as something else than Parley opens it."""
    url = f"sqlite:///{empty_database.data / 'parley.db'}"
    if empty_database.database_url is None:
        empty_database.data.mkdir()
    else:
        url = empty_database.database_url
    engine = create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:").replace("sql:", "sql+asyncpg:"))
    yield engine
    await engine.dispose()


@pytest.fixture
async def first_release(other_program: AsyncEngine) -> AsyncEngine:
    """The database as the first release left it: with one user, and no version."""
    async with other_program.begin() as connection:
        blob = "BLOB" if connection.dialect.name == "sqlite" else "BYTEA"
        await connection.exec_driver_sql(RELEASED_FIRST.format(blob))
        await connection.execute(users_table.insert().values(id="ann", digest=b"\x00\xff" * 16))
    return other_program


async def said(engine: AsyncEngine) -> str:
    """Add a conversation and return what of it is found again."""
    store = Conversations(engine)
    await store.add("ann", "conv_1", 0, [Item("item_1", "user", "Hello", 1.0)])
    return (await store.items("ann", "conv_1"))[0].content


async def test_an_empty_database_is_made_ready(empty_database: Settings) -> None:
    async with database.opened(empty_database) as engine:
        assert await versions(engine) == ALL_VERSIONS
        assert await said(engine) == "Hello"


async def test_opening_again_changes_nothing(empty_database: Settings) -> None:
    async with database.opened(empty_database) as engine:
        await said(engine)
        before = await schema(engine)
    async with database.opened(empty_database) as engine:
        assert await schema(engine) == before
        assert await versions(engine) == ALL_VERSIONS
        assert [one.content for one in await Conversations(engine).items("ann", "conv_1")] == ["Hello"]


async def test_a_database_of_the_first_release_keeps_its_users_and_gets_all_that_came_after(
    empty_database: Settings, first_release: AsyncEngine
) -> None:
    async with database.opened(empty_database) as engine:
        assert await versions(engine) == ALL_VERSIONS
        assert await Users(engine, b"key", {}).all() == [User("ann", b"\x00\xff" * 16)]
        assert await said(engine) == "Hello"


async def test_the_tables_of_a_database_brought_up_to_date_are_those_of_a_new_one(
    empty_database: Settings, first_release: AsyncEngine
) -> None:
    async with database.opened(empty_database) as engine:
        updated = await schema(engine)
        async with engine.begin() as connection:
            for table in updated:
                await connection.exec_driver_sql(f"DROP TABLE {table}")
    async with database.opened(empty_database) as engine:
        assert await schema(engine) == updated


async def test_the_tables_have_the_columns_that_the_code_knows_and_no_others(empty_database: Settings) -> None:
    async with database.opened(empty_database) as engine:
        there = await schema(engine)
    known = {
        table.name: [column.name for column in table.columns]
        for table in (users_table, conversations_table, items_table)
    }
    assert {name: [column for column, _ in there[name][0]] for name in there} == known | {"version": ["number"]}


async def test_a_database_of_a_newer_version_is_refused_and_left_alone(
    empty_database: Settings, other_program: AsyncEngine
) -> None:
    newer = len(database.MIGRATIONS) + 1
    async with database.opened(empty_database) as engine:
        async with engine.begin() as connection:
            await connection.exec_driver_sql(f"INSERT INTO version VALUES ({newer})")
    before = await schema(other_program)
    with pytest.raises(DatabaseError, match=rf"of a newer Parley \(version {newer}\): use that one, or its backup"):
        async with database.opened(empty_database):
            pass
    assert await schema(other_program) == before
    assert await versions(other_program) == [*ALL_VERSIONS, newer]


async def test_a_migration_that_fails_halfway_leaves_all_as_it_was(
    empty_database: Settings, first_release: AsyncEngine
) -> None:
    async with first_release.begin() as connection:
        await connection.exec_driver_sql("CREATE TABLE items (mine INTEGER)")  # so this table cannot be made
    before = await schema(first_release)
    with pytest.raises(DatabaseError, match="items"):
        async with database.opened(empty_database):
            pass
    assert await schema(first_release) == before
    assert set(before) == {"items", "users"}
    async with first_release.begin() as connection:
        await connection.exec_driver_sql("DROP TABLE items")
    async with database.opened(empty_database) as engine:
        assert await versions(engine) == ALL_VERSIONS
        assert [user.id for user in await Users(engine, b"key", {}).all()] == ["ann"]


async def opened_at_once(settings: Settings) -> list[list[int]]:
    """The versions that each of some sees that open a database at the same time."""

    async def open_once() -> list[int]:
        async with database.opened(settings) as engine:
            return await versions(engine)

    return await asyncio.gather(*(open_once() for _ in range(8)))


async def test_of_several_that_open_an_empty_database_at_once_one_makes_it_ready(empty_database: Settings) -> None:
    assert await opened_at_once(empty_database) == [ALL_VERSIONS] * 8


async def test_all_succeed_that_open_a_new_file_at_once_whoever_comes_first(tmp_path: Path) -> None:
    for place in range(20):  # each time others come first
        assert await opened_at_once(Settings(data=tmp_path / str(place))) == [ALL_VERSIONS] * 8


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("\0", "\ufffd"),
        ("a\0\0b\0", "a\ufffd\ufffdb\ufffd"),
        ("", ""),
        ("👩\u200d👩\u200d👧 广州 \U0010ffff\u0001\ufeff", "👩\u200d👩\u200d👧 广州 \U0010ffff\u0001\ufeff"),
    ],
    ids=["nul", "nuls among letters", "nothing", "anything else"],
)
async def test_text_is_stored_as_it_is_but_for_a_mark_in_place_of_nul(
    empty_database: Settings, text: str, stored: str
) -> None:
    async with database.opened(empty_database) as engine:
        async with engine.begin() as connection:
            values = {"id": "conv_1", "user_id": "ann", "title": text, "created": 1.5, "updated": 2.5}
            await connection.execute(conversations_table.insert().values(values))
            inside = (await connection.execute(conversations_table.select())).all()
    assert [tuple(row) for row in inside] == [("conv_1", "ann", stored, 1.5, 2.5)]


async def test_the_data_folder_is_its_owners_only(tmp_path: Path) -> None:
    async with database.opened(Settings(data=tmp_path / "some" / "data")):
        pass
    assert (tmp_path / "some" / "data").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg", "postgresql+psycopg2"])
async def test_every_spelling_of_postgresql_opens_it(empty_postgresql: str, scheme: str) -> None:
    url = empty_postgresql.replace("postgresql", scheme, 1)
    async with database.opened(Settings(database_url=url)) as engine:
        assert await rows(engine, "SELECT current_user") == [("postgres",)]


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+aiosqlite", "sqlite+pysqlite"])
async def test_every_spelling_of_sqlite_opens_it(tmp_path: Path, scheme: str) -> None:
    async with database.opened(Settings(database_url=f"{scheme}:///{tmp_path / 'named.db'}")) as engine:
        assert await versions(engine) == ALL_VERSIONS
    assert (tmp_path / "named.db").read_bytes().startswith(b"SQLite format 3")


async def test_a_url_stands_in_place_of_the_data_folder(empty_postgresql: str, tmp_path: Path) -> None:
    async with database.opened(Settings(data=tmp_path / "data", database_url=empty_postgresql)):
        assert not (tmp_path / "data").exists()


# What cannot be used


@pytest.fixture
async def threads_end() -> AsyncIterator[None]:
    """aiosqlite does not wait for the thread of a connection that it could not open; the event loop must."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        await asyncio.to_thread(thread.join)


async def trouble(settings: Settings) -> str:
    """What opening says that cannot be done."""
    with pytest.raises(DatabaseError) as raised:
        async with database.opened(settings):
            pass
    return str(raised.value)


async def test_a_file_that_is_no_database_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "parley.db").write_bytes(b"not a database, but long enough to be taken for one" * 100)
    message = await trouble(Settings(data=tmp_path))
    assert f"{tmp_path / 'parley.db'} cannot be used: " in message
    assert "file is not a database" in message
    assert "mend or restore it, or move it away" in message


@pytest.mark.usefixtures("threads_end")
async def test_a_folder_in_place_of_the_database_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "parley.db").mkdir()
    assert f"{tmp_path / 'parley.db'} cannot be used: " in await trouble(Settings(data=tmp_path))


@pytest.mark.usefixtures("threads_end")
async def test_a_named_file_in_a_folder_that_is_not_there_is_told_by_name(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'nowhere' / 'parley.db'}"
    assert f"{tmp_path / 'nowhere' / 'parley.db'} cannot be used: " in await trouble(Settings(database_url=url))


@pytest.mark.parametrize("data", ["file", "file/data"])
async def test_a_data_folder_that_cannot_be_made_is_told_by_name(tmp_path: Path, data: str) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    with pytest.raises(DataFolderError, match=f"PARLEY_DATA={tmp_path / data} cannot be used: .* can be written"):
        async with database.opened(Settings(data=tmp_path / data)):
            pass


async def test_a_database_that_can_only_be_read_is_told_by_name(tmp_path: Path) -> None:
    url = f"sqlite:///file:{tmp_path / 'parley.db'}?mode=ro&uri=true"
    async with database.opened(Settings(data=tmp_path)) as engine:
        async with engine.begin() as connection:
            await connection.exec_driver_sql("DELETE FROM version")
    assert f"{tmp_path / 'parley.db'}" in await trouble(Settings(database_url=url))


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("@/parley?host={folder}", "parley"),
        ("@127.0.0.1:1/parley", "127.0.0.1:1/parley"),
        ("@127.0.0.1:1/parley?sslmode=require", "127.0.0.1:1/parley"),
        ("@127.0.0.1:1/parley?no_such=argument", "127.0.0.1:1/parley"),
        ("@127.0.0.1:1/parley?password=hunter2", "127.0.0.1:1/parley"),
        ("@nowhere.invalid/parley", "nowhere.invalid/parley"),
    ],
)
async def test_a_postgresql_that_does_not_answer_is_told_without_the_password(
    tmp_path: Path, place: str, shown: str
) -> None:
    message = await trouble(Settings(database_url=f"postgresql://ann:hunter2{place.format(folder=tmp_path)}"))
    assert "the database postgresql+asyncpg://ann:***@" in message
    assert shown in message
    assert "cannot be used: " in message
    assert "hunter2" not in message


@pytest.mark.parametrize("place", ["@127.0.0.1:port/parley", "@127.0.0.1:99999/parley", "/parley", "@a:1,b:2/parley"])
async def test_a_url_that_cannot_be_read_is_told_without_the_password(place: str) -> None:
    assert "hunter2" not in await trouble(Settings(database_url=f"postgresql://ann:hunter2{place}"))


async def test_tls_may_be_asked_for_as_most_do(empty_postgresql: str) -> None:
    async with database.opened(Settings(database_url=f"{empty_postgresql}&sslmode=disable")) as engine:
        assert await versions(engine) == ALL_VERSIONS

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readexactly(8))
        writer.write(b"N")
        writer.close()

    asked = list[bytes]()
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"postgresql://ann:hunter2@127.0.0.1:{port}/parley?sslmode=require"
        assert "rejected SSL upgrade" in await trouble(Settings(database_url=url))
    assert asked == [b"\x00\x00\x00\x08\x04\xd2\x16\x2f"]  # PostgreSQL's SSLRequest


@pytest.fixture
async def guarded(empty_postgresql: str) -> Settings:
    """A database for somebody who needs a password, and has the right one."""
    async with database.opened(Settings(database_url=empty_postgresql)) as engine:
        async with engine.begin() as connection:
            await connection.exec_driver_sql("DROP ROLE IF EXISTS guarded")
            await connection.exec_driver_sql("CREATE ROLE guarded SUPERUSER LOGIN PASSWORD 'correct-horse'")
    return Settings(database_url=empty_postgresql.replace("postgres@", "guarded:correct-horse@"))


async def test_the_right_password_opens_the_database(guarded: Settings) -> None:
    async with database.opened(guarded) as engine:
        assert await rows(engine, "SELECT current_user") == [("guarded",)]


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        ("correct-horse", "hunter2", "password authentication failed"),
        ("@/test_", "@/other_", "does not exist"),
        ("guarded:", "nobody:", 'role "nobody" does not exist'),
    ],
)
async def test_what_postgresql_does_not_know_is_told_without_the_password(
    guarded: Settings, right: str, wrong: str, reason: str
) -> None:
    assert guarded.database_url
    message = await trouble(replace(guarded, database_url=guarded.database_url.replace(right, wrong)))
    assert "the database postgresql+asyncpg://" in message
    assert reason in message
    assert "correct-horse" not in message
    assert "hunter2" not in message


async def test_a_server_that_is_no_postgresql_is_told_by_name() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        message = await trouble(Settings(database_url=f"postgresql://ann:hunter2@127.0.0.1:{port}/parley"))
    assert f"127.0.0.1:{port}/parley cannot be used: " in message
    assert "hunter2" not in message
