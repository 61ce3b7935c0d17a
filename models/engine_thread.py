"""The one thread that runs the engine, and the bridge from it to the event loop."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path

from models.engine import Engine
from models.sequence import Sequence, Token

logger = logging.getLogger("parley")


class EngineFailed(Exception):
    """The engine could not go on with a sequence; the log has the reason."""


class EngineThread:
    """Steps an engine while it has sequences, sleeps while it has none.

    Commands go to the thread through a queue and are obeyed between two steps; tokens come back through the
    event loop, a call a step. Its methods belong to the event loop.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[tuple[Callable[[Sequence], None], Sequence] | None] = queue.SimpleQueue()
        self._streams: dict[Sequence, asyncio.Queue[Token | None]] = {}
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        _end_helpers()
        _settle()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return not self._stopped

    async def tokens(self, sequence: Sequence) -> AsyncGenerator[Token, None]:
        """The tokens of a sequence as they come; leaving early frees its slot. Raises EngineFailed."""
        if self._stopped:
            raise EngineFailed("the engine has stopped")
        stream = self._streams[sequence] = asyncio.Queue()
        self._commands.put((self.engine.add, sequence))
        try:
            while token := await stream.get():
                yield token
                if token.finish:
                    return
            raise EngineFailed("the engine stopped in the middle of a reply")
        finally:
            del self._streams[sequence]
            self._commands.put((self.engine.cancel, sequence))

    def compile(self, cache: Path) -> None:
        """Compile the engine's model in a thread of its own while the engine goes on; failing changes nothing."""

        def run() -> None:
            try:
                self.engine.compile(cache)
            except Exception as error:  # whatever torch's compiler, or the system's, stumbles on
                reason = " ".join(str(error).split())[:300]
                logger.warning("the model is not compiled, and stays a little slower: %s", reason)

        threading.Thread(target=run, name="compile", daemon=True).start()

    async def stop(self) -> None:
        """End the thread after the step it is in; what still runs fails."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        keep_memory()
        try:
            while self._obey():
                self._tell(self._step())
        finally:
            self._tell(None)

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
            self._tell([(sequence, None)])

    def _step(self) -> list[tuple[Sequence, Token | None]]:
        running = [sequence for sequence in self.engine.slots if sequence]  # some may end in a step that fails later
        try:
            return [(token.sequence, token) for token in self.engine.step()]
        except Exception:
            logger.exception("an engine step failed; the replies that were running end here")
            for sequence in running:
                self.engine.cancel(sequence)
            return [(sequence, None) for sequence in running]

    def _tell(self, tokens: list[tuple[Sequence, Token | None]] | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, tokens)

    def _deliver(self, tokens: list[tuple[Sequence, Token | None]] | None) -> None:
        """Hand tokens to those who wait for them; None, for the thread or for one sequence: no more will come."""
        if tokens is None:
            self._stopped = True
            tokens = [(sequence, None) for sequence in self._streams]
        for sequence, token in tokens:
            if stream := self._streams.get(sequence):  # else it was cancelled meanwhile
                stream.put_nowait(token)


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
