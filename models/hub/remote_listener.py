"""A listener of another process."""

from __future__ import annotations

from dataclasses import dataclass

from models.generation.events import ResponseEvent
from models.hub.link import Link
from models.hub.wire import OnceEncoder
from models.hub.worker_calls import WorkerCalls


@dataclass(frozen=True)
class RemoteListener:
    """A listener at the other end of a link, by its number."""

    link: Link
    number: int
    encoder: OnceEncoder

    def on_event(self, event: ResponseEvent) -> None:
        """Send the listener an event."""
        self.link.tell_numbered(WorkerCalls.on_event, self.number, event, self.encoder.encode)

    async def wait_sent(self) -> None:
        """Wait until the listener has passed on all events."""
        await self.link.call(WorkerCalls.wait_sent, self.number)
