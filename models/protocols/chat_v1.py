"""The protocol chat.v1: JSON events over a WebSocket."""

from __future__ import annotations

import asyncio
import logging
import uuid

from models.errors import APIError, InvalidRequestError, ServerError, TooManyResponsesError
from models.generation.events import Created, Rejected, ResponseEvent
from models.generation.interface import (
    ModelInfo,
    NewConversation,
    ResponseRequest,
    ResponseService,
    StoredConversation,
    Target,
    Unstored,
)
from models.protocols.chat_v1_events import (
    ClientEvent,
    ResponseCancel,
    ResponseCreate,
    ResponseResume,
    SessionUpdate,
    parse_event,
    parse_event_id,
    render,
    render_error,
    render_presence,
    render_session,
)
from models.protocols.client import Client, Close
from models.store.conversations import Conversations
from models.store.item import Edge
from models.users.connections import Change
from models.validation import Json, parse_object

logger = logging.getLogger("parley")

BAD_FRAMES = 20  # in a row, before the connection is closed
RESUMES = 16  # at the same time


class ChatV1Session:
    """The session of one client: its options, its conversation, and the responses that it follows."""

    def __init__(self, responses: ResponseService, model: ModelInfo, user: str, limits: Json, client: Client) -> None:
        self._responses = responses
        self._model = model
        self._user = user
        self._limits = limits
        self._client = client
        self._bad_frames = 0  # in a row
        self._id = f"sess_{uuid.uuid4().hex}"
        self._options = model.defaults
        self._conversation = Conversations.new_id()
        self._begun = False  # whether the connection's own conversation has begun
        self._event_ids: dict[str, str | None] = {}  # of the requests that have no event yet
        self._resuming: set[asyncio.Task[None]] = set()
        self._catching_up = asyncio.Lock()
        client.send_json(render_session("created", self._description()))

    def receive(self, frame: str | bytes) -> Close | None:
        """Act on one frame, or send the client an error. Returns how to close the connection, if it has to close."""
        event_id = None
        try:
            fields = parse_object(frame, "the frame")
            event_id = parse_event_id(fields)
            event = parse_event(fields)
        except InvalidRequestError as error:
            self._client.send_json(render_error(error, event_id))
            self._bad_frames += 1
            return Close(4400, f"{BAD_FRAMES} bad frames in a row") if self._bad_frames == BAD_FRAMES else None
        self._bad_frames = 0
        try:
            self._act(event, event_id)
        except APIError as error:
            self._client.send_json(render_error(error, event_id))
        return None

    def presence_changed(self, change: Change, user: str) -> None:
        """Tell the client which user has joined or left."""
        self._client.send_json(render_presence(change, user))

    def close(self) -> None:
        """The client has disconnected; its responses go on for a while."""
        for task in self._resuming:
            task.cancel()
        self._responses.leave(self)

    def on_event(self, event: ResponseEvent) -> None:
        """Send the client an event of a response."""
        event_id = self._event_ids.pop(event.response_id, None) if isinstance(event, Created | Rejected) else None
        self._client.send_json(render(event, event_id))

    async def wait_sent(self) -> None:
        """Wait until all events are sent to the client."""
        await self._client.wait_sent()

    def _act(self, event: ClientEvent, event_id: str | None) -> None:
        match event:
            case SessionUpdate():
                self._options = self._options.updated(event.session)
                self._client.send_json(render_session("updated", self._description()))
            case ResponseCreate():
                self._create(event, event_id)
            case ResponseCancel(response_id=None):
                self._responses.cancel_all(self)
            case ResponseCancel(response_id=str(response_id)):
                self._responses.cancel(self._user, response_id)
            case ResponseResume():
                self._resume(event, event_id)

    def _create(self, event: ResponseCreate, event_id: str | None) -> None:
        target = self._target(event)
        request = ResponseRequest(self._user, event.messages, self._options.updated(event.options), target)
        self._event_ids[self._responses.create(request, self)] = event_id
        self._begun |= isinstance(target, NewConversation | StoredConversation) and target.id == self._conversation

    def _target(self, event: ResponseCreate) -> Target:
        """The target that a request names."""
        match event.conversation:
            case "none":
                return Unstored()
            case "new":
                return NewConversation(Conversations.new_id())
        after = Edge.END if event.after is None else Edge.START if event.after == "none" else event.after
        if event.conversation not in (None, "", self._conversation):
            return StoredConversation(str(event.conversation), after)
        if not self._begun and isinstance(after, Edge):
            return NewConversation(self._conversation)
        return StoredConversation(self._conversation, after, create=True)

    def _resume(self, event: ResponseResume, event_id: str | None) -> None:
        if len(self._resuming) == RESUMES:
            raise TooManyResponsesError(f"{RESUMES} replies are being resumed already: wait for one")
        task = asyncio.create_task(self._follow(event, event_id))
        self._resuming.add(task)
        task.add_done_callback(self._resuming.discard)

    async def _follow(self, event: ResponseResume, event_id: str | None) -> None:
        try:
            async with self._catching_up:
                await self._responses.follow(self._user, event.response_id, event.starting_after, self)
        except APIError as error:
            self._client.send_json(render_error(error, event_id))
        except Exception:
            logger.exception("%s could not be resumed", event.response_id)
            self._client.send_json(render_error(ServerError(), event_id))

    def _description(self) -> Json:
        return {
            "id": self._id,
            "user": self._user,
            "model": self._model.name,
            "context_length": self._model.context,
            "conversation": self._conversation,
            "options": self._options.as_json(),
            "limits": self._limits,
        }
