"""A server stops while its model is being compiled, or while the compiled program is loaded and first run."""

from __future__ import annotations

import random
import shutil
import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from platformdirs import user_cache_path

from models.engine import compilation
from models.engine.native import build
from tests.support.process import Server, launched

pytestmark = [pytest.mark.slow, pytest.mark.compiler]

STOPS = 8
COMPILE_SECONDS = 180


class Folders:
    """A cache and a temporary folder for some servers."""

    def __init__(self, path: Path) -> None:
        self.programs, self.temporary = path / "parley" / "compiled", path / "temporary"
        self._cache = path
        self.programs.mkdir(parents=True)
        self.temporary.mkdir()
        ours = user_cache_path("parley")  # what is compiled once for the machine
        shutil.copy(build.build_library(ours), self.programs.parent)
        shutil.copy(build.build_library(ours, compilation.SOURCE), self.programs)

    def launched(self, data: Path, **settings: Any) -> AbstractContextManager[Server]:
        """A server with a tiny model that is compiled."""
        folders: dict[str, Any] = {"XDG_CACHE_HOME": self._cache, "TMPDIR": self.temporary}
        return launched(data, "compiled", compile=True, **folders, **settings)

    def names(self, pattern: str) -> list[str]:
        return sorted(path.name for path in self.programs.glob(pattern))


def wait_until_compiled(server: Server) -> None:
    deadline = time.monotonic() + COMPILE_SECONDS
    while not server.get("/args").json()["args"]["compiled"]:
        assert time.monotonic() < deadline, server.log.text
        time.sleep(0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folders with the program of the tiny model."""
    folders = Folders(tmp_path_factory.mktemp("folders"))
    with folders.launched(tmp_path_factory.mktemp("data")) as server:
        wait_until_compiled(server)
    assert len(folders.names("step-*")) == 1
    return folders


@pytest.mark.parametrize("stop", range(STOPS))
def test_a_stop_while_the_program_is_loaded_and_first_run_ends_with_0(
    folders: Folders, tmp_path: Path, stop: int
) -> None:
    with folders.launched(tmp_path) as server:
        for _ in range(random.Random(stop).randrange(20)):  # until some moment of the first second
            server.get("/health")
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert "not compiled" not in server.log.text
    assert list(folders.temporary.glob("aotinductor*")) == []


def test_a_killed_server_leaves_nothing_of_its_program_either(folders: Folders, tmp_path: Path) -> None:
    with folders.launched(tmp_path) as server:
        wait_until_compiled(server)
        server.signal(signal.SIGKILL)
        assert server.exit_code() == -signal.SIGKILL
    assert list(folders.temporary.glob("aotinductor*")) == []


def test_a_stop_during_the_compilation_ends_with_0_and_leaves_no_unfinished_program(
    folders: Folders, tmp_path: Path
) -> None:
    before = folders.names("step-*")
    with folders.launched(tmp_path, context=300) as server:  # a context of its own is a program too
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert "not compiled" not in server.log.text
    assert folders.names("step-*") == before
    assert folders.names("unfinished-*") == []
