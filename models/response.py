"""A reply that is being made, and those who follow it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from models import events
from models.events import Json, ResponseCreate
from models.item import Item, Status
from models.options import Options
from models.refused import Refused
from models.reply import Delta, Done, Queued, Usage

BATCH = 256  # deltas that are replayed before the reader has to have read them


class Listener(Protocol):
    """Who is told of a reply."""

    def send(self, event: Json) -> None:
        """Take an event, without waiting."""


class Reader(Listener, Protocol):
    """A listener that can be sent much at once."""

    async def drained(self) -> None:
        """Wait until it has read all it was sent."""


@dataclass(eq=False)
class Response:
    """A reply as the wire has it. `conversation` None is none at all, `begins` one that need not be there yet, `new`
    one that cannot be.

    Of a `completion` nothing is left out and nothing kept: it is for one who listens, and has it all at its end.
    """

    user: str
    request: ResponseCreate
    conversation: str | None
    begins: bool
    options: Options
    new: bool = False
    completion: bool = False
    chosen: Mapping[str, Any] = field(default_factory=dict)  # the options that are not the usual ones
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: float = field(default_factory=time.time)
    asked_at: float = field(default_factory=time.monotonic)
    status: Status = "in_progress"
    reason: str | None = None
    usage: Usage = field(default_factory=lambda: Usage(0))
    left_out: int = 0
    deltas: list[str] = field(default_factory=list)
    listeners: dict[Listener, bool] = field(default_factory=dict)  # and whether they have heard all so far
    announced: bool = False
    refused: Refused | None = None
    finished: bool = False
    warned: bool = False
    cancelled_as: tuple[Status, str] | None = None
    making: asyncio.Task[None] = field(init=False)
    ending: asyncio.Task[None] = field(init=False)
    unheard: asyncio.TimerHandle | None = None
    _cuts: list[str] = field(default_factory=list)
    _position: int = 0
    _first_at: float = 0.0
    _last_at: float = 0.0

    @property
    def item(self) -> Item:
        """The reply as it is kept, as far as it has come."""
        return Item(
            self.id,
            "assistant",
            "".join(self.deltas),
            self.created,
            self.status,
            self.reason,
            self.usage.public(),
            self.chosen,
            self.left_out,
            " ".join(self._cuts),
            self._last_at - self._first_at,
        )

    def announce(self) -> None:
        """Tell that the reply is on its way, and that the message is kept."""
        self.announced = True
        self._tell(events.response_created(self.id, self.conversation, self.left_out, self.request.event_id))
        if self.cancelled_as:
            self.making.cancel()

    def take(self, event: Queued | Delta | Done) -> None:
        """Take what comes of the reply, and tell it."""
        match event:
            case Queued(position):
                self._position = position
                self._tell(events.response_queued(self.id, position))
            case Delta(text):
                self._last_at = asyncio.get_running_loop().time()
                self._first_at = self._first_at or self._last_at
                self._position = 0
                self.deltas.append(text)
                self._cuts.append(str(len(text)))
                self._tell(events.output_text_delta(self.id, len(self.deltas), text))
            case Done(reason):
                self.status, self.reason = "completed" if reason == "stop" else "incomplete", reason

    def cancel(self, status: Status = "cancelled", reason: str = "client_cancelled") -> None:
        """End the reply, once it is announced: until then its message is not kept."""
        self.cancelled_as = self.cancelled_as or (status, reason)
        if self.announced:
            self.making.cancel()

    def refuse(self, refused: Refused) -> None:
        """Tell why there is no reply."""
        self.refused = refused
        self._tell(events.error(refused, self.request.event_id))

    def warn(self, refused: Refused) -> None:
        """Tell what is wrong though the reply goes on, the first time."""
        if not self.warned:
            self.warned = True
            self._tell(events.error(refused, response_id=self.id))

    def finish(self) -> None:
        """Tell that this was all."""
        self.finished = True
        self._tell(events.response_done(self.conversation, self.item))

    async def follow(self, reader: Reader, starting_after: int) -> None:
        """Send a reader what came after a delta, then have it hear what comes."""
        self.listeners[reader] = False
        await replay(reader, self.id, self.deltas, starting_after)
        if self.finished:
            return reader.send(events.response_done(self.conversation, self.item))
        if self._position:
            reader.send(events.response_queued(self.id, self._position))
        self.listeners[reader] = True

    def _tell(self, event: Json) -> None:
        for listener, heard_all in self.listeners.items():
            if heard_all:
                listener.send(event)


async def replay(reader: Reader, response_id: str, deltas: Sequence[str], starting_after: int) -> None:
    """Send a reader the deltas after a number, those too that are added meanwhile."""
    while batch := deltas[starting_after : starting_after + BATCH]:
        for delta in batch:
            starting_after += 1
            reader.send(events.output_text_delta(response_id, starting_after, delta))
        if len(batch) == BATCH:
            await reader.drained()
