"""Runs other programs, such as compilers, in a way that can be stopped from another thread."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

from models.errors import CompilationError

INTERRUPTS = 5  # until a program is killed
INTERRUPT_SECONDS = 1.0  # that it has to end by itself after each


class Subprocesses:
    """Runs programs, each in a process group with the programs that it starts.

    `stop`, from any thread, ends all groups that are running, and no program can be started afterwards.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(
        self, command: Sequence[str], input: bytes = b"", environment: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Run a program to its end. Returns its exit code and what it wrote to stderr. Raises CompilationError."""
        with tempfile.TemporaryFile() as stderr:  # a pipe would stay open until the program's own programs end
            code = self._run(command, input, environment, stderr)
            self.check()
            stderr.seek(0)
            return code, stderr.read().decode(errors="replace")

    def _run(
        self, command: Sequence[str], input: bytes, environment: Mapping[str, str] | None, stderr: IO[bytes]
    ) -> int:
        with self._lock:
            self.check()
            process = subprocess.Popen(
                command,
                process_group=0,  # a compiler's driver would end at a signal, and the compiler itself would go on
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environment,
                umask=0o077,  # what it writes is code that will run, so nobody else may change it
            )
            self._running.add(process)
        try:
            with process:
                try:
                    process.communicate(input)
                except BaseException:
                    _signal_group(process, signal.SIGKILL)
                    raise
        finally:
            with self._lock:
                self._running.remove(process)
        return process.returncode

    def check(self) -> None:
        """Raise CompilationError after `stop`."""
        if self.stopped:
            raise CompilationError("the server stops")

    def stop(self) -> None:
        """End the running programs: they may remove their unfinished files, and are killed if they take too long."""
        with self._lock:
            self.stopped = True
            running = [*self._running]
        for _ in range(INTERRUPTS):  # Python drops one that comes at a bad moment, such as in a callback
            for process in running:
                _signal_group(process, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                for process in running:
                    process.wait(INTERRUPT_SECONDS)
                return
        for process in running:
            _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a program that runs, and to all programs that it has started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, number)
