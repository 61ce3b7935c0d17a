"""A response that is running, and its listeners."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine, Sequence
from enum import Enum, auto
from typing import Any

from models.errors import APIError
from models.generation.events import Created, Finished, Queued, Rejected, ResponseEvent, TextDelta, Warned
from models.generation.interface import Follower, Listener, NewConversation, ResponseRequest, StoredConversation
from models.messages import FinishReason, Usage
from models.options import Options
from models.store.item import Item, Status

BATCH = 256  # how many text deltas are replayed before the follower must have passed them on


class Phase(Enum):
    """The phase of a response."""

    READING = auto()  # the earlier messages are being read
    PREPARING = auto()  # its prompt is being made
    STORING = auto()  # its messages are being stored
    ANNOUNCED = auto()  # it has sent `Created`: it waits for a slot, or generates
    FINISHED = auto()


CANCELLABLE = (Phase.PREPARING, Phase.ANNOUNCED)  # in the other phases, a cancellation waits for the next one


class ActiveResponse:
    """A response that is running. It keeps the text so far, and sends events to its listeners.

    `ResponseManager` runs it: one task generates the reply, a second one waits for the end of the first and stores the
    result. Only `ResponseManager` calls its methods.
    """

    def __init__(self, request: ResponseRequest, defaults: Options) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self.request = request
        self.created = time.time()
        self.phase = Phase.READING
        self.status = Status.IN_PROGRESS
        self.reason: str | None = None
        self.usage = Usage(0)
        self._options = request.options.differences(defaults)
        self._left_out = 0
        self._deltas: list[str] = []
        self._cuts: list[str] = []  # the lengths of the deltas
        self._first_at = self._last_at = 0.0  # when the first and the last delta were added
        self._position = 0  # in the wait queue
        self._listeners: dict[Listener, bool] = {}  # the value: whether it has caught up
        self._cancellation: tuple[Status, str] | None = None
        self._warned = False
        self._timeout: asyncio.TimerHandle | None = None  # ends a response that nobody follows
        self._started_at = time.monotonic()
        self._generating: asyncio.Task[None]
        self._concluding: asyncio.Task[None]

    @property
    def user(self) -> str:
        return self.request.user

    @property
    def conversation(self) -> str | None:
        """The id of the conversation that keeps the reply, if any."""
        target = self.request.target
        return target.id if isinstance(target, NewConversation | StoredConversation) else None

    @property
    def seconds(self) -> float:
        """How long ago the response started."""
        return time.monotonic() - self._started_at

    @property
    def has_text(self) -> bool:
        return bool(self._deltas)

    @property
    def item(self) -> Item:
        """The reply so far, as it is stored."""
        return Item(
            id=self.id,
            role="assistant",
            content="".join(self._deltas),
            created=self.created,
            status=self.status,
            reason=self.reason,
            usage=self.usage.counts(),
            options=self._options,
            left_out=self._left_out,
            cuts=" ".join(self._cuts),
            decode_seconds=self._last_at - self._first_at,
        )

    # The two tasks

    def start(self, generate: Coroutine[Any, Any, None], conclude: Coroutine[Any, Any, None]) -> None:
        """Start the task that generates the reply, and the one that concludes the response."""
        self._generating = asyncio.create_task(generate)
        self._concluding = asyncio.create_task(conclude)

    async def wait_generated(self) -> BaseException | None:
        """Wait until the reply is generated. Returns the error that ended it early, if any, also CancelledError."""
        await asyncio.wait([self._generating])
        return asyncio.CancelledError() if self._generating.cancelled() else self._generating.exception()

    async def wait_concluded(self) -> None:
        """Wait until the response has ended."""
        await asyncio.wait([self._concluding])

    # Progress

    def enter(self, phase: Phase) -> None:
        """Begin a phase; a cancellation that waited for it takes effect."""
        self.phase = phase
        if self._cancellation and phase in CANCELLABLE:
            self._generating.cancel()

    @property
    def cancelled(self) -> bool:
        """Whether somebody wants the response to end."""
        return self._cancellation is not None

    def set_prompt(self, usage: Usage, left_out: int) -> None:
        """Set the token counts, which grow with the reply, and how many messages the prompt leaves out."""
        self.usage, self._left_out = usage, left_out

    def announce(self) -> None:
        """Send `Created`: the messages are stored, or wait to be stored."""
        self._tell(Created(self.id, self.conversation, self._left_out))
        self.enter(Phase.ANNOUNCED)

    def set_position(self, position: int) -> None:
        """Set a new position in the wait queue."""
        self._position = position
        self._tell(Queued(self.id, position))

    def set_admitted(self) -> None:
        """Note that the response has its slot."""
        self._position = 0

    def add_text(self, text: str) -> None:
        """Add a piece of text to the reply."""
        self._last_at = asyncio.get_running_loop().time()
        self._first_at = self._first_at or self._last_at
        self._deltas.append(text)
        self._cuts.append(str(len(text)))
        self._tell(TextDelta(self.id, len(self._deltas), text))

    def end(self, reason: FinishReason) -> None:
        """Note that the model has ended the reply."""
        self.status, self.reason = Status.COMPLETED if reason == "stop" else Status.INCOMPLETE, reason

    def cancel(self, status: Status, reason: str) -> None:
        """End the response. If it is not announced yet, its messages are stored and it is announced first."""
        self._cancellation = self._cancellation or (status, reason)
        if self.phase in CANCELLABLE:
            self._generating.cancel()

    def end_cancelled(self) -> None:
        """Note that the generating task was cancelled, by `cancel` or because the process ends."""
        self.status, self.reason = self._cancellation or (Status.FAILED, "server_shutdown")

    def fail(self) -> None:
        """Note that the reply failed after the response was announced."""
        self.status, self.reason = Status.FAILED, "server_error"

    def reject(self, error: APIError) -> None:
        """Send `Rejected`: there is no reply."""
        self._finish()
        self._tell(Rejected(self.id, error))

    def warn(self, error: APIError) -> None:
        """Send `Warned`, at most once: something is wrong, but the response goes on."""
        if not self._warned:
            self._warned = True
            self._tell(Warned(self.id, error))

    def finish(self) -> None:
        """Send `Finished`: the response has ended."""
        self._finish()
        self._tell(Finished(self.conversation, self.item))

    def _finish(self) -> None:
        self.phase = Phase.FINISHED
        if self._timeout:
            self._timeout.cancel()

    # Listeners

    def add_listener(self, listener: Listener) -> None:
        """Send all events from now on to a listener."""
        self._listeners[listener] = True

    def is_followed_by(self, listener: Listener) -> bool:
        return listener in self._listeners

    def remove_listener(self, listener: Listener, linger: float) -> None:
        """Stop sending events to a listener. If it was the last one, the response ends after `linger` seconds."""
        if self._listeners.pop(listener, None) is not None and not self._listeners and self.phase is not Phase.FINISHED:
            if self._timeout:
                self._timeout.cancel()
            self._timeout = asyncio.get_running_loop().call_later(linger, self._end_unless_followed)

    def _end_unless_followed(self) -> None:
        if not self._listeners:
            self.cancel(Status.CANCELLED, "client_disconnected")

    async def catch_up(self, follower: Follower, starting_after: int) -> None:
        """Send a follower the text deltas after a number, then all events from now on."""
        self._listeners[follower] = False
        await replay(follower, self.id, self._deltas, starting_after)
        if self.phase is Phase.FINISHED:
            return follower.on_event(Finished(self.conversation, self.item))
        if self._position:
            follower.on_event(Queued(self.id, self._position))
        self._listeners[follower] = True

    def _tell(self, event: ResponseEvent) -> None:
        for listener, caught_up in self._listeners.items():
            if caught_up:
                listener.on_event(event)


async def replay(follower: Follower, response_id: str, deltas: Sequence[str], starting_after: int) -> None:
    """Send a follower the text deltas after a number, and those that are added meanwhile."""
    while batch := deltas[starting_after : starting_after + BATCH]:
        for delta in batch:
            starting_after += 1
            follower.on_event(TextDelta(response_id, starting_after, delta))
        if len(batch) == BATCH:
            await follower.wait_sent()
