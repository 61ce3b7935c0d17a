"""A response that is running, and its listeners."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Any

from models.errors import APIError
from models.generation.events import (
    Created,
    Finished,
    OutputDelta,
    OutputItemAdded,
    OutputItemDone,
    Queued,
    Rejected,
    ResponseEvent,
    Warned,
)
from models.generation.interface import Follower, Listener, NewConversation, ResponseRequest, StoredConversation
from models.messages import FinishReason, Usage
from models.options import Options
from models.output_item import OutputItem, OutputType, TokenLogprob
from models.store.buffered_replies import BufferedReply
from models.store.item import Item, Status
from models.store.place import Place

BATCH = 256  # how many deltas are replayed before the follower must have passed them on


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
        self.id = request.id
        self.request = request
        self.created = time.time()
        self.phase = Phase.READING
        self.status = Status.IN_PROGRESS
        self.reason: str | None = None
        self.failure: str | None = None
        self.usage = Usage(0)
        self.stored_in: str | None = None  # the conversation that keeps it, once it is known; it may not be listed
        self.place = Place()  # of its turn in the conversation
        self._input = [Item.of_message(message, self.created) for message in request.chat.messages]
        self._options = request.chat.options.differences(defaults)
        self._left_out = 0
        self._output: list[OutputItem] = []
        self._ended: float | None = None
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
        """The id of the conversation that the request names, or that it begins for all to see."""
        match self.request.target:
            case StoredConversation(id) | NewConversation(id, listed=True):
                return id
        return None

    @property
    def seconds(self) -> float:
        """How long ago the response started."""
        return time.monotonic() - self._started_at

    @property
    def has_output(self) -> bool:
        return bool(self._output)

    @property
    def item(self) -> Item:
        """The reply so far, as it is stored."""
        return Item.of_reply(
            self.id,
            self.created,
            self._output,
            parent=self.parent,
            status=self.status,
            reason=self.reason,
            failure=self.failure,
            usage=self.usage.counts(),
            options=self._options,
            left_out=self._left_out,
            request=self.request.details,
            previous=self.request.previous,
            ended=self._ended,
            decode_seconds=self._last_at - self._first_at,
        )

    @property
    def parent(self) -> str | None:
        """The node before it in its conversation."""
        return self._input[-1].id if self._input and self.stored_in else self.place.parent

    @property
    def turn(self) -> BufferedReply:
        """The input and the reply so far, as they are stored."""
        return BufferedReply(self.user, self.stored_in, self.item, self._input, self.place)

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

    def leave_out(self, more: int) -> None:
        """Note that the prompt leaves out more messages than was known."""
        self._left_out += more

    def announce(self) -> None:
        """Send `Created`: the messages are stored, or wait to be stored."""
        self._tell(Created(self.conversation, beginning_of(self.item)))
        self.enter(Phase.ANNOUNCED)

    def set_position(self, position: int) -> None:
        """Set a new position in the wait queue."""
        self._position = position
        self._tell(Queued(self.id, position))

    def set_admitted(self) -> None:
        """Note that the response has its slot."""
        self._position = 0

    def add_text(self, type: OutputType, text: str, logprobs: Sequence[TokenLogprob] | None = None) -> None:
        """Add a piece of text to the current part of the reply, or to a new one if that is of another type."""
        if not self._output or self._output[-1].type != type:
            self.begin_part(OutputItem(type))
        item = self._output[-1]
        item.pieces.append(text)
        if logprobs is not None:
            item.logprobs = item.logprobs or []
            item.logprobs.append(logprobs)
        self._note_time()
        self._tell(OutputDelta(self.id, len(self._output) - 1, text, logprobs, self.usage))

    def begin_call(self, name: str) -> None:
        """Begin a call of a tool, whose arguments follow."""
        self.begin_part(OutputItem("function_call", name=name, call_id=f"call_{uuid.uuid4().hex}"))

    def begin_part(self, item: OutputItem) -> None:
        """Begin the next part of the reply; the one before it is complete."""
        self._end_part(complete=True)
        self._output.append(item)
        self._tell(OutputItemAdded(self.id, len(self._output) - 1, item))

    def end(self, reason: FinishReason) -> None:
        """Note that the model has ended the reply."""
        self.status, self.reason = Status.COMPLETED if reason == "stop" else Status.INCOMPLETE, reason

    def _end_part(self, complete: bool) -> None:
        if self._output:
            self._output[-1].complete = complete
            self._tell(OutputItemDone(self.id, len(self._output) - 1, self._output[-1]))

    def _note_time(self) -> None:
        self._last_at = asyncio.get_running_loop().time()
        self._first_at = self._first_at or self._last_at

    def cancel(self, status: Status, reason: str) -> None:
        """End the response. If it is not announced yet, its messages are stored and it is announced first."""
        self._cancellation = self._cancellation or (status, reason)
        if self.phase in CANCELLABLE:
            self._generating.cancel()

    def end_cancelled(self) -> None:
        """Note that the generating task was cancelled, by `cancel` or because the process ends."""
        self.status, self.reason = self._cancellation or (Status.FAILED, "server_shutdown")

    def fail(self, error: APIError) -> None:
        """Note that the reply failed after the response was announced."""
        self.status, self.reason = Status.FAILED, error.code
        self.failure = str(error) if str(error) != getattr(error, "message", None) else None

    def reject(self, error: APIError) -> None:
        """Send `Rejected`: there is no reply."""
        self._finish()
        self._tell(Rejected(self.id, error))

    def warn(self, error: APIError) -> None:
        """Send `Warned`, at most once: something is wrong, but the response goes on."""
        if not self._warned:
            self._warned = True
            self._tell(Warned(self.id, error))

    def close(self) -> None:
        """End the last part, before the reply is stored; a reply that says nothing has one empty message."""
        self._ended = time.time()
        completed = self.status == Status.COMPLETED
        if completed and not self._output and self.request.generate:
            self.begin_part(OutputItem("message"))
        self._end_part(completed)

    def _has_ended(self) -> bool:
        return self._ended is not None

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
        """Stop sending events to a listener. If it was the last one, the response ends after `linger` seconds.

        One in the background goes on.
        """
        left = self._listeners.pop(listener, None) is not None and not self._listeners
        if left and self.phase is not Phase.FINISHED and not self.request.background:
            if self._timeout:
                self._timeout.cancel()
            self._timeout = asyncio.get_running_loop().call_later(linger, self._end_unless_followed)

    def _end_unless_followed(self) -> None:
        if not self._listeners:
            self.cancel(Status.CANCELLED, "client_disconnected")

    async def catch_up(self, follower: Follower) -> None:
        """Send a follower all events so far, then those from now on."""
        self._listeners[follower] = False
        if self.phase not in (Phase.ANNOUNCED, Phase.FINISHED):  # it has no events yet
            self._listeners[follower] = True
            return
        await replay(follower, Created(self.conversation, beginning_of(self.item)), self._output, self._has_ended)
        if self.phase is Phase.FINISHED:
            return follower.on_event(Finished(self.conversation, self.item))
        if self._position:
            follower.on_event(Queued(self.id, self._position))
        self._listeners[follower] = True

    def _tell(self, event: ResponseEvent) -> None:
        for listener, caught_up in self._listeners.items():
            if caught_up:
                listener.on_event(event)


def beginning_of(reply: Item) -> Item:
    """A reply as it was when it was created."""
    begun = replace(reply, content="", output=(), status=Status.IN_PROGRESS, reason=None, usage=None)
    return replace(begun, ended=None, decode_seconds=None)


async def replay(
    follower: Follower, created: Created, output: Sequence[OutputItem], ended: Callable[[], bool] = lambda: True
) -> None:
    """Send a follower the events of a reply so far, also those of output that is added meanwhile.

    The last part has ended if the output has, which `ended` tells.
    """
    follower.on_event(created)
    id, index, sent = created.response_id, 0, 0
    while index < len(output):
        item, piece = output[index], 0
        follower.on_event(OutputItemAdded(id, index, item))
        while piece < len(item.pieces):
            logprobs = item.logprobs[piece] if item.logprobs else None
            follower.on_event(OutputDelta(id, index, item.pieces[piece], logprobs))
            piece, sent = piece + 1, sent + 1
            if sent % BATCH == 0:
                await follower.wait_sent()
        if index + 1 == len(output) and not ended():
            return
        follower.on_event(OutputItemDone(id, index, item))
        index += 1
