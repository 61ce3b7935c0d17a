from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from models.web.paced_listener import BURST, TURNS, PacedListener

pytestmark = pytest.mark.anyio


@pytest.fixture
def listener() -> Iterator[PacedListener]:
    with PacedListener.of(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        yield listener


def accepted(listener: PacedListener, stack: ExitStack) -> int:
    """Accept as asyncio does; returns how many connections there were."""
    count = 0
    while True:
        try:
            stack.enter_context(listener.accept()[0])
        except BlockingIOError:
            return count
        count += 1


async def test_of_many_connections_a_few_are_accepted_at_a_time(listener: PacedListener) -> None:
    with ExitStack() as stack:
        for _ in range(BURST + 3):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        assert accepted(listener, stack) == BURST
        for _ in range(TURNS - 1):
            await asyncio.sleep(0)
            assert accepted(listener, stack) == 0
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert accepted(listener, stack) == 3


async def test_a_server_answers_all_of_many_connections(listener: PacedListener) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"hello\n")
        line = await reader.read()
        writer.close()
        return line

    async with await asyncio.start_server(answer, sock=listener):
        assert await asyncio.gather(*(ask() for _ in range(5 * BURST))) == [b"hello\n"] * (5 * BURST)
