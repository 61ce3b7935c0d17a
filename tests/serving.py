"""A real uvicorn in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette

from server import UVICORN_FRAME_BYTES


class EventfulServer(uvicorn.Server):
    """Says when it has started, or failed to."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.started_or_failed = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.started_or_failed.set()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            super().run(sockets)
        except SystemExit:  # the log says why
            self.started_or_failed.set()


@dataclass
class Served:
    """A running server: its app and where it listens."""

    app: Starlette
    address: str  # host:port
    server: EventfulServer

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def ws(self) -> str:
        return f"ws://{self.address}/ws"

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def in_loop(self, function: Callable[[], Any]) -> None:
        """Call a function in the server's event loop."""
        self.loop.call_soon_threadsafe(function)

    @property
    def loop(self) -> Any:
        return self.server.servers[0].get_loop()


@contextmanager
def serve(app: Starlette, **options: Any) -> Iterator[Served]:
    """Run an app as `python server.py` does, on a free port of the loopback address unless `port` is given."""
    options = {
        "port": 0,
        "ws_max_size": UVICORN_FRAME_BYTES,
        "ws_per_message_deflate": False,
        "log_config": None,
    } | options
    server = EventfulServer(uvicorn.Config(app, "127.0.0.1", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    server.started_or_failed.wait()
    try:
        assert server.started, "the server did not start"
        host, port = server.servers[0].sockets[0].getsockname()
        yield Served(app, f"{host}:{port}", server)
    finally:
        server.should_exit = True
        thread.join()
