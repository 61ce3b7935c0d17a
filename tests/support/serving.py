"""A real uvicorn in a thread."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette

from models.web.http_protocol import HTTPProtocol
from models.web.serving import UVICORN_FRAME_BYTES

OPTIONS: dict[str, Any] = {
    "port": 0,
    "ws_max_size": UVICORN_FRAME_BYTES,
    "ws_per_message_deflate": False,
    "log_config": None,
    "http": HTTPProtocol,
    "proxy_headers": False,
}


class EventfulServer(uvicorn.Server):
    """A uvicorn for a thread. It reports its start, and stops at once, where uvicorn looks every 0.1 s."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.started_or_failed = threading.Event()
        self.loop: asyncio.AbstractEventLoop
        self._stopped: asyncio.Event

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        with suppress(SystemExit):  # the start failed, and the log says why
            super().run(sockets)
        self.started_or_failed.set()

    def stop(self) -> None:
        """Begin to stop. To be called from another thread, while the server runs."""
        self.should_exit = True
        self.loop.call_soon_threadsafe(self._stopped.set)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        await super().startup(sockets)
        self.started_or_failed.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # renews the Date header
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._stopped.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop like uvicorn, but without its pause of 0.1 s where all clients have gone."""
        state = self.server_state
        for _ in range(20):  # the sockets of clients that have just gone are about to close
            if not state.connections and not state.tasks:
                for server in self.servers:
                    server.close()
                    await server.wait_closed()
                await self.lifespan.shutdown()
                return
            await asyncio.sleep(0.005)
        await super().shutdown(sockets)


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

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self.server.loop

    def in_loop(self, function: Callable[[], Any]) -> None:
        """Call a function in the server's event loop."""
        self.loop.call_soon_threadsafe(function)


@contextmanager
def serve(app: Starlette, **options: Any) -> Iterator[Served]:
    """Run an app as `python server.py` does, on a free port of the loopback address unless `port` is given."""
    server = EventfulServer(uvicorn.Config(app, "127.0.0.1", **OPTIONS | options))
    thread = threading.Thread(target=server.run)
    thread.start()
    server.started_or_failed.wait()
    try:
        assert server.started, "the server did not start"
        host, port = server.servers[0].sockets[0].getsockname()
        yield Served(app, f"{host}:{port}", server)
    finally:
        if server.started:
            server.stop()
        thread.join()
