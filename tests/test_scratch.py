from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from models.scratch import scratch_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def leave_behind(cache: Path, name: str) -> Path:
    """A folder as a killed process leaves it."""
    folder = cache / f"unfinished-{name}-abc"
    folder.mkdir(parents=True)
    (folder / "half").write_text("half of it")
    return folder


def test_the_folder_is_in_the_cache_and_removed_afterwards(cache: Path) -> None:
    with scratch_folder(cache, "work") as folder:
        assert folder.parent == cache
        assert names(folder) == set()
        (folder / "file").write_text("something")
    assert names(cache) == {"work.lock"}


def test_finished_work_can_be_moved_out_of_the_folder(cache: Path) -> None:
    with scratch_folder(cache, "work") as folder:
        (folder / "result").mkdir()
        (folder / "result" / "file").write_text("whole")
        (folder / "result").rename(cache / "result")
    assert (cache / "result" / "file").read_text() == "whole"


def test_the_folder_is_removed_when_the_work_fails(cache: Path) -> None:
    def fail() -> None:
        with scratch_folder(cache, "work") as folder:
            (folder / "file").write_text("half")
            raise RuntimeError("the work fails")

    with pytest.raises(RuntimeError, match="the work fails"):
        fail()
    assert names(cache) == {"work.lock"}
    with scratch_folder(cache, "work") as folder:
        assert names(folder) == set()


def test_folders_that_killed_processes_left_are_removed(cache: Path) -> None:
    left = leave_behind(cache, "work")
    with scratch_folder(cache, "work"):
        assert not left.exists()


def test_folders_for_other_work_are_kept(cache: Path) -> None:
    other = leave_behind(cache, "other")
    with scratch_folder(cache, "work"):
        assert (other / "half").exists()
    assert (other / "half").exists()


def test_work_of_two_kinds_can_be_done_at_once(cache: Path) -> None:
    with scratch_folder(cache, "work") as first, scratch_folder(cache, "other") as second:
        assert {first.is_dir(), second.is_dir()} == {True}


def test_a_cache_that_cannot_be_made_is_an_error(cache: Path) -> None:
    cache.write_text("a file in its place")
    with pytest.raises(OSError, match="cache"), scratch_folder(cache, "work"):
        pass


# Several processes

WORKER = """
import sys
from pathlib import Path
from models.scratch import scratch_folder

cache, log = map(Path, sys.argv[1:])
print("started", flush=True)
with scratch_folder(cache, "work"), log.open("a") as lines:
    print("working", flush=True)
    sys.stdin.read()
    for _ in range(3):
        print(len([*cache.glob("unfinished-work-*")]), file=lines, flush=True)
    print("done", file=lines)
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@contextmanager
def worker(cache: Path, log: Path, stdin: int) -> Iterator[subprocess.Popen[str]]:
    """A process that works until its standard input ends, and then logs how many folders there are."""
    command = [sys.executable, "-c", WORKER, str(cache), str(log)]
    with subprocess.Popen(command, cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, text=True) as process:
        yield process


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    """Wait until a process prints a line."""
    assert process.stdout
    assert process.stdout.readline() == f"{line}\n"


def test_other_processes_wait_until_the_folder_is_free(cache: Path, log: Path) -> None:
    with ExitStack() as stack:
        with scratch_folder(cache, "work") as folder:
            workers = [stack.enter_context(worker(cache, log, subprocess.DEVNULL)) for _ in range(3)]
            for process in workers:
                wait_for(process, "started")
            assert folder.exists()
            log.write_text("first\n")
        assert [process.wait() for process in workers] == [0, 0, 0]
    assert log.read_text().splitlines() == ["first", *["1", "1", "1", "done"] * 3]


def test_a_killed_process_does_not_block_the_others(cache: Path, log: Path) -> None:
    with worker(cache, log, subprocess.PIPE) as process:
        wait_for(process, "started")
        wait_for(process, "working")
        process.kill()
        process.wait()
    (left,) = cache.glob("unfinished-work-*")
    with scratch_folder(cache, "work"):
        assert not left.exists()
