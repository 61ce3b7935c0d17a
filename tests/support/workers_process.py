"""A server of several workers in processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.process import COMPLAINT, PATIENCE, ROOT, Log, Server, until

STARTED = re.compile(r"Started server process \[(\d+)\]")
HUB = re.compile(r"^hub \[(\d+)\]", re.MULTILINE)


class Supervisor:
    """The process that starts the workers."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        self.process = process
        self.pid = process.pid
        self.log = Log(process.stdout)

    def exit_code(self) -> int:
        """Wait until the process has ended."""
        return self.process.wait(PATIENCE)


class Workers(Server):
    """A server whose workers can be told apart."""

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__(supervisor)
        self.supervisor = supervisor
        until(lambda: self.log.text.count("Application startup complete") == 2, "both workers serve")

    @property
    def hub(self) -> int:
        """The process id of the latest hub."""
        return int(HUB.findall(self.log.text)[-1])

    @property
    def workers(self) -> list[int]:
        """The process ids of the workers that run."""
        return [pid for pid in map(int, STARTED.findall(self.log.text)) if runs(pid)]

    def release(self) -> None:
        """Let the replies go on that wait for this."""
        os.kill(self.hub, signal.SIGUSR1)

    def worker_of(self, client_port: int) -> int:
        """The process id of the worker that has the connection of a client."""
        inodes = {f"socket:[{inode}]" for inode in inodes_of(self.port, client_port)}
        return next(pid for pid in self.workers if inodes & {*descriptors(pid)})


@contextmanager
def workers(data: Path, quiet: bool = True, **settings: object) -> Iterator[Workers]:
    """Two workers of uvicorn, and a scripted hub. Where `quiet` is set, the log must have no traceback."""
    environment = {f"PARLEY_{name.upper()}": str(value) for name, value in ({"data": data} | settings).items()}
    command = [sys.executable, "-m", "uvicorn", "tests.support.worker_apps:worker", "--factory"]
    with subprocess.Popen(
        [*command, "--workers=2", "--port=0", "--timeout-graceful-shutdown=1"],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that a signal can go to the whole group, as from a terminal
    ) as process:
        supervisor = Supervisor(process)
        try:
            yield Workers(supervisor)
        finally:
            process.kill()  # the others end when they see that
            supervisor.log.whole()
    assert not (quiet and COMPLAINT.search(supervisor.log.text)), supervisor.log.text


def runs(pid: int) -> bool:
    """Whether a process runs."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def descriptors(pid: int) -> Iterator[str]:
    """What the descriptors of a process stand for."""
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            yield os.readlink(f"/proc/{pid}/fd/{descriptor}")


def inodes_of(port: int, peer: int) -> Iterator[str]:
    """The inodes of the sockets with a port and the port of their peer."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if [int(address.rpartition(":")[2], 16) for address in fields[1:3]] == [port, peer]:
            yield fields[9]
