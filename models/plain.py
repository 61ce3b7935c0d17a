"""One client's side of the plain protocol: a text frame in is a message, text frames out are the reply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from models import events
from models.chat import Chat
from models.conversations import Conversations
from models.events import Json, ResponseCreate
from models.outbox import Close
from models.presence import Change
from models.refused import Refused
from models.response import Response
from models.responses import Responses

WAITING = 8  # messages that may wait while a reply streams


class PlainSession:
    """Answers one message after the other. `put` takes a frame's text and does not wait."""

    def __init__(self, chat: Chat, responses: Responses, user: str, put: Callable[[str], None]) -> None:
        self._chat = chat
        self._responses = responses
        self._user = user
        self._put = put
        self._conversation = Conversations.new_id()
        self._begun = False
        self._inbox: asyncio.Queue[str] = asyncio.Queue(WAITING)
        self._notices: list[str] = []
        self._answering = False
        self._task = asyncio.create_task(self._answer_all())

    def receive(self, frame: str | bytes) -> Close | None:
        """Answer a message in its turn. Returns what to close with where too many wait."""
        message = frame if isinstance(frame, str) else frame.decode(errors="replace")
        if message.strip():
            try:
                self._inbox.put_nowait(message)
            except asyncio.QueueFull:
                return Close(1013, f"{WAITING} messages wait already")
        return None

    def presence(self, change: Change, user: str) -> None:
        """Tell who left, between replies."""
        if change == "left":
            self._notices.append(f"Client #{user} left the chat")
            if not self._answering:
                self._tell_notices()

    def close(self) -> None:
        """The client is gone; its reply goes on for a while."""
        self._task.cancel()
        self._responses.leave(self)

    def send(self, event: Json) -> None:
        """Tell the client what an event of chat.v1 says to it."""
        match event:
            case {"type": "response.output_text.delta", "delta": str(delta)}:
                self._put(delta)
            case {"type": "response.done", "response": {"status": "failed"}}:
                self._put("error: the server failed; try again")
            case {"type": "error", "error": {"message": str(message), "response_id": _}}:
                self._notices.append(f"error: {message}")  # the reply goes on
            case {"type": "error", "error": {"message": str(message)}}:
                self._put(f"error: {message}")

    async def _answer_all(self) -> None:
        while True:
            message = await self._inbox.get()
            self._answering = True
            await self._answer(message)
            self._answering = False
            self._tell_notices()

    async def _answer(self, message: str) -> None:
        request = ResponseCreate(None, [{"role": "user", "content": message}])
        response = Response(self._user, request, self._conversation, True, self._chat.defaults, not self._begun)
        self._begun = True
        try:
            self._responses.create(response, self)
        except Refused as refused:
            return self.send(events.error(refused))
        await asyncio.wait([response.ending])

    def _tell_notices(self) -> None:
        while self._notices:
            self._put(self._notices.pop(0))
