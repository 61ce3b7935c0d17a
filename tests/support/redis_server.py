"""A real Redis server for a test, which the test may freeze, kill and start again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REDIS = shutil.which("redis-server") or shutil.which("valkey-server")


class RedisServer:
    """A server that listens at a socket in its folder, and nowhere else. It keeps nothing when it is killed."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[str] | None = None

    @classmethod
    @contextmanager
    def installed(cls) -> Iterator[RedisServer]:
        """A server that does not run yet, and is killed when the context ends."""
        if not REDIS:
            pytest.skip("Redis is not installed: there is no redis-server or valkey-server")
        with tempfile.TemporaryDirectory(prefix="parley-") as folder:  # tmp_path is too long for a socket
            server = cls(Path(folder))
            try:
                yield server
            finally:
                server.kill()

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        assert REDIS
        command = [REDIS, "--port", "0", "--unixsocket", str(self.socket), "--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=self.socket.parent)
        assert self._process.stdout
        assert any("eady to accept connections" in line for line in self._process.stdout), "Redis does not start"

    def kill(self) -> None:
        """End it at once, if it runs."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def freeze(self) -> None:
        """Let it take connections and questions, but answer none."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)


@pytest.fixture
def stopped_redis() -> Iterator[RedisServer]:
    """A Redis server that does not run yet."""
    with RedisServer.installed() as server:
        yield server


@pytest.fixture
def redis_server(stopped_redis: RedisServer) -> RedisServer:
    """A Redis server that is empty."""
    stopped_redis.start()
    return stopped_redis
