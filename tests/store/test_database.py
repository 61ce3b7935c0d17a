from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, inspect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from models.errors import DatabaseError, DataFolderError
from models.output_item import OutputItem
from models.settings import Settings
from models.store import database
from models.store.conversations import Conversations, Listing
from models.store.database import (
    conversations_table,
    ended_sessions_table,
    items_table,
    key_fingerprint_table,
    open_database,
    owners_table,
    texts_table,
    users_table,
)
from models.store.item import Status
from models.users.users import User, Users
from tests.support.trees import contents, go_on, message, reply

pytestmark = pytest.mark.anyio

ALL_VERSIONS = list(range(1, len(database.MIGRATIONS) + 1))

FIRST_RELEASE = "CREATE TABLE users (id VARCHAR(64) PRIMARY KEY, digest {} NOT NULL UNIQUE)"


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


async def write_and_read(engine: AsyncEngine) -> str:
    """Add a conversation, and return the text that is read back."""
    store = Conversations(engine)
    conversation = await store.create("ann", [message("msg_1", "Hello")])
    return (await store.path("ann", conversation.id)).items[0].content


async def ids(engine: AsyncEngine) -> list[str]:
    """The ids of the conversation and its item that `write_and_read` has added."""
    return [*(await rows(engine, "SELECT conversation_id, id FROM items"))[0]]


async def open_error(settings: Settings) -> str:
    """The message of the error that opening raises."""
    with pytest.raises(DatabaseError) as raised:
        async with open_database(settings):
            pass
    return str(raised.value)


@pytest.fixture
async def other_program(empty_database: Settings) -> AsyncIterator[AsyncEngine]:
    """The empty database, opened without Parley's code."""
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
    """The database as the first release left it: with one user, and without a version."""
    async with other_program.begin() as connection:
        blob = "BLOB" if connection.dialect.name == "sqlite" else "BYTEA"
        await connection.exec_driver_sql(FIRST_RELEASE.format(blob))
        await connection.execute(users_table.insert().values(id="ann", digest=b"\x00\xff" * 16))
    return other_program


# Migrations


async def test_an_empty_database_gets_all_tables(empty_database: Settings) -> None:
    async with open_database(empty_database) as engine:
        assert await versions(engine) == ALL_VERSIONS
        assert await write_and_read(engine) == "Hello"


async def test_opening_a_database_again_changes_nothing(empty_database: Settings) -> None:
    async with open_database(empty_database) as engine:
        await write_and_read(engine)
        before = await schema(engine)
    async with open_database(empty_database) as engine:
        assert await schema(engine) == before
        assert await versions(engine) == ALL_VERSIONS
        assert (await Conversations(engine).find_item("ann", *await ids(engine))).content == "Hello"


async def test_an_update_from_the_first_release_keeps_the_users(
    empty_database: Settings, first_release: AsyncEngine
) -> None:
    async with open_database(empty_database) as engine:
        assert await versions(engine) == ALL_VERSIONS
        assert await Users(engine, b"key", {}).all() == [User("ann", b"\x00\xff" * 16)]
        assert await write_and_read(engine) == "Hello"


async def migrate(connection: AsyncConnection, first: int, last: int) -> None:
    """Run the migrations from one version to another, as the Parley of that time did."""
    await connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS version (number INTEGER NOT NULL)")
    for number in range(first, last + 1):
        for statement in database.MIGRATIONS[number - 1]:
            await connection.exec_driver_sql(statement)
        await connection.exec_driver_sql(f"INSERT INTO version VALUES ({number})")


async def test_an_update_keeps_the_conversations_of_an_earlier_release(
    empty_database: Settings, other_program: AsyncEngine
) -> None:
    options = '{"instructions": "Be brief.", "seed": 1}'
    async with other_program.begin() as connection:
        await migrate(connection, 1, 2)
        await connection.exec_driver_sql("INSERT INTO conversations VALUES ('conv_1', 'ann', 'Hello', 1.0, 2.0)")
        for id, position, content, status in (("item_1", 0, "Hello", "NULL"), ("resp_1", 1, "Hi", "'in_progress'")):
            await connection.exec_driver_sql(
                "INSERT INTO items (id, conversation_id, position, role, content, created, status, options, cuts) "
                f"VALUES ('{id}', 'conv_1', {position}, 'user', '{content}', 1.0, {status}, '{options}', '2')"
            )
    async with open_database(empty_database) as engine:
        question, answer = (await Conversations(engine).path("ann", "conv_1")).items
        assert (question.content, answer.content, answer.status) == ("Hello", "Hi", Status.FAILED)
        assert answer.options == {"instructions": "Be brief.", "seed": 1}
        assert (await rows(engine, "SELECT bytes FROM conversations")) == [(9,)]


# Conversations as the version before trees left them: linear, with the lengths of pieces beside the content.
LINEAR = """
    INSERT INTO conversations VALUES ('conv_1', 'ann', 'First', 1.0, 2.0, 99), ('conv_2', 'bob', 'Empty', 3.0, 4.0, 0);
    INSERT INTO instructions VALUES ('conv_1', 'id_1', 'Be brief.', 9);
    INSERT INTO items (id, conversation_id, position, role, content, created, status, reason, usage, options, left_out,
        cuts, decode_seconds, instructions, bytes, owner) VALUES
        ('resp_2', 'conv_1', 7, 'assistant', 'Second', 6.5, 'incomplete', 'max_output_tokens', '{"n": 2}',
            '{"seed": 7}', 1, '1 5', 0.5, 'id_1', 9, 'me'),
        ('item_1', 'conv_1', 0, 'system', 'Be kind.', 1.5, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 8, NULL),
        ('item_2', 'conv_1', 1, 'user', 'Was ist das? 广州 👩', 2.5, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
            NULL, 20, NULL),
        ('resp_1', 'conv_1', 2, 'assistant', 'É广州 👩s', 3.5, 'completed', 'stop', '{"n": 1}', '{}', 0,
            '1 2 1 1 1', 0.25, NULL, 17, 'me'),
        ('item_3', 'conv_1', 5, 'user', 'More', 5.5, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 4, NULL),
        ('resp_3', 'conv_1', 8, 'assistant', '', 7.5, 'cancelled', 'client_cancelled', '{}', '{}', 0, '', 0.0, NULL, 0,
            'me'),
        ('item_4', 'conv_2', 0, 'user', 'Hello', 8.5, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 5, NULL),
        ('resp_4', 'conv_2', 1, 'assistant', 'Half of', 9.5, 'in_progress', NULL, '{}', '{}', 0, '4 3', 0.1, NULL, 10,
            'me')
"""


@pytest.fixture
async def linear(empty_database: Settings, other_program: AsyncEngine) -> Settings:
    """A database of the version before trees, with conversations."""
    async with other_program.begin() as connection:
        await migrate(connection, 1, 4)
        for statement in LINEAR.split(";\n"):
            await connection.exec_driver_sql(statement)
    return empty_database


async def test_an_update_to_trees_keeps_each_message_in_its_place(linear: Settings) -> None:
    async with open_database(linear) as engine:
        store = Conversations(engine)
        conversation = await store.find("ann", "conv_1")
        assert (conversation.title, conversation.created, conversation.updated) == ("First", 1.0, 2.0)
        assert (conversation.leaf, conversation.metadata) == ("resp_3", {})
        items = (await store.path("ann", "conv_1")).items
        assert [(item.id, item.parent, item.role, item.created) for item in items] == [
            ("item_1", None, "system", 1.5),
            ("item_2", "item_1", "user", 2.5),
            ("resp_1", "item_2", "assistant", 3.5),
            ("item_3", "resp_1", "user", 5.5),
            ("resp_2", "item_3", "assistant", 6.5),
            ("resp_3", "resp_2", "assistant", 7.5),
        ]
        texts = ["Be kind.", "Was ist das? 广州 👩", "É广州 👩s", "More", "Second", ""]
        assert await contents(store, "conv_1") == texts
        assert await contents(store, "conv_2", "bob") == ["Hello", "Half of"]


async def test_an_update_to_trees_keeps_replies_as_they_were(linear: Settings) -> None:
    async with open_database(linear) as engine:
        store = Conversations(engine)
        first, second, third = [(await store.find_response("ann", f"resp_{number}")).item for number in (1, 2, 3)]
        assert first.output == [OutputItem("message", ["É", "广州", " ", "👩", "s"], complete=True)]
        assert second.output == [OutputItem("message", ["S", "econd"])]
        assert third.output == []
        assert second == replace(
            reply("resp_2"),
            content="Second",
            created=6.5,
            parent="item_3",
            status=Status.INCOMPLETE,
            reason="max_output_tokens",
            usage={"n": 2},
            options={"instructions": "Be brief.", "seed": 7},
            left_out=1,
            output=second.output,
            decode_seconds=0.5,
        )
        inputs = [[item.id for item in (await store.input_items_of("ann", f"resp_{n}", 9))[0]] for n in (1, 2, 3)]
        assert inputs == [["item_2", "item_1"], ["item_3"], []]
        assert await store.fail_unfinished() == [("bob", "conv_2")]
        assert (await store.find_response("bob", "resp_4")).item.output[0].pieces == ["Half", " of"]


async def test_an_updated_conversation_can_go_on(linear: Settings) -> None:
    async with open_database(linear) as engine:
        store = Conversations(engine)
        await go_on(store, "conv_1", message("msg_9", "And?"), reply("resp_9", "So."))
        assert (await contents(store, "conv_1"))[-4:] == ["Second", "", "And?", "So."]
        assert await store.list_page("ann", Listing(query="second")) == ([await store.find("ann", "conv_1")], False)
        await store.delete_response("ann", "resp_9")
        assert (await store.find("ann", "conv_1")).leaf == "resp_3"


async def test_an_updated_database_has_the_same_tables_as_a_new_one(
    empty_database: Settings, first_release: AsyncEngine
) -> None:
    async with open_database(empty_database) as engine:
        updated = await schema(engine)
        async with engine.begin() as connection:
            for table in updated:
                await connection.exec_driver_sql(f"DROP TABLE {table}")
    async with open_database(empty_database) as engine:
        assert await schema(engine) == updated


async def test_the_tables_have_exactly_the_columns_that_the_code_uses(empty_database: Settings) -> None:
    async with open_database(empty_database) as engine:
        present = await schema(engine)
    used = {
        table.name: [column.name for column in table.columns]
        for table in (
            users_table,
            ended_sessions_table,
            conversations_table,
            items_table,
            texts_table,
            owners_table,
            key_fingerprint_table,
        )
    }
    assert {name: [column for column, _ in present[name][0]] for name in present} == used | {"version": ["number"]}


async def test_a_newer_database_is_refused_and_not_changed(
    empty_database: Settings, other_program: AsyncEngine
) -> None:
    newer = len(database.MIGRATIONS) + 1
    async with open_database(empty_database) as engine:
        async with engine.begin() as connection:
            await connection.exec_driver_sql(f"INSERT INTO version VALUES ({newer})")
    before = await schema(other_program)
    message = await open_error(empty_database)
    assert message == f"a newer Parley made the database (version {newer}): use the newer Parley, or an older backup"
    assert await schema(other_program) == before
    assert await versions(other_program) == [*ALL_VERSIONS, newer]


async def test_a_migration_that_fails_changes_nothing(empty_database: Settings, first_release: AsyncEngine) -> None:
    async with first_release.begin() as connection:
        await connection.exec_driver_sql("CREATE TABLE items (mine INTEGER)")  # so Parley cannot make this table
    before = await schema(first_release)
    assert "items" in await open_error(empty_database)
    assert await schema(first_release) == before
    assert set(before) == {"items", "users"}
    async with first_release.begin() as connection:
        await connection.exec_driver_sql("DROP TABLE items")
    async with open_database(empty_database) as engine:
        assert await versions(engine) == ALL_VERSIONS


async def open_eight_times(settings: Settings) -> list[list[int]]:
    """Open a database eight times at once; returns the versions that each one sees."""

    async def open_once() -> list[int]:
        async with open_database(settings) as engine:
            return await versions(engine)

    return await asyncio.gather(*(open_once() for _ in range(8)))


async def test_a_database_that_is_opened_many_times_at_once_migrates_once(empty_database: Settings) -> None:
    assert await open_eight_times(empty_database) == [ALL_VERSIONS] * 8


@pytest.mark.slow
async def test_a_new_file_can_be_opened_many_times_at_once(tmp_path: Path) -> None:
    for round in range(20):  # each time another one is first; few orders can fail
        assert await open_eight_times(Settings(data=tmp_path / str(round))) == [ALL_VERSIONS] * 8


# What is stored


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        pytest.param("\0", "\ufffd", id="nul"),
        pytest.param("a\0\0b\0", "a\ufffd\ufffdb\ufffd", id="nuls-among-letters"),
        pytest.param("", "", id="empty"),
        pytest.param(
            "👩\u200d👩\u200d👧 广州 \U0010ffff\u0001\ufeff",
            "👩\u200d👩\u200d👧 广州 \U0010ffff\u0001\ufeff",
            id="unicode",
        ),
    ],
)
async def test_text_is_stored_unchanged_except_for_nul(empty_database: Settings, text: str, stored: str) -> None:
    async with open_database(empty_database) as engine:
        async with engine.begin() as connection:
            times = {"created": 1.5, "updated": 2.5}
            values = {"id": "conv_1", "user_id": "ann", "title": text, "bytes": 9, "listed": True}
            await connection.execute(conversations_table.insert().values(values | times))
            inside = (await connection.execute(conversations_table.select())).all()
    assert [tuple(row) for row in inside] == [("conv_1", "ann", stored, 1.5, 2.5, 9, None, None, True)]


async def test_only_its_owner_can_open_the_data_folder(tmp_path: Path) -> None:
    async with open_database(Settings(data=tmp_path / "some" / "data")):
        pass
    assert (tmp_path / "some" / "data").stat().st_mode & 0o777 == 0o700


# URLs


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg", "postgresql+psycopg2"])
async def test_every_spelling_of_a_postgresql_url_works(empty_postgresql: str, scheme: str) -> None:
    url = empty_postgresql.replace("postgresql", scheme, 1)
    async with open_database(Settings(database_url=url)) as engine:
        assert await rows(engine, "SELECT current_user") == [("postgres",)]


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+aiosqlite", "sqlite+pysqlite"])
async def test_every_spelling_of_an_sqlite_url_works(tmp_path: Path, scheme: str) -> None:
    async with open_database(Settings(database_url=f"{scheme}:///{tmp_path / 'named.db'}")) as engine:
        assert await versions(engine) == ALL_VERSIONS
    assert (tmp_path / "named.db").read_bytes().startswith(b"SQLite format 3")


async def test_with_a_url_no_data_folder_is_made(empty_postgresql: str, tmp_path: Path) -> None:
    async with open_database(Settings(data=tmp_path / "data", database_url=empty_postgresql)):
        assert not (tmp_path / "data").exists()


# Databases that cannot be used: SQLite


@pytest.fixture
async def threads_end() -> AsyncIterator[None]:
    """aiosqlite does not wait for the thread of a connection that it could not open; the event loop must."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        await asyncio.to_thread(thread.join)


async def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "parley.db").write_bytes(b"not a database, but long enough to be taken for one" * 100)
    message = await open_error(Settings(data=tmp_path))
    assert f"{tmp_path / 'parley.db'} cannot be used: " in message
    assert "file is not a database" in message
    assert "repair or restore it, or rename it" in message


@pytest.mark.usefixtures("threads_end")
async def test_a_folder_in_place_of_the_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "parley.db").mkdir()
    assert f"{tmp_path / 'parley.db'} cannot be used: " in await open_error(Settings(data=tmp_path))


@pytest.mark.usefixtures("threads_end")
async def test_a_database_in_a_missing_folder_is_named(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'nowhere' / 'parley.db'}"
    assert f"{tmp_path / 'nowhere' / 'parley.db'} cannot be used: " in await open_error(Settings(database_url=url))


@pytest.mark.parametrize("data", ["file", "file/data"])
async def test_a_data_folder_that_cannot_be_made_is_named(tmp_path: Path, data: str) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    with pytest.raises(DataFolderError) as raised:
        async with open_database(Settings(data=tmp_path / data)):
            pass
    message = str(raised.value)
    assert message.startswith(f"PARLEY_DATA={tmp_path / data} cannot be used: ")
    assert message.endswith("it must be a folder that Parley can write to")


async def test_a_read_only_database_that_needs_a_migration_is_named(tmp_path: Path) -> None:
    url = f"sqlite:///file:{tmp_path / 'parley.db'}?mode=ro&uri=true"
    async with open_database(Settings(data=tmp_path)) as engine:
        async with engine.begin() as connection:
            await connection.exec_driver_sql("DELETE FROM version")
    assert f"{tmp_path / 'parley.db'}" in await open_error(Settings(database_url=url))


# Databases that cannot be used: PostgreSQL

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(answer: Answer) -> AsyncIterator[str]:
    """A server on the loopback address that answers each connection; gives the host and the port."""
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        pytest.param("@/parley?host={folder}", "parley", id="no-socket"),
        pytest.param("@127.0.0.1:1/parley", "127.0.0.1:1/parley", id="closed-port"),
        pytest.param("@127.0.0.1:1/parley?sslmode=require", "127.0.0.1:1/parley", id="sslmode"),
        pytest.param("@127.0.0.1:1/parley?no_such=argument", "127.0.0.1:1/parley", id="unknown-argument"),
        pytest.param("@127.0.0.1:1/parley?password=hunter2", "127.0.0.1:1/parley", id="password-as-argument"),
        pytest.param("@nowhere.invalid/parley", "nowhere.invalid/parley", id="unknown-host"),
    ],
)
async def test_a_server_that_does_not_answer_is_named_without_the_password(
    tmp_path: Path, place: str, shown: str
) -> None:
    message = await open_error(Settings(database_url=f"postgresql://ann:hunter2{place.format(folder=tmp_path)}"))
    assert "the database postgresql+asyncpg://ann:***@" in message
    assert shown in message
    assert "cannot be used: " in message
    assert "hunter2" not in message


@pytest.mark.parametrize("place", ["@127.0.0.1:port/parley", "@127.0.0.1:99999/parley", "/parley", "@a:1,b:2/parley"])
async def test_a_broken_url_is_refused_without_the_password(place: str) -> None:
    assert "hunter2" not in await open_error(Settings(database_url=f"postgresql://ann:hunter2{place}"))


async def test_sslmode_in_a_url_decides_about_tls(empty_postgresql: str) -> None:
    async with open_database(Settings(database_url=f"{empty_postgresql}&sslmode=disable")) as engine:
        assert await versions(engine) == ALL_VERSIONS

    requests = list[bytes]()

    async def refuse_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readexactly(8))
        writer.write(b"N")
        writer.close()

    async with listening(refuse_tls) as address:
        url = f"postgresql://ann:hunter2@{address}/parley?sslmode=require"
        assert "rejected SSL upgrade" in await open_error(Settings(database_url=url))
    assert requests == [b"\x00\x00\x00\x08\x04\xd2\x16\x2f"]  # PostgreSQL's SSLRequest


@pytest.fixture
async def guarded(empty_postgresql: str) -> Settings:
    """A database for the user `guarded`, who needs a password, with the right password."""
    async with open_database(Settings(database_url=empty_postgresql)) as engine:
        async with engine.begin() as connection:
            await connection.exec_driver_sql("DROP ROLE IF EXISTS guarded")
            await connection.exec_driver_sql("CREATE ROLE guarded SUPERUSER LOGIN PASSWORD 'correct-horse'")
    return Settings(database_url=empty_postgresql.replace("postgres@", "guarded:correct-horse@"))


async def test_the_right_password_opens_the_database(guarded: Settings) -> None:
    async with open_database(guarded) as engine:
        assert await rows(engine, "SELECT current_user") == [("guarded",)]


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        pytest.param("correct-horse", "hunter2", "password authentication failed", id="wrong-password"),
        pytest.param("@/postgres", "@/other", "does not exist", id="unknown-database"),
        pytest.param("guarded:", "nobody:", 'role "nobody" does not exist', id="unknown-user"),
    ],
)
async def test_a_refusal_by_the_server_is_told_without_the_password(
    guarded: Settings, right: str, wrong: str, reason: str
) -> None:
    assert guarded.database_url
    message = await open_error(replace(guarded, database_url=guarded.database_url.replace(right, wrong)))
    assert "the database postgresql+asyncpg://" in message
    assert reason in message
    assert "correct-horse" not in message
    assert "hunter2" not in message


async def test_a_server_of_another_kind_is_named() -> None:
    async def answer_in_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with listening(answer_in_http) as address:
        message = await open_error(Settings(database_url=f"postgresql://ann:hunter2@{address}/parley"))
    assert f"{address}/parley cannot be used: " in message
    assert "hunter2" not in message
