"""Runs the engine in its own thread, and passes its tokens to the event loop."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import queue
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from models.engine.engine import Engine
from models.engine.recovery import Outcome, StepRecovery
from models.engine.sequence import Sequence, Token
from models.engine.subprocesses import Subprocesses
from models.engine.transfers import use_device
from models.errors import EngineError, one_line

# For how long one thread keeps the interpreter from another that waits for it, with a GPU. At Python's 5 ms, the engine
# waits longer for the event loop than for the device, once many replies stream.
SWITCH_SECONDS = 1e-4

logger = logging.getLogger("parley")


class AsyncEngine:
    """Steps an engine in a thread while it has sequences; the thread sleeps while it has none.

    Commands reach the thread through a queue and run between two steps; tokens come back to the event loop, one call
    for each step. All public methods must be called in the event loop. `on_shrink` is called there when the memory runs
    out, with the number of slots that are left. `on_step` is called in the thread, with the seconds of each step.
    """

    def __init__(
        self,
        engine: Engine,
        on_shrink: Callable[[int], None] | None = None,
        on_step: Callable[[float], None] | None = None,
    ) -> None:
        self.engine = engine
        self.trouble: str | None = None  # why no more tokens come, in one line
        self.died = asyncio.Event()  # set when the thread has failed, not when it was stopped
        self._commands: queue.SimpleQueue[tuple[Callable[[Sequence], None], Sequence] | None] = queue.SimpleQueue()
        self._streams: dict[Sequence, asyncio.Queue[Token | None]] = {}
        self._loop = asyncio.get_running_loop()
        self._compiling: threading.Thread | None = None
        self._compilers = Subprocesses()
        self._recovery = StepRecovery(engine, partial(self._call, on_shrink) if on_shrink else None, on_step)
        _end_openmp_threads()
        _freeze_garbage()
        if engine.runner.works_ahead:
            sys.setswitchinterval(SWITCH_SECONDS)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, sequence: Sequence) -> AsyncGenerator[list[Token], None]:
        """Yield the tokens of a sequence, all that have come since the last ones: several if the event loop is behind.

        Closing the generator frees its slot. Raises EngineError, and FormatFailedError if its constraint fails.
        """
        if self.trouble:
            raise EngineError(self.trouble)
        stream = self._streams[sequence] = asyncio.Queue()
        self._commands.put((self.engine.add, sequence))
        try:
            while True:
                outcomes = [await stream.get()]
                while not stream.empty():
                    outcomes.append(stream.get_nowait())
                if tokens := [token for token in outcomes if token]:
                    yield tokens
                if len(tokens) < len(outcomes):
                    raise sequence.error or EngineError("the engine could not continue a reply")
                if tokens[-1].finish_reason:
                    return
        finally:
            del self._streams[sequence]
            self._commands.put((self.engine.cancel, sequence))

    def compile(self, cache: Path) -> None:
        """Compile the model in another thread while the engine goes on. If that fails, the engine stays as it is."""

        def run() -> None:
            try:
                use_device(self.engine.runner.device)
                self.engine.runner.compile(cache, self._compilers)
            except Exception as error:  # torch's compiler and the system raise many types of errors
                if not self._compilers.stopped:
                    logger.warning("the model is not compiled and stays a little slower: %s", one_line(error))

        self._compiling = threading.Thread(target=run, name="compile", daemon=True)
        self._compiling.start()

    async def stop(self) -> None:
        """End the engine's thread after its current step, and the compilation; sequences that still run fail."""
        self._commands.put(None)
        await asyncio.to_thread(self._end_threads)

    def _end_threads(self) -> None:
        """Stop compilers, and wait for the threads: a program that is being loaded aborts a process that ends."""
        self._compilers.stop()
        self._thread.join()
        if self._compiling:
            self._compiling.join()

    def _run(self) -> None:
        trouble = None
        try:
            keep_memory()
            use_device(self.engine.runner.device)
            while self._run_commands():
                self._call(self._deliver, self._recovery.step())
        except BaseException as error:  # any error must reach the callers that wait for tokens
            logger.critical("the engine stopped", exc_info=True)
            trouble = one_line(f"the engine stopped: {one_line(error)}")
        self._call(self._end, trouble)

    def _run_commands(self) -> bool:
        """Run all commands in the queue; wait for one while no sequence runs. Returns False to stop."""
        while True:
            try:
                command = self._commands.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            self._run_command(*command)

    def _run_command(self, method: Callable[[Sequence], None], sequence: Sequence) -> None:
        try:
            method(sequence)
        except Exception:
            logger.exception("the engine could not add a sequence; its reply ends")
            self.engine.cancel(sequence)
            self._call(self._deliver, [(sequence, None)])
            self.engine.runner.probe()

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        """Make the event loop call a function."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, outcomes: Iterable[Outcome]) -> None:
        """Pass tokens to the callers that wait for them; None means that there are no more."""
        for sequence, token in outcomes:
            if stream := self._streams.get(sequence):  # else it was cancelled meanwhile
                stream.put_nowait(token)

    def _end(self, trouble: str | None) -> None:
        """Note that the thread has ended: by `trouble`, or because it was stopped."""
        self.trouble = trouble or "the engine was stopped"
        self._deliver([(sequence, None) for sequence in self._streams])
        if trouble:
            self.died.set()


def _freeze_garbage() -> None:
    """Exempt all existing objects from Python's garbage collector, which would stop a step for 60 ms to visit them."""
    gc.collect()
    gc.freeze()


def _end_openmp_threads() -> None:
    """End the OpenMP threads of the calling thread.

    Otherwise two OpenMP pools compete for the cores: the engine's threads sleep between two operators instead of
    spinning, and a step takes 45 ms instead of 10.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(1)  # omp_pause_soft


def keep_memory() -> None:
    """Make glibc keep the memory that a step frees.

    Returning it and faulting it in again took half the time of a step of 32 sequences.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.malloc_trim(0)  # return the memory that loading the model left
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            library.mallopt(parameter, 1 << 30)
