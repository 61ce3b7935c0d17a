"""Where users and conversations are kept: its tables, how they came to be, and how it is opened."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Dialect, Double, Integer, LargeBinary, TypeDecorator, UnicodeText, column, make_url, table
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from models.refused import Refused
from models.settings import Settings, StartError


class DatabaseError(StartError):
    """A database that cannot be used; the message says what to do."""


class DatabaseUnavailable(Refused):
    """What is in the database cannot be had at present."""

    type = "server_error"
    code = "database_unavailable"
    message = "the database cannot be read at present: try again in a moment"
    retry_after = 5


class DataFolderError(StartError):
    """A data folder that cannot be used."""

    def __init__(self, folder: Path, error: OSError) -> None:
        super().__init__(
            f"PARLEY_DATA={folder} cannot be used: {error.strerror}; it must be a folder that can be written"
        )


class Words(TypeDecorator[str]):
    """Any text; U+0000, which PostgreSQL cannot store, becomes U+FFFD."""

    impl = UnicodeText
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """What is stored for a text."""
        return value and value.replace("\0", "\ufffd")


users_table = table("users", column("id", Words), column("digest", LargeBinary))

conversations_table = table(
    "conversations",
    column("id", Words),
    column("user_id", Words),
    column("title", Words),
    column("created", Double),
    column("updated", Double),
)

items_table = table(
    "items",
    column("id", Words),
    column("conversation_id", Words),
    column("position", Integer),
    column("role", Words),
    column("content", Words),
    column("created", Double),
    column("status", Words),  # this and what follows: of replies only
    column("reason", Words),
    column("usage", JSON(none_as_null=True)),
    column("options", JSON(none_as_null=True)),
    column("left_out", Integer),
    column("cuts", Words),
    column("decode_seconds", Double),
)

# What leads from each version of the database to the next; what has landed here does not change any more. The SQL is
# PostgreSQL's, and SQLite's too, which takes any word for a type.
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
)

OPTIONS: dict[str, dict[str, Any]] = {
    "sqlite": {"connect_args": {"timeout": 5}},  # seconds to wait for another process that writes, such as a backup
    "postgresql": {
        "pool_pre_ping": True,  # it may have been restarted
        "connect_args": {"timeout": 10, "command_timeout": 10},  # seconds, where nothing comes back at all
    },
}

# One process at a time migrates.
LOCKS = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_xact_lock(7777)"}


def explained(error: Exception) -> str:
    """What failed in a database, in a line; the driver says it shorter than what stands around it."""
    return " ".join(repr(getattr(error, "orig", None) or error).split())[:300]


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """The settings' database, brought up to date, made where there is none. Raises DatabaseError."""
    url = _url(settings)
    try:
        engine = create_async_engine(url, hide_parameters=True, **OPTIONS[url.get_backend_name()])
        try:
            await _prepare(engine)
            yield engine
        finally:
            await engine.dispose()
    except SQLAlchemyError as error:
        raise DatabaseError(_trouble(url, str(error.args[0] if error.args else error))) from error


def _url(settings: Settings) -> URL:
    if not settings.database_url:
        try:
            settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DataFolderError(settings.data, error) from error
        return URL.create("sqlite+aiosqlite", database=str(settings.data / "parley.db"))
    try:
        url = make_url(settings.database_url)
    except (ValueError, ArgumentError):  # whose words would show the password
        raise DatabaseError(
            "PARLEY_DATABASE_URL cannot be read: it must be postgresql://user:password@host/database, with %40 and the "
            "like for what is special in a password, or sqlite:///path"
        ) from None
    if "sslmode" in url.query:  # as most hosts of PostgreSQL spell it, and asyncpg does not
        url = url.difference_update_query(["sslmode"]).update_query_dict({"ssl": url.query["sslmode"]})
    return url.set(drivername="sqlite+aiosqlite" if url.drivername.startswith("sqlite") else "postgresql+asyncpg")


def _trouble(url: URL, reason: str) -> str:
    shown = url.set(query={}).render_as_string(hide_password=True)
    help = "see that it can be reached and has room, else mend or restore it, or move it away to begin anew"
    return f"the database {shown} cannot be used: {reason}; {help}"


async def _prepare(engine: AsyncEngine) -> None:
    if engine.dialect.name == "sqlite":
        async with engine.connect() as connection:
            with suppress(OperationalError):  # locked, where another process is just doing the same
                await connection.exec_driver_sql("PRAGMA journal_mode=WAL")  # who reads need not wait for who writes
    try:
        async with engine.begin() as connection:
            await _migrate(connection)
    # asyncpg's, of a server that is not there, or of a URL that it cannot use
    except (OSError, TypeError, ValueError, OverflowError) as error:
        raise DatabaseError(_trouble(engine.url, str(error))) from error


async def _migrate(connection: AsyncConnection) -> None:
    await connection.exec_driver_sql(LOCKS[connection.dialect.name])
    await connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS version (number INTEGER NOT NULL)")
    version = (await connection.exec_driver_sql("SELECT max(number) FROM version")).scalar() or 0
    if version > len(MIGRATIONS):
        raise DatabaseError(f"the database is of a newer Parley (version {version}): use that one, or its backup")
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        for statement in statements:
            await connection.exec_driver_sql(statement)
        await connection.exec_driver_sql(f"INSERT INTO version VALUES ({number})")
