"""A follower that gets each event once, although a response is followed again and again."""

from __future__ import annotations

from dataclasses import replace

from models.errors import ResponseNotFoundError
from models.generation.events import (
    Created,
    Finished,
    OutputDelta,
    OutputItemAdded,
    OutputItemDone,
    Rejected,
    ResponseEvent,
)
from models.generation.interface import Follower
from models.store.item import Status


class OnceFollower:
    """Passes the events of one response on, but not those that it has passed on before.

    A response begins with `Created` each time it is followed, and all text comes again. The pieces of the text may be
    others then: in the database, they are longer.
    """

    def __init__(self, follower: Follower, id: str) -> None:
        self.ended = False
        self._follower = follower
        self._id = id
        self._created: Created | None = None
        self._begun = self._done = 0  # parts
        self._length = 0  # characters of the last part that has begun
        self._known = 0  # how many of them still come again

    def on_event(self, event: ResponseEvent) -> None:
        """Pass on what is new of an event."""
        if not self.ended and (new := self._new(event)):
            self.ended = isinstance(new, Finished | Rejected)
            self._follower.on_event(new)

    async def wait_sent(self) -> None:
        """Wait until the follower has passed on all events."""
        await self._follower.wait_sent()

    def end_deleted(self) -> None:
        """The response was deleted, and nobody knows its end."""
        if self._created is None:
            return self.on_event(Rejected(self._id, ResponseNotFoundError("there is no such response")))
        cancelled = replace(self._created.reply, status=Status.CANCELLED, reason="client_disconnected")
        self.on_event(Finished(self._created.conversation, cancelled))

    def _new(self, event: ResponseEvent) -> ResponseEvent | None:
        match event:
            case Created():
                self._known = self._length
                if self._created:
                    return None
                self._created = event
            case OutputItemAdded(index=index):
                if index < self._begun:
                    return None
                self._begun, self._length, self._known = index + 1, 0, 0
            case OutputDelta(index=index):
                return self._new_text(event) if index == self._begun - 1 else None
            case OutputItemDone(index=index):
                if index < self._done:
                    return None
                self._done = index + 1
        return event

    def _new_text(self, delta: OutputDelta) -> OutputDelta | None:
        known = min(self._known, len(delta.text))
        self._known -= known
        self._length += len(delta.text) - known
        if not known:
            return delta
        return OutputDelta(self._id, delta.index, delta.text[known:]) if known < len(delta.text) else None
