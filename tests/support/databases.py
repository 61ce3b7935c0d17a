"""Databases for tests: SQLite, and a real PostgreSQL server that lives as long as the tests run."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from glob import glob
from pathlib import Path
from typing import Self

import asyncpg  # type: ignore[import-untyped]
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from models.settings import Settings
from models.store.database import (
    conversations_table,
    items_table,
    key_fingerprint_table,
    open_database,
    owners_table,
    texts_table,
    users_table,
)

PLACES = os.pathsep.join([os.environ.get("PATH", ""), *sorted(glob("/usr/lib/postgresql/*/bin"), reverse=True)])
INITDB, PG_CTL = (shutil.which(program, path=PLACES) for program in ("initdb", "pg_ctl"))

WITHOUT_SYNC = "-c fsync=off -c full_page_writes=off -c synchronous_commit=off"
ACCESS = "local all guarded scram-sha-256\nlocal all all trust\n"  # only the user `guarded` needs a password

# To create a database takes 300 ms, to create its schema again takes 10. Connections that a test left would hold locks.
EMPTY = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid();
    DROP SCHEMA public CASCADE;
    CREATE SCHEMA public;
"""


class PostgreSQL:
    """A server that listens at a socket in its folder, and nowhere else. The user `postgres` may do everything."""

    listens = ""  # at which addresses of the network
    access = ACCESS

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        owner = {}
        if os.geteuid() == 0:  # PostgreSQL does not run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            owner = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self._open = partial(subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=folder, **owner)
        self._run(INITDB, "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync")
        (folder / "cluster" / "pg_hba.conf").write_text(self.access)

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Self]:
        """A server that runs until the context ends, or the process."""
        if not INITDB or not PG_CTL:
            pytest.skip("PostgreSQL is not installed: there is no initdb or pg_ctl")
        folder = Path(tempfile.mkdtemp(prefix="parley-"))  # tmp_path is too long for a socket, and closed to others
        try:
            postgresql = cls(folder)
            postgresql.start()
            until_we_end = f"cat; exec '{PG_CTL}' '--pgdata={folder / 'cluster'}' --mode=immediate --wait stop"
            with postgresql._open(["sh", "-c", until_we_end], start_new_session=True):
                yield postgresql
        finally:
            shutil.rmtree(folder)

    def start(self) -> None:
        options = f"{WITHOUT_SYNC} -c listen_addresses='{self.listens}' -c unix_socket_directories={self.folder}"
        self._run(PG_CTL, f"--log={self.folder / 'log'}", f"--options={options}", "--wait", "start")

    def stop(self) -> None:
        self._run(PG_CTL, "--mode=fast", "--wait", "stop")

    def url(self, database: str = "postgres") -> str:
        """The URL of a database for the user `postgres`."""
        return f"postgresql://postgres@/{database}?host={self.folder}"

    async def execute(self, statements: str) -> None:
        """Run SQL in the database `postgres`."""
        connection = await asyncpg.connect(host=str(self.folder), user="postgres", database="postgres")
        try:
            await connection.execute(statements)
        finally:
            await connection.close()

    def _run(self, program: str | None, *arguments: str) -> None:
        command = [program, f"--pgdata={self.folder / 'cluster'}", *arguments]
        with self._open(command) as process:
            assert process.wait() == 0, f"{command} failed"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL server that lives as long as the tests run."""
    with PostgreSQL.running() as running:
        yield running


@pytest.fixture
async def empty_postgresql(postgresql: PostgreSQL) -> str:
    """The URL of a PostgreSQL database without tables."""
    await postgresql.execute(EMPTY)
    return postgresql.url()


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database_server(request: pytest.FixtureRequest) -> PostgreSQL | None:
    """The database server of a test; None for SQLite."""
    return request.getfixturevalue("postgresql") if request.param == "postgresql" else None


@pytest.fixture
async def empty_database(database_server: PostgreSQL | None, tmp_path: Path) -> Settings:
    """Settings with a database without tables: SQLite, then PostgreSQL."""
    if database_server is None:
        return Settings(data=tmp_path / "data")
    await database_server.execute(EMPTY)
    return Settings(data=tmp_path / "data", database_url=database_server.url())


@pytest.fixture(scope="module")
def shared_database(database_server: PostgreSQL | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings with a database that the tests of a module share: SQLite, then PostgreSQL."""
    data = tmp_path_factory.mktemp("data")
    if database_server is None:
        yield Settings(data=data)
    else:
        asyncio.run(database_server.execute("CREATE DATABASE shared"))
        yield Settings(data=data, database_url=database_server.url("shared"))
        asyncio.run(database_server.execute("DROP DATABASE shared WITH (FORCE)"))


@pytest.fixture
async def empty_tables(shared_database: Settings) -> AsyncIterator[AsyncEngine]:
    """A database whose tables are empty: SQLite, then PostgreSQL. A test must not change the tables themselves."""
    async with open_database(shared_database) as engine:
        async with engine.begin() as connection:
            for table in (
                items_table,
                texts_table,
                conversations_table,
                users_table,
                owners_table,
                key_fingerprint_table,
            ):
                await connection.execute(table.delete())
        yield engine
