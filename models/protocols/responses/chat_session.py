"""The Responses protocol on `/ws`, with the subprotocol chat.v2: with the few more events that a chat page needs."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Annotated

from msgspec import Meta, Struct

from models.errors import APIError, ServerError, TooManyResponsesError
from models.generation.events import Queued, Warned
from models.generation.interface import ResponseService
from models.model_info import ModelInfo, ModelList
from models.protocols.client import Client
from models.protocols.conversations import render_change
from models.protocols.responses.events import (
    ChatEventRenderer,
    EventRenderer,
    render_error_event,
    render_parley,
    render_presence,
    render_session,
)
from models.protocols.responses.session import ResponsesSession, ShortText, Stream
from models.store.conversations import Conversation
from models.users.connections import Change
from models.validation import Json, convert

logger = logging.getLogger("parley")

SUBPROTOCOL = "chat.v2"
RESUMES = 16  # at the same time


class _Cancel(Struct, forbid_unknown_fields=True):
    """`parley.response.cancel`: ends one response, or all responses that this connection follows."""

    response_id: ShortText | None = None


class _Resume(Struct, forbid_unknown_fields=True):
    """`parley.response.resume`: asks for the events of a response after a number, past and future ones."""

    response_id: ShortText
    starting_after: Annotated[int, Meta(ge=-1, description="a sequence number, or -1")] = -1


class ChatSession(ResponsesSession):
    """The session of one client of chat.v2."""

    def __init__(self, responses: ResponseService, models: ModelList, user: str, limits: Json, client: Client) -> None:
        super().__init__(responses, models, user, client)
        self._catching_up = asyncio.Lock()
        self._resuming = 0
        client.send_json(
            render_session(
                {
                    "id": f"sess_{uuid.uuid4().hex}",
                    "user": user,
                    **_rendered(models.default),
                    "models": [_rendered(model) for model in models.all],
                    "limits": limits,
                }
            )
        )

    def presence_changed(self, change: Change, user: str) -> None:
        """Tell the client which user has joined or left."""
        self._client.send_json(render_presence(change, user))

    def conversation_changed(self, id: str, conversation: Conversation | None) -> None:
        """Tell the client that a conversation has changed; None: that it is deleted."""
        self._client.send_json(render_change(id, conversation))

    def _act(self, kind: str, fields: Json, stream_id: str | None, size: int) -> None:
        match kind:
            case "parley.response.cancel":
                self._cancel(convert(fields, _Cancel), stream_id)
            case "parley.response.resume":
                self._resume(convert(fields, _Resume), stream_id)
            case _:
                super()._act(kind, fields, stream_id, size)

    def _cancel(self, event: _Cancel, stream_id: str | None) -> None:
        if event.response_id is None:
            self._responses.cancel_all(self)
        else:
            self._start(self._cancel_one(event.response_id, stream_id))

    async def _cancel_one(self, id: str, stream_id: str | None) -> None:
        try:
            await self._responses.cancel(self._user, id)
        except APIError as error:
            self._client.send_json(render_error_event(error, stream_id))

    def _resume(self, event: _Resume, stream_id: str | None) -> None:
        if self._resuming == RESUMES:
            raise TooManyResponsesError(f"{RESUMES} replies are being resumed already: wait for one")
        self._resuming += 1
        self._start(self._follow(event, stream_id))

    async def _follow(self, event: _Resume, stream_id: str | None) -> None:
        try:
            async with self._catching_up:
                renderer = self._renderer()
                stream = self._streams.setdefault(event.response_id, Stream(renderer, stream_id))
                stream.renderer, stream.stream_id, stream.starting_after = renderer, stream_id, event.starting_after
                await self._responses.follow(self._user, event.response_id, self)
        except Exception as error:
            if not isinstance(error, APIError):
                logger.exception("%s could not be resumed", event.response_id)
                error = ServerError()
            self._end(event.response_id)
            self._client.send_json(render_error_event(error, stream_id))
        finally:
            self._resuming -= 1

    def _renderer(self) -> EventRenderer:
        return ChatEventRenderer(self._models)

    def _tell(self, event: Queued | Warned) -> None:
        self._client.send_json(render_parley(event))


def _rendered(model: ModelInfo) -> Json:
    """What a chat page has to know of a model."""
    return {
        "model": model.name,
        "context_length": model.context,
        "options": model.defaults.as_json(),
        "capabilities": model.capabilities,
    }
