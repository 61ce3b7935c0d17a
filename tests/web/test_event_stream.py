"""Server-sent events over ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from models.web.event_stream import EventStreamResponse
from tests.support.sockets import wait_for_other_tasks

pytestmark = pytest.mark.anyio


class Client:
    """What a web server is for a response: takes its messages, and says when the client has gone."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.gone = asyncio.Event()

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.put_nowait(message)

    async def body(self) -> bytes:
        """The next part of the body."""
        while "body" not in (message := await self.messages.get()):
            pass
        return bytes(message["body"])


class Frames:
    """The frames of a stream, which a test adds; None ends it."""

    def __init__(self, *frames: str | None) -> None:
        self.frames: asyncio.Queue[str | None] = asyncio.Queue()
        for frame in frames:
            self.frames.put_nowait(frame)

    async def iterate(self) -> AsyncIterator[str]:
        while (frame := await self.frames.get()) is not None:
            yield frame


def run(response: EventStreamResponse, client: Client) -> asyncio.Task[None]:
    return asyncio.create_task(response({"type": "http"}, client.receive, client.send))


async def test_a_silent_stream_gets_comments_until_it_goes_on() -> None:
    client, frames = Client(), Frames("data: 1\n\n")
    response = EventStreamResponse(frames.iterate(), lambda: None)
    response.silent_seconds = 0.01
    running = run(response, client)
    assert await client.body() == b"data: 1\n\n"
    for _ in range(3):
        assert await client.body() == b": keep-alive\n\n"
    frames.frames.put_nowait("data: 2\n\n")
    frames.frames.put_nowait(None)
    while (body := await client.body()) == b": keep-alive\n\n":
        pass
    assert body == b"data: 2\n\n"
    await running
    assert await client.body() == b""
    assert client.messages.empty()


async def test_a_stream_that_is_never_silent_gets_no_comment() -> None:
    client, frames = Client(), Frames("data: 1\n\n", "data: 2\n\n", None)
    await run(EventStreamResponse(frames.iterate(), lambda: None), client)
    assert [await client.body() for _ in range(3)] == [b"data: 1\n\n", b"data: 2\n\n", b""]


async def test_nothing_is_sent_before_the_headers_or_after_the_end() -> None:
    client, frames = Client(), Frames()
    response = EventStreamResponse(frames.iterate(), lambda: None)
    response.silent_seconds = 0.0
    running = run(response, client)
    start = await client.messages.get()
    assert start["type"] == "http.response.start"
    assert (b"x-accel-buffering", b"no") in start["headers"]
    assert await client.body() == b": keep-alive\n\n"
    frames.frames.put_nowait(None)
    await running
    messages = [client.messages.get_nowait() for _ in range(client.messages.qsize())]
    assert [message["more_body"] for message in messages] == [True] * (len(messages) - 1) + [False]


async def test_a_client_that_disconnects_is_told_of_at_once() -> None:
    client, gone = Client(), asyncio.Event()
    running = run(EventStreamResponse(Frames().iterate(), gone.set), client)
    await client.messages.get()
    client.gone.set()
    await gone.wait()
    running.cancel()
    await asyncio.wait([running])


async def test_a_stream_that_is_cancelled_sends_no_more_comments() -> None:
    before = asyncio.all_tasks()
    client, frames = Client(), Frames("data: 1\n\n")
    running = run(EventStreamResponse(frames.iterate(), lambda: None), client)
    assert await client.body() == b"data: 1\n\n"
    assert len(asyncio.all_tasks() - before) == 3  # the response, its comments, and what waits for the client
    running.cancel()
    await wait_for_other_tasks(before)
