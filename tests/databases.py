"""A database of its own for each test: SQLite, and a real PostgreSQL that lives as long as the tests run."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from glob import glob
from pathlib import Path

import asyncpg
import pytest

from models.settings import Settings

PLACES = os.pathsep.join([os.environ.get("PATH", ""), *sorted(glob("/usr/lib/postgresql/*/bin"), reverse=True)])
INITDB, PG_CTL = (shutil.which(program, path=PLACES) for program in ("initdb", "pg_ctl"))

WITHOUT_SYNC = "-c fsync=off -c full_page_writes=off -c synchronous_commit=off"
ACCESS = "local all guarded scram-sha-256\nlocal all all trust\n"  # only who is called guarded needs a password


class PostgreSQL:
    """One that listens at a socket in its folder, and nowhere else; `postgres` may do all there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        owner = {}
        if os.geteuid() == 0:  # PostgreSQL does not run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            owner = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self._open = partial(subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=folder, **owner)
        self._run(INITDB, "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync")
        (folder / "cluster" / "pg_hba.conf").write_text(ACCESS)

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[PostgreSQL]:
        """One that runs until the context ends, or the process."""
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
        options = f"{WITHOUT_SYNC} -c listen_addresses='' -c unix_socket_directories={self.folder}"
        self._run(PG_CTL, f"--log={self.folder / 'log'}", f"--options={options}", "--wait", "start")

    def stop(self) -> None:
        self._run(PG_CTL, "--mode=fast", "--wait", "stop")

    def _run(self, program: str | None, *arguments: str) -> None:
        command = [program, f"--pgdata={self.folder / 'cluster'}", *arguments]
        with self._open(command) as process:
            assert process.wait() == 0, f"{command} failed"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Path]:
    """The folder of a PostgreSQL that lives as long as the tests run."""
    with PostgreSQL.running() as running:
        yield running.folder


@asynccontextmanager
async def created(folder: Path) -> AsyncIterator[str]:
    """The URL of a database that is made in the PostgreSQL of a folder, and dropped after."""
    name = f"test_{uuid.uuid4().hex}"
    administration = await asyncpg.connect(host=str(folder), user="postgres", database="postgres")
    try:
        await administration.execute(f"CREATE DATABASE {name}")
        yield f"postgresql://postgres@/{name}?host={folder}"
        await administration.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await administration.close()


@pytest.fixture
async def empty_postgresql(postgresql: Path) -> AsyncIterator[str]:
    """The URL of a PostgreSQL database in which there is nothing yet."""
    async with created(postgresql) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def socket_folder(request: pytest.FixtureRequest) -> Path | None:
    """Where the PostgreSQL of this test is; None for SQLite."""
    return request.getfixturevalue("postgresql") if request.param == "postgresql" else None


@pytest.fixture
async def empty_database(socket_folder: Path | None, tmp_path: Path) -> AsyncIterator[Settings]:
    """Settings with a database in which there is nothing yet, each test with both kinds."""
    if socket_folder is None:
        yield Settings(data=tmp_path / "data")
    else:
        async with created(socket_folder) as url:
            yield Settings(data=tmp_path / "data", database_url=url)
