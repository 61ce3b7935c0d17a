"""One client's side of chat.v1: its options, its conversation and what it wants of replies."""

from __future__ import annotations

import asyncio
import logging
import uuid

from models import events
from models.admission import TooManyResponses
from models.chat import Chat
from models.conversations import Conversations
from models.events import ClientEvent, InvalidEvent, Json, ResponseCancel, ResponseCreate, ResponseResume, SessionUpdate
from models.outbox import Close
from models.presence import Change
from models.refused import Refused, ServerFailed
from models.response import Reader, Response
from models.responses import Responses

logger = logging.getLogger("parley")

BAD_FRAMES = 20  # in a row
RESUMES = 16  # that may wait for one another


class Session:
    """Takes a client's frames; what comes of them is sent to the client, by this and by `responses`."""

    def __init__(self, chat: Chat, responses: Responses, user: str, limits: Json, client: Reader) -> None:
        self._chat = chat
        self._responses = responses
        self._user = user
        self._limits = limits
        self._client = client
        self._bad_frames = 0  # in a row
        self._id = f"sess_{uuid.uuid4().hex}"
        self._options = chat.defaults
        self._conversation = Conversations.new_id()
        self._begun = False
        self._following: set[asyncio.Task[None]] = set()
        self._catching_up = asyncio.Lock()
        client.send(events.session("created", self._description()))

    def receive(self, frame: str | bytes) -> Close | None:
        """Act on one frame; what is wrong with it is told to the client. Returns what to close with, if that."""
        event_id = None
        try:
            event = events.parse(frame)
            self._bad_frames, event_id = 0, event.event_id
            self._act(event)
        except InvalidEvent as invalid:
            self._client.send(events.error(invalid, invalid.event_id))
            self._bad_frames += 1
            return Close(4400, f"{BAD_FRAMES} bad frames in a row") if self._bad_frames == BAD_FRAMES else None
        except Refused as refused:
            self._client.send(events.error(refused, event_id))
        return None

    def presence(self, change: Change, user: str) -> None:
        """Tell the client who came or went."""
        self._client.send(events.presence(change, user))

    def close(self) -> None:
        """The client is gone; its replies go on for a while."""
        for task in self._following:
            task.cancel()
        self._responses.leave(self._client)

    def _act(self, event: ClientEvent) -> None:
        match event:
            case SessionUpdate():
                self._options = self._options.updated(event.options)
                self._client.send(events.session("updated", self._description()))
            case ResponseCreate():
                self._create(event)
            case ResponseCancel(response_id=None):
                self._responses.cancel_all(self._client)
            case ResponseCancel(response_id=str(response_id)):
                self._responses.cancel(self._user, response_id)
            case ResponseResume():
                self._resume(event)

    def _create(self, request: ResponseCreate) -> None:
        match request.conversation:
            case "none":
                conversation = None
            case "new":
                conversation = Conversations.new_id()
            case named:
                conversation = named or self._conversation
        own = conversation == self._conversation
        new = request.conversation == "new" or (own and not self._begun)
        options = self._options.updated(request.options)
        self._responses.create(Response(self._user, request, conversation, new or own, options, new), self._client)
        self._begun |= own

    def _resume(self, event: ResponseResume) -> None:
        if len(self._following) == RESUMES:
            raise TooManyResponses(f"{RESUMES} replies are being resumed: wait for one")
        task = asyncio.create_task(self._follow(event))
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    async def _follow(self, event: ResponseResume) -> None:
        try:
            async with self._catching_up:
                await self._responses.follow(self._user, event.response_id, event.starting_after, self._client)
        except Refused as refused:
            self._client.send(events.error(refused, event.event_id))
        except Exception:
            logger.exception("%s could not be resumed", event.response_id)
            self._client.send(events.error(ServerFailed(), event.event_id))

    def _description(self) -> Json:
        return {
            "id": self._id,
            "user": self._user,
            "model": self._chat.model_name,
            "context_length": self._chat.context,
            "conversation": self._conversation,
            "options": self._options.public(),
            "limits": self._limits,
        }
