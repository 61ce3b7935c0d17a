from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator

import pytest

from models.ops.waiting import poll_process_ended, wait_process_ended

pytestmark = pytest.mark.anyio


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """A process that writes the id of one of its own processes, and ends, like that one, when its input does."""
    command = ["sh", "-c", "exec 3<&0; cat <&3 & echo $!; wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def end(process: subprocess.Popen[str]) -> None:
    """Let a process end."""
    assert process.stdin
    process.stdin.close()


async def test_the_end_of_a_child_is_noticed_before_anybody_reaps_it(process: subprocess.Popen[str]) -> None:
    waiting = asyncio.create_task(wait_process_ended(process.pid))
    await asyncio.sleep(0)
    assert not waiting.done()
    end(process)
    await waiting
    assert process.returncode is None


async def test_the_end_of_a_process_that_is_no_child_is_noticed(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    waiting = asyncio.create_task(wait_process_ended(int(process.stdout.readline())))
    await asyncio.sleep(0)
    assert not waiting.done()
    end(process)
    await waiting


async def test_a_process_that_has_ended_already_is_not_waited_for(process: subprocess.Popen[str]) -> None:
    end(process)
    process.wait()
    await wait_process_ended(process.pid)


@pytest.mark.parametrize("cancelled", [False, True], ids=["ends", "is cancelled"])
async def test_no_descriptor_stays_open(process: subprocess.Popen[str], cancelled: bool) -> None:
    before = os.listdir("/proc/self/fd")
    waiting = asyncio.create_task(wait_process_ended(process.pid))
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    if cancelled:
        waiting.cancel()
    else:
        os.kill(process.pid, 9)
    await asyncio.wait([waiting])
    assert os.listdir("/proc/self/fd") == before
    end(process)


async def test_a_process_can_be_watched_without_the_help_of_the_system(process: subprocess.Popen[str]) -> None:
    waiting = asyncio.create_task(poll_process_ended(process.pid, seconds=0))
    await asyncio.sleep(0)
    assert not waiting.done()
    end(process)
    process.wait()
    await waiting
