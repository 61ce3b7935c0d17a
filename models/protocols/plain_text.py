"""The plain text protocol: the client sends each message as a text frame, the server sends the reply as text frames."""

from __future__ import annotations

import asyncio

from models.chat_request import ChatRequest
from models.errors import APIError, ServerError
from models.generation.events import Finished, OutputDelta, OutputItemAdded, Rejected, ResponseEvent, Warned
from models.generation.interface import (
    NewConversation,
    ResponseRequest,
    ResponseService,
    StoredConversation,
    Target,
)
from models.messages import Message
from models.model_info import ModelList
from models.protocols.client import Client, Close
from models.store.conversations import Conversation, Conversations
from models.store.item import Status
from models.users.connections import Change

WAITING = 8  # messages that may wait while a reply streams


class PlainTextSession:
    """The session of one client. It answers messages one after the other, in one conversation."""

    def __init__(self, responses: ResponseService, models: ModelList, user: str, client: Client) -> None:
        self._responses = responses
        self._models = models
        self._user = user
        self._client = client
        self._target: Target = NewConversation(Conversations.new_id())
        self._messages: asyncio.Queue[str] = asyncio.Queue(WAITING)
        self._notices: list[str] = []  # lines that wait for the end of the reply
        self._answering = False
        self._is_text = False  # whether the current part of the reply is one that the client gets
        self._answered = asyncio.Event()
        self._task = asyncio.create_task(self._answer_all())

    def receive(self, frame: str | bytes) -> Close | None:
        """Queue a message for an answer. Returns how to close the connection if too many wait."""
        message = frame if isinstance(frame, str) else frame.decode(errors="replace")
        if message.strip():
            try:
                self._messages.put_nowait(message)
            except asyncio.QueueFull:
                return Close(1013, f"{WAITING} messages are waiting already")
        return None

    def presence_changed(self, change: Change, user: str) -> None:
        """Tell the client which user has left, between replies."""
        if change == "left":
            self._notices.append(f"Client #{user} left the chat")
            if not self._answering:
                self._send_notices()

    def conversation_changed(self, id: str, conversation: Conversation | None) -> None:
        """A conversation has changed, of which this protocol says nothing."""

    def close(self) -> None:
        """The client has disconnected; its response goes on for a while."""
        self._task.cancel()
        self._responses.leave(self)

    def on_event(self, event: ResponseEvent) -> None:
        """Send the client the text or the error of an event."""
        match event:
            case OutputItemAdded(item=item):
                self._is_text = item.type == "message"
            case OutputDelta(text=text) if self._is_text:
                self._client.send_text(text)
            case Warned(error=error):
                self._notices.append(f"error: {error}")  # the reply goes on
            case Rejected(error=error):
                self._send_error(error)
            case Finished(reply=reply):
                if reply.status == Status.FAILED:
                    self._send_error(ServerError())
                self._answered.set()

    def _send_error(self, error: APIError) -> None:
        self._client.send_text(f"error: {error}")
        self._answered.set()

    async def _answer_all(self) -> None:
        while True:
            message = await self._messages.get()
            self._answering = True
            await self._answer(message)
            self._answering = False
            self._send_notices()

    async def _answer(self, message: str) -> None:
        messages: list[Message] = [{"role": "user", "content": message}]
        chat = ChatRequest(self._user, messages, self._models.default.defaults, truncate=True)
        request = ResponseRequest(chat, self._target)
        if isinstance(self._target, NewConversation):
            self._target = StoredConversation(self._target.id, create=True)  # from the next message on
        self._answered.clear()
        self._responses.create(request, self)
        await self._answered.wait()

    def _send_notices(self) -> None:
        while self._notices:
            self._client.send_text(self._notices.pop(0))
