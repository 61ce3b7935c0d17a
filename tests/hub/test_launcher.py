from __future__ import annotations

import asyncio
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from models.hub.launcher import LOCK, MAX_PAUSE, MIN_PAUSE, SOCKET, STEADY_SECONDS, Launcher, socket_path
from tests.support.fake_clock import FakeClock

ENDS = "echo $$ >> started"
LIVES = f"{ENDS}; read end < end"  # until a test writes to `end`


class Hubs:
    """Hubs that are shell scripts, and launchers of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = FakeClock()
        os.mkfifo(folder / "end")

    def launcher(self, script: str = ENDS) -> Launcher:
        """A launcher of hubs, as one worker has it."""
        return Launcher(self.folder, ["sh", "-c", f"cd '{self.folder}'; {script}"], os.getpid(), self.clock)

    @property
    def started(self) -> list[int]:
        """The processes of all hubs that have been started, once the last one has ended."""
        with locked(self.folder):
            text = (self.folder / "started").read_text() if (self.folder / "started").exists() else ""
        return [int(line) for line in text.split()]

    def end(self) -> None:
        """Let the hub that runs end."""
        (self.folder / "end").write_text("\n")

    def reap(self, launcher: Launcher) -> None:
        """Wait for the last hub of a launcher, and let the launcher know that it has ended."""
        with suppress(ChildProcessError):  # it knows already
            os.waitid(os.P_PID, self.started[-1], os.WEXITED | os.WNOWAIT)
        with locked(self.folder):
            launcher.launch()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a hub, once it is free."""
    with open(folder / LOCK, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def hubs(tmp_path: Path) -> Hubs:
    return Hubs(tmp_path)


# One hub at a time


def test_a_hub_that_runs_is_not_started_again_by_any_launcher(hubs: Hubs) -> None:
    first, second = hubs.launcher(LIVES), hubs.launcher(LIVES)
    first.launch()
    hubs.clock.now += STEADY_SECONDS
    first.launch()
    second.launch()
    hubs.end()
    assert len(hubs.started) == 1
    hubs.reap(first)


def test_a_hub_is_not_started_while_another_process_holds_the_lock_and_at_once_when_it_is_free(hubs: Hubs) -> None:
    launcher = hubs.launcher()
    with locked(hubs.folder):
        launcher.launch()
    assert hubs.started == []
    launcher.launch()
    assert len(hubs.started) == 1
    hubs.reap(launcher)


def test_the_next_hub_is_started_by_whichever_launcher_asks_first(hubs: Hubs) -> None:
    first, second = hubs.launcher(), hubs.launcher()
    first.launch()
    hubs.reap(first)
    second.launch()
    assert len(hubs.started) == 2
    hubs.reap(second)


def test_the_hub_gets_the_descriptor_of_the_lock(hubs: Hubs) -> None:
    launcher = hubs.launcher(f"{ENDS}; readlink /proc/self/fd/$0 > descriptor")
    launcher.launch()
    hubs.reap(launcher)
    assert (hubs.folder / "descriptor").read_text().strip() == str(hubs.folder / LOCK)


def test_only_its_owner_can_open_the_lock(hubs: Hubs) -> None:
    launcher = hubs.launcher()
    launcher.launch()
    hubs.reap(launcher)
    assert stat.S_IMODE((hubs.folder / LOCK).stat().st_mode) == 0o600


def test_a_launch_leaves_no_descriptor_open(hubs: Hubs) -> None:
    launcher = hubs.launcher(LIVES)
    before = os.listdir("/proc/self/fd")
    launcher.launch()
    hubs.clock.now += STEADY_SECONDS
    launcher.launch()
    assert os.listdir("/proc/self/fd") == before
    hubs.end()
    hubs.reap(launcher)


def test_a_command_that_cannot_be_run_leaves_the_lock_free(hubs: Hubs) -> None:
    launcher = Launcher(hubs.folder, [str(hubs.folder / "none")], os.getpid(), hubs.clock)
    with pytest.raises(FileNotFoundError):
        launcher.launch()
    other = hubs.launcher()
    other.launch()
    hubs.reap(other)
    assert len(hubs.started) == 1


# Hubs that end soon


def pauses(hubs: Hubs, launcher: Launcher, count: int) -> list[float]:
    """After how many seconds each next hub is started, if it is asked for all the time."""
    found, last = list[float](), hubs.clock.now
    launcher.launch()
    for _ in range(count):
        hubs.reap(launcher)
        before = hubs.started
        while hubs.started == before:
            hubs.clock.now += MIN_PAUSE
            launcher.launch()
        found.append(hubs.clock.now - last)
        last = hubs.clock.now
    hubs.reap(launcher)
    return found


def test_a_hub_that_ends_at_once_is_started_again_after_longer_and_longer_pauses(hubs: Hubs) -> None:
    assert pauses(hubs, hubs.launcher(), 8) == [0.5, 1, 2, 4, 8, 16, MAX_PAUSE, MAX_PAUSE]


def test_a_hub_that_nobody_had_to_ask_for_is_started_again_at_once(hubs: Hubs) -> None:
    launcher = hubs.launcher()
    pauses(hubs, launcher, 3)
    hubs.clock.now += STEADY_SECONDS
    launcher.launch()
    assert len(hubs.started) == 5
    assert pauses(hubs, launcher, 1) == [MIN_PAUSE]


def test_a_hub_that_another_launcher_has_started_is_started_again_at_once(hubs: Hubs) -> None:
    first, second = hubs.launcher(LIVES), hubs.launcher()
    first.launch()
    second.launch()
    hubs.end()
    hubs.reap(first)
    second.launch()
    assert len(hubs.started) == 2
    hubs.reap(second)


# The socket


def test_a_short_path_is_used_as_it_is(tmp_path: Path) -> None:
    with socket_path(Path("/tmp")) as path:
        assert path == f"/tmp/{SOCKET}"


@pytest.mark.anyio
async def test_a_socket_in_a_folder_with_a_long_path_can_be_opened_and_used(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 20) / ("longer" * 20)
    folder.mkdir(parents=True)
    accepted = asyncio.Event()

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        writer.close()

    with socket_path(folder) as path:
        server = await asyncio.start_unix_server(accept, path)
    assert stat.S_ISSOCK((folder / SOCKET).stat().st_mode)
    with socket_path(folder) as path:
        _, writer = await asyncio.open_unix_connection(path)
    await accepted.wait()
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()


def test_a_long_path_leaves_no_descriptor_open(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    before = os.listdir("/proc/self/fd")
    with socket_path(folder) as path:
        assert len(path) < 100
    assert os.listdir("/proc/self/fd") == before
