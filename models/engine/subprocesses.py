"""Runs other programs, such as compilers, in a way that can be stopped from another thread."""

from __future__ import annotations

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
    """Runs one program after the other. `stop` ends the one that is running, and no other can be started."""

    def __init__(self) -> None:
        self.stopped = False
        self._running: subprocess.Popen[bytes] | None = None
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
            self._running = process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environment,
                umask=0o077,  # what it writes is code that will run, so nobody else may change it
            )
        with process:
            try:
                process.communicate(input)
            except BaseException:
                process.kill()
                raise
        return process.returncode

    def check(self) -> None:
        """Raise CompilationError after `stop`."""
        if self.stopped:
            raise CompilationError("the server stops")

    def stop(self) -> None:
        """End the running program: it may remove its unfinished files, and is killed if it takes too long."""
        with self._lock:
            self.stopped = True
            process = self._running
        if process:
            for _ in range(INTERRUPTS):  # Python drops one that comes at a bad moment, such as in a callback
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(INTERRUPT_SECONDS)
                    return
            process.kill()
