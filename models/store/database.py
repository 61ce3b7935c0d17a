"""The database of users and conversations: its tables, its migrations, and how it is opened."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Dialect,
    Double,
    Integer,
    LargeBinary,
    TypeDecorator,
    UnicodeText,
    column,
    make_url,
    table,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from models.errors import DatabaseError, DataFolderError
from models.private_files import make_private_file, make_private_folder
from models.settings import Settings
from models.store.item import Status
from models.store.postgresql_connection import connect
from models.store.sqlite_connection import SQLiteConnection

DATABASE_ERRORS = (SQLAlchemyError, OSError)  # asyncpg raises OSError if there is no server

Database = AsyncEngine  # of SQLAlchemy; Parley has another engine


class Text(TypeDecorator[str]):
    """Any text; U+0000, which PostgreSQL cannot store, becomes U+FFFD."""

    impl = UnicodeText
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """The stored form of a text."""
        return value and value.replace("\0", "\ufffd")


class StatusText(TypeDecorator[Status]):
    """The status of a reply, as text."""

    impl = UnicodeText
    cache_ok = True

    def process_bind_param(self, value: Status | None, dialect: Dialect) -> str | None:
        """The stored form of a status."""
        return value and value.value

    def process_result_value(self, value: str | None, dialect: Dialect) -> Status | None:
        """The status, from its stored form."""
        return Status(value) if value else None


users_table = table("users", column("id", Text), column("digest", LargeBinary))

ended_sessions_table = table(
    "ended_sessions",
    column("id", Text),
    column("user_id", Text),
    column("expires", Double),
)

conversations_table = table(
    "conversations",
    column("id", Text),
    column("user_id", Text),
    column("title", Text),
    column("created", Double),
    column("updated", Double),
    column("bytes", BigInteger),  # of its items and texts, as of the last reply that began or ended
    column("leaf", Text),  # the last item of the current branch
    column("metadata", JSON(none_as_null=True)),
    column("listed", Boolean),  # False: the tree of a response that was stored without a conversation
)

items_table = table(
    "items",
    column("id", Text),
    column("conversation_id", Text),
    column("parent", Text),  # the item before it
    column("depth", Integer),  # how many items come before it on its branch
    column("role", Text),
    column("content", Text),
    column("created", Double),
    column("details", JSON(none_as_null=True)),  # images, reasoning, tool calls, tool call id; of a reply: failure
    column("status", StatusText),  # this column and the following ones belong to replies only
    column("reason", Text),
    column("usage", JSON(none_as_null=True)),
    column("options", JSON(none_as_null=True)),
    column("left_out", Integer),
    column("output", Text),  # stored_output.py has its form
    column("inputs", Integer),  # how many of the items before it are the input of its request
    column("previous", Text),
    column("ended", Double),
    column("decode_seconds", Double),
    column("instructions", Text),  # the id of their text; the options have all others
    column("request", Text),  # the id of its text
    column("bytes", BigInteger),
    column("owner", Text),  # the process that writes a reply
)

texts_table = table(  # instructions and requests; each text is stored once for each conversation
    "texts",
    column("conversation_id", Text),
    column("id", Text),
    column("text", Text),
    column("bytes", BigInteger),
)

owners_table = table(  # the processes that run replies
    "owners",
    column("id", Text),
    column("machine", Text),
    column("pid", Integer),
    column("address", Text),
    column("beats", BigInteger),
)

key_fingerprint_table = table(  # of the key that secrets are hashed with
    "key_fingerprint",
    column("place", Integer),  # always 1, so that there is one row at most
    column("fingerprint", LargeBinary),
)

# The statements that turn each version of the database into the next one. Released statements never change. The SQL is
# PostgreSQL's. SQLite understands it, since it accepts any word as a type.
MIGRATIONS = (
    ("CREATE TABLE IF NOT EXISTS users (id VARCHAR(64) PRIMARY KEY, digest BYTEA NOT NULL UNIQUE)",),
    (
        """CREATE TABLE conversations (
            id TEXT PRIMARY KEY, user_id TEXT NOT NULL, title TEXT NOT NULL,
            created DOUBLE PRECISION NOT NULL, updated DOUBLE PRECISION NOT NULL)""",
        "CREATE INDEX conversations_of_user ON conversations (user_id, updated, id)",
        """CREATE TABLE items (
            id TEXT PRIMARY KEY, conversation_id TEXT NOT NULL, position INTEGER NOT NULL, role TEXT NOT NULL,
            content TEXT NOT NULL, created DOUBLE PRECISION NOT NULL, status TEXT, reason TEXT, usage JSON,
            options JSON, left_out INTEGER, cuts TEXT, decode_seconds DOUBLE PRECISION,
            UNIQUE (conversation_id, position))""",
        "CREATE INDEX items_in_progress ON items (status) WHERE status = 'in_progress'",
    ),
    (
        "CREATE TABLE ended_sessions (id TEXT PRIMARY KEY, user_id TEXT NOT NULL, expires DOUBLE PRECISION NOT NULL)",
        "CREATE INDEX ended_sessions_of_user ON ended_sessions (user_id, expires, id)",
    ),
    (
        "CREATE TABLE owner (place INTEGER PRIMARY KEY, id TEXT NOT NULL, machine TEXT NOT NULL, pid INTEGER NOT NULL, "
        "beats BIGINT NOT NULL)",
        """CREATE TABLE instructions (
            conversation_id TEXT NOT NULL, id TEXT NOT NULL, text TEXT NOT NULL, bytes BIGINT NOT NULL,
            PRIMARY KEY (conversation_id, id))""",
        "ALTER TABLE conversations ADD COLUMN bytes BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE items ADD COLUMN instructions TEXT",
        "ALTER TABLE items ADD COLUMN bytes BIGINT",
        "ALTER TABLE items ADD COLUMN owner TEXT",
        "UPDATE items SET bytes = length(content) + length(coalesce(cuts, ''))",
        """UPDATE conversations SET bytes = (
            SELECT coalesce(sum(items.bytes), 0) FROM items WHERE items.conversation_id = conversations.id)""",
        "UPDATE items SET status = 'failed', reason = 'server_error' WHERE status = 'in_progress'",
        "DROP INDEX items_in_progress",
        "CREATE UNIQUE INDEX one_reply_in_progress ON items (conversation_id) WHERE status = 'in_progress'",
        "CREATE INDEX bytes_of_conversation ON items (conversation_id, bytes)",
        "CREATE INDEX bytes_of_user ON conversations (user_id, bytes)",
    ),
    (  # positions become parents; the table is made anew, since SQLite cannot drop a column that is in a constraint
        """CREATE TABLE nodes (
            id TEXT PRIMARY KEY, conversation_id TEXT NOT NULL, parent TEXT, depth INTEGER NOT NULL,
            role TEXT NOT NULL, content TEXT NOT NULL, created DOUBLE PRECISION NOT NULL, details JSON,
            status TEXT, reason TEXT, usage JSON, options JSON, left_out INTEGER, output TEXT, inputs INTEGER,
            previous TEXT, ended DOUBLE PRECISION, decode_seconds DOUBLE PRECISION, instructions TEXT, request TEXT,
            bytes BIGINT, owner TEXT)""",
        """INSERT INTO nodes (
            id, conversation_id, parent, depth, role, content, created, status, reason, usage, options, left_out,
            output, inputs, decode_seconds, instructions, bytes, owner)
        SELECT id, conversation_id, parent, depth, role, content, created, status, reason, usage, options, left_out,
            CASE WHEN status IS NULL THEN NULL WHEN content = '' THEN '[]' ELSE
                '[{"type":"message","cuts":['
                || replace(coalesce(nullif(cuts, ''), CAST(length(content) AS TEXT)), ' ', ',')
                || CASE WHEN status = 'completed' THEN '],"complete":true}]' ELSE ']}]' END END,
            CASE WHEN status IS NOT NULL THEN depth - 1 - coalesce(max(CASE WHEN status IS NOT NULL THEN depth END)
                OVER (PARTITION BY conversation_id ORDER BY depth ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), -1)
                END,
            decode_seconds, instructions, bytes, owner
        FROM (SELECT items.*, lag(id) OVER (PARTITION BY conversation_id ORDER BY position) AS parent,
            row_number() OVER (PARTITION BY conversation_id ORDER BY position) - 1 AS depth FROM items) AS placed""",
        "DROP TABLE items",
        "ALTER TABLE nodes RENAME TO items",
        "CREATE INDEX bytes_of_conversation ON items (conversation_id, bytes)",
        "CREATE INDEX children_of_item ON items (parent)",
        "CREATE INDEX replies_in_progress ON items (conversation_id) WHERE status = 'in_progress'",
        "ALTER TABLE instructions RENAME TO texts",
        "ALTER TABLE conversations ADD COLUMN leaf TEXT",
        "ALTER TABLE conversations ADD COLUMN metadata JSON",
        "ALTER TABLE conversations ADD COLUMN listed BOOLEAN NOT NULL DEFAULT TRUE",
        """UPDATE conversations SET leaf = (SELECT items.id FROM items
            WHERE items.conversation_id = conversations.id ORDER BY depth DESC LIMIT 1)""",
        "DROP INDEX conversations_of_user",
        "CREATE INDEX conversations_of_user ON conversations (user_id, listed, updated, id)",
        "CREATE INDEX unlisted_conversations ON conversations (listed, updated)",
    ),
    (  # the first items of a conversation have no parent, so that the parent alone does not find them
        "DROP INDEX children_of_item",
        "CREATE INDEX children_of_item ON items (conversation_id, parent, created, id)",
    ),
    (
        "DROP TABLE owner",
        "CREATE TABLE owners (id TEXT PRIMARY KEY, machine TEXT NOT NULL, pid INTEGER NOT NULL, address TEXT, "
        "beats BIGINT NOT NULL)",
        "CREATE TABLE key_fingerprint (place INTEGER PRIMARY KEY, fingerprint BYTEA NOT NULL)",
    ),
    (),  # details may have images, or the failure of a reply, which earlier versions cannot read
)

ENGINE_ARGUMENTS: dict[str, dict[str, Any]] = {
    # The timeout is how many seconds it waits while another process writes, such as a backup.
    "sqlite": {"connect_args": {"timeout": 5, "async_creator_fn": SQLiteConnection.to}},
    "postgresql": {
        "pool_pre_ping": True,  # the server may have been restarted
        # The timeouts are in seconds, if the server does not answer.
        "connect_args": {"timeout": 10, "command_timeout": 10, "async_creator_fn": connect},
    },
}

# The statement that lets only one process at a time go on.
LOCKS = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_xact_lock(7777)"}


@asynccontextmanager
async def open_database(settings: Settings, migrate: bool = True) -> AsyncIterator[Database]:
    """The database of the settings, created or migrated if needed, unless another process does that.

    Raises DatabaseError, DataFolderError or UntrustedPathError.
    """
    url = _url(settings)
    _make_private_files(url)
    try:
        engine = create_async_engine(url, hide_parameters=True, **ENGINE_ARGUMENTS[url.get_backend_name()])
        try:
            if migrate:
                await _prepare(engine)
            yield engine
        finally:
            await engine.dispose()
    except SQLAlchemyError as error:
        raise DatabaseError(_unusable(url, str(error.args[0] if error.args else error))) from error


@asynccontextmanager
async def begin_alone(database: Database) -> AsyncIterator[AsyncConnection]:
    """A transaction that waits until no other process has such a one."""
    async with database.begin() as connection:
        await connection.exec_driver_sql(LOCKS[database.dialect.name])
        yield connection


def make_data_folder(settings: Settings) -> None:
    """Make the data folder, if it does not exist; only its owner can read it.

    Raises DataFolderError or UntrustedPathError.
    """
    try:
        make_private_folder(settings.data)
    except OSError as error:
        raise DataFolderError(settings.data, error) from error


def _url(settings: Settings) -> URL:
    if not settings.database_url:
        make_data_folder(settings)
        return URL.create("sqlite+aiosqlite", database=str(settings.data / "parley.db"))
    try:
        url = make_url(settings.database_url)
    except (ValueError, ArgumentError):  # their messages would show the password
        raise DatabaseError(
            "PARLEY_DATABASE_URL cannot be read: it must be postgresql://user:password@host/database, with %40 for @ "
            "and so on in a password, or sqlite:///path"
        ) from None
    if "sslmode" in url.query:  # the usual spelling, which asyncpg does not know
        url = url.difference_update_query(["sslmode"]).update_query_dict({"ssl": url.query["sslmode"]})
    return url.set(drivername="sqlite+aiosqlite" if url.drivername.startswith("sqlite") else "postgresql+asyncpg")


def _make_private_files(url: URL) -> None:
    """Make the files of SQLite readable only for their owner; new ones get the mode of the database."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database.startswith((":", "file:")):
        return
    try:
        make_private_file(Path(url.database))
        for suffix in ("-wal", "-shm"):
            if (beside := Path(f"{url.database}{suffix}")).exists():
                make_private_file(beside)
    except OSError as error:
        raise DatabaseError(_unusable(url, str(error.strerror))) from error


def _unusable(url: URL, reason: str) -> str:
    shown = url.set(query={}).render_as_string(hide_password=True)
    advice = "check that it can be reached and has room; else repair or restore it, or rename it to begin a new one"
    return f"the database {shown} cannot be used: {reason}; {advice}"


async def _prepare(engine: Database) -> None:
    if engine.dialect.name == "sqlite":
        async with engine.connect() as connection:
            with suppress(OperationalError):  # locked, if another process does the same
                await connection.exec_driver_sql("PRAGMA journal_mode=WAL")  # so readers need not wait for a writer
    try:
        async with begin_alone(engine) as connection:
            await _migrate(connection)
    # asyncpg raises these if there is no server, or if it cannot use the URL
    except (OSError, TypeError, ValueError, OverflowError) as error:
        raise DatabaseError(_unusable(engine.url, str(error))) from error


async def _migrate(connection: AsyncConnection) -> None:
    await connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS version (number INTEGER NOT NULL)")
    version = (await connection.exec_driver_sql("SELECT max(number) FROM version")).scalar() or 0
    if version > len(MIGRATIONS):
        raise DatabaseError(
            f"a newer Parley made the database (version {version}): use the newer Parley, or an older backup"
        )
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        for statement in statements:
            await connection.exec_driver_sql(statement)
        await connection.exec_driver_sql(f"INSERT INTO version VALUES ({number})")
