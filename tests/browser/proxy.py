"""A proxy whose connections can be cut, and which can lose data."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Direction = Literal["up", "down"]  # towards the server, or the page


class Proxy(socketserver.ThreadingTCPServer):
    """Passes TCP connections on to a port of this machine. Data in a direction of `lost` does not arrive."""

    daemon_threads = False

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.server_port = port
        self.lost: set[Direction] = set()
        self.is_cut = False
        self.open: set[socket.socket] = set()

    @classmethod
    @contextmanager
    def to(cls, port: int) -> Iterator[Proxy]:
        """A proxy that runs while the context lasts."""
        with cls(port) as proxy:
            thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            try:
                yield proxy
            finally:
                proxy.cut()
                proxy.shutdown()
                thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def cut(self) -> None:
        """End all connections, and refuse new ones until `mend`."""
        self.is_cut = True
        for end in list(self.open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Pass on all connections and all data again."""
        self.lost.clear()
        self.is_cut = False


class Connection(socketserver.BaseRequestHandler):
    """A connection of the page, and the one to the server that belongs to it."""

    server: Proxy

    def handle(self) -> None:
        if self.server.is_cut:
            return
        with socket.create_connection(("127.0.0.1", self.server.server_port)) as upstream:
            ends = {self.request, upstream}
            self.server.open |= ends
            down = threading.Thread(target=self.pass_on, args=(upstream, self.request, "down"))
            down.start()
            self.pass_on(self.request, upstream, "up")
            down.join()
            self.server.open -= ends

    def pass_on(self, source: socket.socket, target: socket.socket, direction: Direction) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                if direction not in self.server.lost:
                    target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
