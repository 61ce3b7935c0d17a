"""One client's side of chat.v1: its options, its conversation and the replies being made for it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from models import events
from models.admission import Refused
from models.chat import Chat
from models.conversations import Conversation, Message
from models.engine_thread import EngineFailed
from models.events import ClientEvent, InvalidEvent, Json, ResponseCancel, ResponseCreate, SessionUpdate, Status
from models.outbox import Close
from models.presence import Change
from models.reply import ContextLengthExceeded, Delta, Done, Event, MessagesRefused, Queued, Started, Usage

logger = logging.getLogger("parley")

BAD_FRAMES = 20  # in a row


@dataclass(eq=False)
class Response:
    """A reply as the client sees it."""

    request: ResponseCreate
    conversation: Conversation | None
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: bool = False
    status: Status = "failed"
    reason: str = "server_error"
    deltas: list[str] = field(default_factory=list)
    usage: Usage = field(default_factory=lambda: Usage(0))

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if self.conversation else None


class Session:
    """Takes a client's frames and sends it events. `send` takes an event and does not wait.

    A client may send the next frame while a reply streams, so each reply is a task of its own.
    """

    def __init__(self, chat: Chat, user: str, limits: Json, send: Callable[[Json], None]) -> None:
        self._bad_frames = 0  # in a row
        self._chat = chat
        self._user = user
        self._limits = limits
        self._send = send
        self._id = f"sess_{uuid.uuid4().hex}"
        self._options = chat.defaults
        self._conversation = Conversation()
        self._responses: dict[str, asyncio.Task[None]] = {}
        send(events.session("created", self._description()))

    def receive(self, frame: str | bytes) -> Close | None:
        """Act on one frame; what is wrong with it is told to the client. Returns what to close with, if that."""
        try:
            event = events.parse(frame)
        except InvalidEvent as invalid:
            self._refuse(invalid.code, invalid.message, invalid.event_id, invalid.param)
            self._bad_frames += 1
            return Close(4400, f"{BAD_FRAMES} bad frames in a row") if self._bad_frames == BAD_FRAMES else None
        self._bad_frames = 0
        self._act(event)
        return None

    def presence(self, change: Change, user: str) -> None:
        """Tell the client who came or went."""
        self._send(events.presence(change, user))

    async def close(self) -> None:
        """The client is gone: end its replies."""
        tasks = list(self._responses.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _act(self, event: ClientEvent) -> None:
        match event:
            case SessionUpdate():
                self._options = self._options.updated(event.options)
                self._send(events.session("updated", self._description()))
            case ResponseCreate():
                self._create(event)
            case ResponseCancel():
                self._cancel(event)

    def _create(self, request: ResponseCreate) -> None:
        conversation = None if request.conversation == "none" else self._conversation
        if conversation and request.conversation not in (None, conversation.id):
            self._refuse("conversation_not_found", "there is no such conversation", request.event_id)
        elif conversation and conversation.busy:
            self._refuse("conversation_busy", "a reply is being made in this conversation", request.event_id)
        else:
            response = Response(request, conversation)
            if conversation:
                conversation.busy = True
            task = self._responses[response.id] = asyncio.create_task(self._stream(response))
            task.add_done_callback(partial(self._finished, response))

    def _cancel(self, event: ResponseCancel) -> None:
        if event.response_id is None:
            tasks = list(self._responses.values())
        elif event.response_id in self._responses:
            tasks = [self._responses[event.response_id]]
        else:
            return self._refuse("response_not_found", "no such reply is being made", event.event_id, "response_id")
        for task in tasks:
            task.cancel()

    async def _stream(self, response: Response) -> None:
        history = response.conversation.messages if response.conversation else []
        messages = [*history, *response.request.input]
        options = self._options.updated(response.request.options)
        async with aclosing(self._chat.reply(self._user, messages, options)) as reply:
            async for event in reply:
                self._pass_on(response, event)

    def _pass_on(self, response: Response, event: Event) -> None:
        match event:
            case Started(usage):
                response.usage = usage
                self._created(response)
            case Queued(position):
                self._send(events.response_queued(response.id, position))
            case Delta(text):
                response.deltas.append(text)
                self._send(events.output_text_delta(response.id, len(response.deltas), text))
            case Done(reason):
                response.status, response.reason = "completed" if reason == "stop" else "incomplete", reason

    def _finished(self, response: Response, task: asyncio.Task[None]) -> None:
        """Whatever became of a reply: what was created is done, and what could not be is refused."""
        del self._responses[response.id]
        if response.conversation:
            response.conversation.busy = False
        if task.cancelled():
            response.status, response.reason = "cancelled", "client_cancelled"
        elif isinstance(error := task.exception(), Refused | ContextLengthExceeded | MessagesRefused):
            return self._tell_refused(error, response.request.event_id)
        elif error:
            logger.error("%s failed", response.id, exc_info=None if isinstance(error, EngineFailed) else error)
        self._created(response)
        self._done(response)

    def _created(self, response: Response) -> None:
        if not response.created:
            response.created = True
            self._send(events.response_created(response.id, response.conversation_id, response.request.event_id))

    def _done(self, response: Response) -> None:
        text = "".join(response.deltas)
        if response.conversation and text:  # without a reply the turn is as if it had not been
            reply: Message = {"role": "assistant", "content": text}
            response.conversation.messages += [*response.request.input, reply]
        self._send(
            events.response_done(
                response.id,
                response.conversation_id,
                response.status,
                response.reason,
                text,
                response.usage.public(),
                len(response.deltas) + 1,
            )
        )

    def _tell_refused(self, error: Refused | ContextLengthExceeded | MessagesRefused, event_id: str | None) -> None:
        if isinstance(error, Refused):
            self._send(events.error("rate_limit_error", error.code, str(error), event_id=event_id))
        elif isinstance(error, ContextLengthExceeded):
            self._refuse("context_length_exceeded", str(error), event_id, "response.input")
        else:
            self._refuse("invalid_value", str(error), event_id, "response.input")

    def _refuse(self, code: str, message: str, event_id: str | None, param: str | None = None) -> None:
        self._send(events.error("invalid_request_error", code, message, param=param, event_id=event_id))

    def _description(self) -> Json:
        return {
            "id": self._id,
            "user": self._user,
            "model": self._chat.model_name,
            "context_length": self._chat.context,
            "conversation": self._conversation.id,
            "options": self._options.public(),
            "limits": self._limits,
        }
