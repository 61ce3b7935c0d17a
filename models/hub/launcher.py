"""Starts the hub of a data folder, once, and says where it listens."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from models.settings import Settings
from models.store.database import make_data_folder

LOCK, SOCKET = "hub.lock", "hub.sock"
STEADY_SECONDS = 10.0  # if nobody has asked for a hub for so long, the next one may be started at once
MIN_PAUSE, MAX_PAUSE = 0.5, 30.0


class Launcher:
    """Starts the hub of a data folder if it does not run. A file lock, which the hub holds, lets only one of them run.

    Whoever cannot reach the hub asks for it again and again. A hub that ends soon is started again after a pause, which
    doubles each time.
    """

    def __init__(
        self, folder: Path, command: Sequence[str], supervisor: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.supervisor = supervisor  # the process with which the hub ends
        self._folder = folder
        self._command = command
        self._clock = clock
        self._hub: subprocess.Popen[bytes] | None = None
        self._asked = self._started = 0.0  # when it was asked for a hub, and when it started one
        self._pause = 0.0

    @classmethod
    def of(cls, settings: Settings, command: Sequence[str], supervisor: int, url: str | None = None) -> Launcher:
        """A launcher of hubs that end when a process does; `url` is where the page is, if known. Raises StartError."""
        make_data_folder(settings)
        command = [*command, "--supervisor", str(supervisor), *(("--url", url) if url else ())]
        return cls(settings.data, command, supervisor)

    def launch(self) -> None:
        """Start the hub, unless it runs or has just ended too soon."""
        if self._hub:
            self._hub.poll()  # else one that has ended stays a zombie
        now = self._clock()
        if now >= self._asked + STEADY_SECONDS:  # the last one has run meanwhile
            self._pause = 0.0
        self._asked = now
        if now < self._started + self._pause:
            return
        descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # it runs already, or ends
            return
        else:
            self._started, self._pause = now, min(MAX_PAUSE, max(MIN_PAUSE, 2 * self._pause))
            self._hub = subprocess.Popen(
                [*self._command, str(descriptor)],
                stdin=subprocess.DEVNULL,
                pass_fds=[descriptor],  # the lock belongs to whoever has it open
                start_new_session=True,  # a Ctrl-C is for the workers, which drain first
            )
        finally:
            os.close(descriptor)


@contextmanager
def socket_path(folder: Path) -> Iterator[str]:
    """The path of the hub's socket. A Unix socket takes about 100 bytes, so that a long one goes through /proc."""
    path = str(folder / SOCKET)
    if len(os.fsencode(path)) < 100 or not Path("/proc/self/fd").exists():
        yield path
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
