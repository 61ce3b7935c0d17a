"""Connections between two sides in this process, and to a side that sends bytes of a test's own."""

from __future__ import annotations

import asyncio
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from models.hub.link import Link
from models.hub.wire import Frame, take_frames


@asynccontextmanager
async def joined(service: object, other: object = None, **options: Any) -> AsyncIterator[tuple[Link, Link]]:
    """Two ends of a connection: what the first one calls is `service`, and what the second one calls is `other`."""
    ends = socket.socketpair()
    links = await _link(ends[0], other, options), await _link(ends[1], service, options)
    try:
        for link in links:
            await link.wait_greeted()
        yield links
    finally:
        for link in links:
            link.close()
            await link.lost.wait()


@asynccontextmanager
async def joined_to_bytes(
    service: object = None, **options: Any
) -> AsyncIterator[tuple[Link, StreamReader, StreamWriter]]:
    """A link, and the bytes at the other end of its connection."""
    ends = socket.socketpair()
    link = await _link(ends[0], service, options)
    reader, writer = await asyncio.open_unix_connection(sock=ends[1])
    try:
        yield link, reader, writer
    finally:
        link.close()
        writer.close()
        await link.lost.wait()


async def _link(end: socket.socket, service: object, options: dict[str, Any]) -> Link:
    loop = asyncio.get_running_loop()
    _, link = await loop.create_unix_connection(lambda: Link(lambda _: service, **options), sock=end)
    return link


class FakeTransport(asyncio.Transport):
    """Keeps each write, and sends nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def frames(self) -> list[Frame]:
        """All frames that were written."""
        return [*take_frames(bytearray(b"".join(self.writes)))]
