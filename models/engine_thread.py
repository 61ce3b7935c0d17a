"""The one thread that runs the engine, and the bridge from it to the event loop."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from models.engine import Engine
from models.sequence import Sequence, Token
from models.stepper import Outcome, Stepper, in_one_line

logger = logging.getLogger("parley")


class EngineFailed(Exception):
    """The engine could not go on with a sequence; the log has the reason."""


class EngineThread:
    """Steps an engine while it has sequences, sleeps while it has none.

    Commands go to the thread through a queue and are obeyed between two steps; tokens come back through the
    event loop, a call a step. Its methods belong to the event loop, where `on_shrink` is told how many sequences run
    at once from now on; `observe_step` is told, in the thread, how many seconds each step took.
    """

    def __init__(
        self,
        engine: Engine,
        on_shrink: Callable[[int], None] | None = None,
        observe_step: Callable[[float], None] | None = None,
    ) -> None:
        self.engine = engine
        self.trouble: str | None = None  # in a line, why no more tokens come
        self.died = asyncio.Event()  # unlike a thread that was stopped
        self._commands: queue.SimpleQueue[tuple[Callable[[Sequence], None], Sequence] | None] = queue.SimpleQueue()
        self._streams: dict[Sequence, asyncio.Queue[Token | None]] = {}
        self._loop = asyncio.get_running_loop()
        self._stepper = Stepper(engine, partial(self._call, on_shrink) if on_shrink else None, observe_step)
        _end_helpers()
        _settle()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def tokens(self, sequence: Sequence) -> AsyncGenerator[Token, None]:
        """The tokens of a sequence as they come; leaving early frees its slot. Raises EngineFailed."""
        if self.trouble:
            raise EngineFailed(self.trouble)
        stream = self._streams[sequence] = asyncio.Queue()
        self._commands.put((self.engine.add, sequence))
        try:
            while token := await stream.get():
                yield token
                if token.finish:
                    return
            raise EngineFailed("the engine could not go on with a reply")
        finally:
            del self._streams[sequence]
            self._commands.put((self.engine.cancel, sequence))

    def compile(self, cache: Path) -> None:
        """Compile the engine's model in a thread of its own while the engine goes on; failing changes nothing."""

        def run() -> None:
            try:
                self.engine.compile(cache)
            except Exception as error:  # whatever torch's compiler, or the system's, stumbles on
                logger.warning("the model is not compiled, and stays a little slower: %s", in_one_line(error))

        threading.Thread(target=run, name="compile", daemon=True).start()

    async def stop(self) -> None:
        """End the thread after the step it is in, if it has not died; what still runs fails."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        trouble = None
        try:
            keep_memory()
            while self._obey():
                self._call(self._deliver, self._stepper.step())
        except BaseException as error:  # whatever it is, those who wait for tokens must hear of it
            logger.critical("the engine stopped", exc_info=True)
            trouble = f"the engine stopped: {in_one_line(error)}"
        self._call(self._end, trouble)

    def _obey(self) -> bool:
        """Take the commands that are there, wait for one while there is nothing to step. False: stop."""
        while True:
            try:
                command = self._commands.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            self._do(*command)

    def _do(self, method: Callable[[Sequence], None], sequence: Sequence) -> None:
        try:
            method(sequence)
        except Exception:
            logger.exception("the engine could not take a sequence; its reply ends here")
            self.engine.cancel(sequence)
            self._call(self._deliver, [(sequence, None)])
            self.engine.probe()

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        """Have the event loop call a function."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, outcomes: Iterable[Outcome]) -> None:
        """Hand tokens to those who wait for them; None: no more will come."""
        for sequence, token in outcomes:
            if stream := self._streams.get(sequence):  # else it was cancelled meanwhile
                stream.put_nowait(token)

    def _end(self, trouble: str | None) -> None:
        """Take note that the thread has ended, which is trouble unless it was stopped."""
        self.trouble = trouble or "the engine was stopped"
        self._deliver([(sequence, None) for sequence in self._streams])
        if trouble:
            self.died.set()


def _settle() -> None:
    """Have Python's garbage collector pass over what is there to stay: a look at all of it stops a step for 60 ms."""
    gc.collect()
    gc.freeze()


def _end_helpers() -> None:
    """End the calling thread's OpenMP helpers: where there are more than cores, those of the engine do not spin but
    sleep between two operators, and a step takes 45 ms instead of 10."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(1)  # omp_pause_soft


def keep_memory() -> None:
    """Have glibc keep what a step frees: to give it back and fault it in again took half of a step of 32 sequences."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.malloc_trim(0)  # what the loading left
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            library.mallopt(parameter, 1 << 30)
