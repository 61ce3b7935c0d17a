from __future__ import annotations

import asyncio
import errno
import resource
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from models.ops.file_limit import ENOUGH, LOG_SECONDS, FileLimitLogger, raise_file_limit

LINE = "too many files and sockets are open: new connections wait; raise `ulimit -n`"


class FakeLoop(asyncio.BaseEventLoop):
    """Tells the time that it is set to, and keeps what its own exception handler gets."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.handled: list[dict[str, Any]] = []

    def time(self) -> float:
        return self.now

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.handled.append(context)


@pytest.fixture
def loop() -> Iterator[FakeLoop]:
    with closing(FakeLoop()) as loop:
        yield loop


def too_many_files(number: int = errno.EMFILE) -> dict[str, Any]:
    """The context of an `accept` that failed."""
    return {"message": "socket.accept() out of system resource", "exception": OSError(number, "too many open files")}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE], ids=["of the process", "of the system"])
def test_the_limit_is_logged_in_one_line_without_a_traceback(
    loop: FakeLoop, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    FileLimitLogger()(loop, too_many_files(number))
    assert [(record.levelname, record.getMessage(), record.exc_info) for record in caplog.records] == [
        ("ERROR", LINE, None)
    ]
    assert loop.handled == []


def test_the_limit_is_logged_once_a_minute(loop: FakeLoop, caplog: pytest.LogCaptureFixture) -> None:
    handler = FileLimitLogger()
    for lines in (1, 2):
        for _ in range(3):
            handler(loop, too_many_files())
            loop.now += LOG_SECONDS / 4
        assert len(caplog.records) == lines
        loop.now += LOG_SECONDS


@pytest.mark.parametrize(
    "context",
    [
        pytest.param({"message": "lost", "exception": OSError(errno.ENOSPC, "no space left")}, id="other OSError"),
        pytest.param({"message": "lost", "exception": ValueError("a bug")}, id="bug"),
        pytest.param({"message": "Task was destroyed but it is pending!"}, id="no exception"),
    ],
)
def test_other_errors_are_handled_as_usual(
    loop: FakeLoop, caplog: pytest.LogCaptureFixture, context: dict[str, Any]
) -> None:
    FileLimitLogger()(loop, context)
    assert loop.handled == [context]
    assert caplog.records == []


@pytest.fixture
def low_limit() -> Iterator[int]:
    """The hard limit of this process, whose soft limit is lower meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000 if hard == resource.RLIM_INFINITY else min(hard - 1, 1000), hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.anyio
async def test_the_soft_limit_is_raised_and_the_loop_uses_the_logger(low_limit: int) -> None:
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    try:
        limit = raise_file_limit()
        assert isinstance(loop.get_exception_handler(), FileLimitLogger)
    finally:
        loop.set_exception_handler(before)
    expected = ENOUGH if low_limit == resource.RLIM_INFINITY else min(low_limit, ENOUGH)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (expected, low_limit)
    assert limit == expected
