"""A way between two hosts that a test can cut."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Cable:
    """Passes the bytes of connections on to another port. While it is cut, they wait, and nobody is told."""

    def __init__(self, port: int) -> None:
        self.address: str
        self._port = port
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def to(cls, address: str) -> AsyncIterator[Cable]:
        """A cable to an address."""
        cable = cls(int(address.rpartition(":")[2]))
        server = await asyncio.start_server(cable._connect, "127.0.0.1", 0)
        cable.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield cable
        finally:
            server.close()
            for task in cable._tasks:
                task.cancel()
            await asyncio.gather(*cable._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

    async def _connect(self, reader: StreamReader, writer: StreamWriter) -> None:
        others = await asyncio.open_connection("127.0.0.1", self._port)
        for source, sink in ((reader, others[1]), (others[0], writer)):
            task = asyncio.create_task(self._pass_on(source, sink))
            self._tasks.add(task)

    async def _pass_on(self, source: StreamReader, sink: StreamWriter) -> None:
        try:
            with suppress(OSError):
                while data := await source.read(2**16):
                    await self._whole.wait()
                    sink.write(data)
        finally:
            sink.close()
