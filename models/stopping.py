"""How the process ends: not before replies have, if it may wait."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import FrameType

logger = logging.getLogger("parley")

Drain = Callable[[float], Awaitable[None]]  # given the seconds it may take

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """Drains the server before what the web server does at a signal is done; at a second signal with no time to spare.

    uvicorn closes every socket before the lifespan's end, so that would be too late; its handlers are there before the
    lifespan's start, so they can be put off.
    """

    def __init__(self, drain: Drain, seconds: float) -> None:
        self._drain = drain
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._stopping: asyncio.Task[None] | None = None
        self._signals = 0
        self._failed = False

    @classmethod
    @asynccontextmanager
    async def prepared(
        cls, drain: Drain, seconds: float, broken: Callable[[], Awaitable[object]]
    ) -> AsyncIterator[None]:
        """While the context lasts, a signal drains first; the process ends with 1 once `broken` returns.

        Does nothing outside of the main thread, which alone has signals, and where there are no handlers to put off.
        """
        stopping = cls(drain, seconds)
        if threading.current_thread() is not threading.main_thread() or not stopping._handled:
            yield
            return
        watching = asyncio.create_task(stopping._watch(broken))
        for number in SIGNALS:
            signal.signal(number, stopping._signalled)
        try:
            yield
        finally:
            watching.cancel()
            for number, handler in stopping._handlers.items():
                signal.signal(number, handler)
            if stopping._failed:
                stopping._loop.call_soon(sys.exit, 1)

    @property
    def _handled(self) -> bool:
        return all(callable(handler) for handler in self._handlers.values())

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop)  # no more: nobody knows what the signal came in between

    def _stop(self) -> None:
        self._signals += 1
        match self._signals:
            case 1:
                logger.warning("stopping; another signal ends it at once")
                self._begin(self._seconds)
            case 2:
                logger.warning("stopping at once")
                self._begin(0)
            case _:
                self._end()
                self._end()

    def _begin(self, seconds: float) -> None:
        if self._stopping:
            self._stopping.cancel()
        self._stopping = asyncio.create_task(self._drain_and_end(seconds))

    async def _drain_and_end(self, seconds: float) -> None:
        try:
            await self._drain(seconds)
        except Exception:
            logger.exception("a bug in the stopping of the server")
        self._end()

    async def _watch(self, broken: Callable[[], Awaitable[object]]) -> None:
        await broken()
        self._failed = True
        self._begin(0)

    def _end(self) -> None:
        """Have the web server end; for uvicorn a SIGINT is an ordinary end, and a second one leaves all as it is."""
        handler = self._handlers[signal.SIGINT]
        assert callable(handler)
        handler(signal.SIGINT, None)
