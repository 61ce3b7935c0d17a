from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models.engine.subprocesses import Subprocesses
from models.errors import CompilationError
from tests.support.endless_program import EndlessProgram

PYTHON = [sys.executable, "-c"]
ECHO = "import sys; sys.stderr.write(sys.stdin.read()); sys.exit(3)"
CLEAN_UP = """
import pathlib, sys, time
began, ended = map(pathlib.Path, sys.argv[1:])
try:
    began.touch()
    time.sleep(60)
finally:
    ended.touch()
"""


def test_a_program_gets_its_input_and_returns_its_exit_code_and_errors() -> None:
    assert Subprocesses().run([*PYTHON, ECHO], "é".encode()) == (3, "é")


def test_a_program_can_have_an_environment() -> None:
    show = "import os, sys; sys.stderr.write(os.environ['SOME'])"
    assert Subprocesses().run([*PYTHON, show], environment={"SOME": "value"}) == (0, "value")


def test_a_stopped_program_may_clean_up_and_no_other_one_starts(tmp_path: Path) -> None:
    subprocesses, began, ended = Subprocesses(), tmp_path / "began", tmp_path / "ended"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(subprocesses.run, [*PYTHON, CLEAN_UP, str(began), str(ended)])
        while not began.exists():
            assert not running.done()
        subprocesses.stop()
        with pytest.raises(CompilationError, match="the server stops"):
            running.result()
    assert ended.exists()
    with pytest.raises(CompilationError, match="the server stops"):
        subprocesses.run([*PYTHON, ECHO])


def test_a_stop_ends_all_programs_and_those_that_they_have_started(tmp_path: Path) -> None:
    subprocesses = Subprocesses()
    with EndlessProgram.written(tmp_path) as program, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(subprocesses.run, [str(program.path)]) for _ in range(2)]
        for _ in running:
            program.wait_until_it_runs()
        subprocesses.stop()
        assert not program.came_to_its_end()
        for each in running:
            with pytest.raises(CompilationError, match="the server stops"):
                each.result()


def test_a_stop_of_nothing_only_keeps_programs_from_starting() -> None:
    subprocesses = Subprocesses()
    threading.Thread(target=subprocesses.stop).run()
    assert subprocesses.stopped
