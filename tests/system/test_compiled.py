"""A server stops while its model is being compiled, or while the compiled program is loaded and first run."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from tests.support.process import Server, launched

pytestmark = [pytest.mark.slow, pytest.mark.compiler]

STOPS = 8
COMPILE_SECONDS = 180


def programs() -> set[Path]:
    return {path for path in (user_cache_path("parley") / "compiled").glob("step-*") if path.is_dir()}


def left_in_the_temporary_folder() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("aotinductor_*"))


def wait_until_compiled(server: Server) -> None:
    deadline = time.monotonic() + COMPILE_SECONDS
    while not server.get("/args").json()["args"]["compiled"]:
        assert time.monotonic() < deadline, server.log.text
        time.sleep(0.1)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The program of the tiny model is in the cache."""
    with launched(tmp_path_factory.mktemp("data"), "compiled", compile=True) as server:
        wait_until_compiled(server)


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("stop", range(STOPS))
def test_a_stop_while_the_program_is_loaded_and_first_run_ends_with_0(tmp_path: Path, stop: int) -> None:
    before = left_in_the_temporary_folder()
    with launched(tmp_path, "compiled", compile=True) as server:
        for _ in range(random.Random(stop).randrange(20)):  # until some moment of the first second
            server.get("/health")
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert "not compiled" not in server.log.text
    assert left_in_the_temporary_folder() <= before


@pytest.mark.usefixtures("program")
def test_a_killed_server_leaves_nothing_of_its_program_either(tmp_path: Path) -> None:
    before = left_in_the_temporary_folder()
    with launched(tmp_path, "compiled", compile=True) as server:
        wait_until_compiled(server)
        server.signal(signal.SIGKILL)
        assert server.exit_code() == -signal.SIGKILL
    assert left_in_the_temporary_folder() <= before


def test_a_stop_during_the_compilation_ends_with_0_and_leaves_no_unfinished_program(tmp_path: Path) -> None:
    cache = user_cache_path("parley") / "compiled"
    before, unfinished = programs(), set(cache.glob("unfinished-program-*"))
    with launched(tmp_path, "compiled", compile=True, context=300) as server:  # a context of its own is a program too
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert "not compiled" not in server.log.text
    assert programs() == before
    assert set(cache.glob("unfinished-program-*")) <= unfinished
