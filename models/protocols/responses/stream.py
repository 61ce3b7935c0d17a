"""A response over HTTP: whole, as JSON, or streamed, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any

from models.generation.events import Created, Finished, Rejected, ResponseEvent
from models.model_info import ModelList
from models.protocols.responses.events import EventRenderer
from models.protocols.responses.resource import render_response
from models.validation import Json


class ResponseResult:
    """Waits for the response of one request, which is returned as one object."""

    def __init__(self, models: ModelList) -> None:
        self._models = models
        self._created: asyncio.Future[Created | Rejected] = asyncio.get_running_loop().create_future()
        self._last: asyncio.Future[Finished | Rejected] = asyncio.get_running_loop().create_future()

    def on_event(self, event: ResponseEvent) -> None:
        """Keep the first and the last event, and ignore all others."""
        if isinstance(event, Created | Rejected) and not self._created.done():
            self._created.set_result(event)
        if isinstance(event, Finished | Rejected) and not self._last.done():
            self._last.set_result(event)

    async def created(self) -> Json:
        """The response when the request is accepted, which may wait for a slot. Raises APIError."""
        event = await self._created
        if isinstance(event, Rejected):
            raise event.error
        return render_response(self._models, event.conversation, event.reply, "queued")

    async def finished(self) -> Json:
        """The response when it has ended. Raises APIError."""
        event = await self._last
        if isinstance(event, Rejected):
            raise event.error
        # In a thread: probabilities of many tokens take long.
        return await asyncio.to_thread(render_response, self._models, event.conversation, event.reply)


class ResponseStream:
    """The events of one response after the number `starting_after`, as server-sent events."""

    def __init__(self, models: ModelList, starting_after: int = -1) -> None:
        self._renderer = EventRenderer(models)
        self._starting_after = starting_after
        self._events: asyncio.Queue[ResponseEvent | None] = asyncio.Queue()
        self._first: asyncio.Future[ResponseEvent] = asyncio.get_running_loop().create_future()

    def on_event(self, event: ResponseEvent) -> None:
        """Keep an event for the client."""
        if not self._first.done():
            self._first.set_result(event)
        self._events.put_nowait(event)

    async def wait_sent(self) -> None:
        """Wait until all events so far are sent."""
        await self._events.join()

    async def wait_accepted(self) -> None:
        """Wait until the request is accepted. Raises APIError if it is rejected."""
        event = await self._first
        if isinstance(event, Rejected):
            raise event.error

    async def frames(self) -> AsyncIterator[str]:
        """The server-sent events, up to the last one."""
        while True:
            event = await self._events.get()
            for rendered in self._renderer.render(event) if event else ():
                if rendered["sequence_number"] > self._starting_after:
                    yield f"event: {rendered['type']}\ndata: {json.dumps(rendered, separators=(',', ':'))}\n\n"
            self._events.task_done()
            if event is None or isinstance(event, Finished | Rejected):
                return

    def close(self) -> None:
        """End the server-sent events: nobody reads them any more, or no more events come."""
        self._events.put_nowait(None)

    async def followed(self, follow: Coroutine[Any, Any, None]) -> AsyncGenerator[str, None]:
        """The server-sent events of a response that `follow` sends here."""
        following = asyncio.create_task(follow)
        following.add_done_callback(self._on_followed)
        try:
            async for frame in self.frames():
                yield frame
        finally:
            following.cancel()

    def _on_followed(self, following: asyncio.Task[None]) -> None:
        if not following.cancelled() and following.exception():
            self.close()
