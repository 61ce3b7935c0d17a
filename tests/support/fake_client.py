"""Clients and listeners in memory, for tests without a server."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from models.generation.events import Finished, OutputDelta, ResponseEvent
from models.validation import Json

Event = TypeVar("Event", bound=ResponseEvent)


class FakeClient:
    """The `Client` of a protocol's session: keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[Any] = asyncio.Queue()

    def send_text(self, text: str) -> None:
        self.sent.put_nowait(text)

    def send_json(self, value: Json) -> None:
        self.sent.put_nowait(value)

    async def wait_sent(self) -> None:
        """Everything that was sent counts as read."""

    async def text(self, length: int) -> str:
        """The next characters of the text frames."""
        text = ""
        while len(text) < length:
            text += await self.sent.get()
        return text

    async def until(self, type: str) -> list[Json]:
        """All JSON events up to the next of a type, which is the last."""
        events = [await self.sent.get()]
        while events[-1]["type"] != type:
            events.append(await self.sent.get())
        return events

    def rest(self) -> list[Any]:
        """All frames that were sent and not taken yet."""
        return [self.sent.get_nowait() for _ in range(self.sent.qsize())]


class FakeListener:
    """A `Follower` of replies. While `reading` is cleared it cannot pass events on; `behind` is set when it is waited
    for."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[ResponseEvent] = asyncio.Queue()
        self.reading, self.behind = asyncio.Event(), asyncio.Event()
        self.reading.set()

    def on_event(self, event: ResponseEvent) -> None:
        self.heard.put_nowait(event)

    async def wait_sent(self) -> None:
        self.behind.set()
        await self.reading.wait()

    async def until(self, kind: type[ResponseEvent]) -> list[ResponseEvent]:
        """All events up to the next of a kind, which is the last."""
        events = [await self.heard.get()]
        while not isinstance(events[-1], kind):
            events.append(await self.heard.get())
        return events

    async def next(self, kind: type[Event]) -> Event:
        """The next event of a kind; those before it are skipped."""
        while not isinstance(event := await self.heard.get(), kind):
            pass
        return event

    def rest(self) -> list[ResponseEvent]:
        """All events that have come and were not taken yet."""
        return [self.heard.get_nowait() for _ in range(self.heard.qsize())]

    async def deltas(self) -> list[str]:
        """The pieces of all parts up to the end of the reply."""
        return [event.text for event in await self.until(Finished) if isinstance(event, OutputDelta)]
