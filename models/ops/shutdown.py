"""Stops the process at a signal; running responses may finish first."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from math import inf
from types import FrameType

logger = logging.getLogger("parley")

Drain = Callable[[float], Awaitable[None]]  # its argument: the seconds it may take
Broken = Callable[[], Awaitable[object]]  # returns when the process cannot go on

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a signal end a long step of the start: while uvicorn starts, its own signal handlers only set a flag."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@asynccontextmanager
async def cancelled_by(broken: Broken) -> AsyncIterator[None]:
    """While the context lasts, a signal, or the end of `broken`, cancels the task that waits in it."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task
    watching = asyncio.ensure_future(broken())
    watching.add_done_callback(lambda ended: ended.cancelled() or task.cancel())
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS} if is_main else {}
    for number in handlers:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(task.cancel))
    try:
        yield
    finally:
        watching.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM count as SIGINT: uvicorn ends normally at that, but lets SIGTERM kill it in the end."""
    interrupt, terminate = map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_main and callable(interrupt) and callable(terminate)):  # else it is not uvicorn
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda _, frame: interrupt(signal.SIGINT, frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Shutdown:
    """The first signal drains, then calls uvicorn's handler. The second ends all replies at once.

    The third signal stops uvicorn. uvicorn closes every socket before the lifespan ends, so the end of the lifespan is
    too late to drain. Its signal handlers are installed before the lifespan starts, so ours can replace them and call
    them later.
    """

    def __init__(self, drain: Drain, seconds: float, echo: float = 0.0) -> None:
        self._drain = drain
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._draining: asyncio.Task[None] | None = None
        self._echo = echo
        self._signals = 0
        self._signalled = -inf  # when the first one came
        self._failed = False

    @classmethod
    @asynccontextmanager
    async def installed(
        cls, drain: Drain, seconds: float, broken: Broken, echo: float = 0.0
    ) -> AsyncIterator[Shutdown]:
        """While the context lasts, a signal drains first. The process exits with 1 once `broken` returns.

        Signals within `echo` seconds of the first one count as one: if a whole group of processes gets a signal, its
        supervisor passes on another one. Does nothing if there are no handlers to call, or outside of the main thread,
        since only that gets signals.
        """
        shutdown = cls(drain, seconds, echo)
        if threading.current_thread() is not threading.main_thread() or not shutdown._has_handlers:
            yield shutdown
            return
        watching = asyncio.create_task(shutdown._watch(broken))
        for number in SIGNALS:
            signal.signal(number, shutdown._on_signal)
        try:
            yield shutdown
        finally:
            watching.cancel()
            for number, handler in shutdown._handlers.items():
                signal.signal(number, handler)
            if shutdown._failed:
                shutdown._loop.call_soon(sys.exit, 1)

    @property
    def _has_handlers(self) -> bool:
        return all(callable(handler) for handler in self._handlers.values())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop)  # only this: the signal may have interrupted any code

    def stop(self, at_once: bool = False) -> None:
        """Stop the process, as the first signal does, or the second one. Later signals count from there."""
        while self._signals < 1 + at_once:
            self._count()

    def _stop(self) -> None:
        if self._loop.time() > self._signalled + self._echo:
            self._count()

    def _count(self) -> None:
        self._signals += 1
        match self._signals:
            case 1:
                self._signalled = self._loop.time()
                logger.warning("stopping; another signal stops at once")
                self._begin(self._seconds)
            case 2:
                logger.warning("stopping at once")
                self._begin(0)
            case _:
                self._end()
                self._end()

    def _begin(self, seconds: float) -> None:
        if self._draining:
            self._draining.cancel()
        self._draining = asyncio.create_task(self._drain_and_end(seconds))

    async def _drain_and_end(self, seconds: float) -> None:
        try:
            await self._drain(seconds)
        except Exception:
            logger.exception("unexpected error in the shutdown")
        self._end()

    async def _watch(self, broken: Broken) -> None:
        await broken()
        self._failed = True
        self._begin(0)

    def _end(self) -> None:
        """Stop uvicorn. It ends normally at a first SIGINT, and at once at a second one."""
        handler = self._handlers[signal.SIGINT]
        assert callable(handler)
        handler(signal.SIGINT, None)
