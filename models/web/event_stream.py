"""Responses of server-sent events, and the end of the client's connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

SILENT_SECONDS = 15.0  # proxies close a connection that is silent for longer, often for a minute


class EventStreamResponse(StreamingResponse):
    """Sends server-sent events. Calls `on_disconnect` when the client disconnects, even while nothing is being sent.

    A stream that is silent for some seconds gets a comment.
    """

    silent_seconds = SILENT_SECONDS

    def __init__(self, frames: AsyncIterator[str], on_disconnect: Callable[[], None]) -> None:
        headers = {"X-Accel-Buffering": "no"}  # nginx passes each event on at once
        super().__init__(self._noting_time(frames), media_type="text/event-stream", headers=headers)
        self._on_disconnect = on_disconnect
        self._sent_at = time.monotonic()
        self._commenting: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        try:
            async with calls_at_disconnect(self._on_disconnect, receive):
                await self.stream_response(send)
        finally:
            self._end_comments()

    async def _noting_time(self, frames: AsyncIterator[str]) -> AsyncIterator[str]:
        """The frames, while another task sends comments; it ends before the end of the stream is sent."""
        self._commenting = asyncio.create_task(self._send_comments())
        async for frame in frames:
            self._sent_at = time.monotonic()
            yield frame
        self._end_comments()

    def _end_comments(self) -> None:
        if self._commenting:
            self._commenting.cancel()

    async def _send_comments(self) -> None:
        while True:
            silent = time.monotonic() - self._sent_at
            if silent >= self.silent_seconds:
                await self._send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
                self._sent_at, silent = time.monotonic(), 0.0
            await asyncio.sleep(self.silent_seconds - silent)


@asynccontextmanager
async def calls_at_disconnect(on_disconnect: Callable[[], None], receive: Receive) -> AsyncIterator[None]:
    """Call a function as soon as the client disconnects, or when the context ends."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    listening = asyncio.create_task(disconnected())
    listening.add_done_callback(lambda _: on_disconnect())
    try:
        yield
    finally:
        listening.cancel()
