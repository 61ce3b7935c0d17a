"""One client's side of the plain protocol: a text frame in is a message, text frames out are the reply."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing

from models.admission import Refused
from models.chat import Chat
from models.conversations import Conversation, Message
from models.engine_thread import EngineFailed
from models.outbox import Close
from models.presence import Change
from models.reply import ContextLengthExceeded, Delta, MessagesRefused

logger = logging.getLogger("parley")

WAITING = 8  # messages that may wait while a reply streams


class PlainSession:
    """Answers one message after the other. `send` takes a frame's text and does not wait."""

    def __init__(self, chat: Chat, user: str, send: Callable[[str], None]) -> None:
        self._chat = chat
        self._user = user
        self._send = send
        self._conversation = Conversation()
        self._inbox: asyncio.Queue[str] = asyncio.Queue(WAITING)
        self._notices: list[str] = []
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
            if not self._conversation.busy:
                self._tell_notices()

    async def close(self) -> None:
        """The client is gone: end its reply."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _answer_all(self) -> None:
        while True:
            message = await self._inbox.get()
            self._conversation.busy = True
            await self._answer({"role": "user", "content": message})
            self._conversation.busy = False
            self._tell_notices()

    async def _answer(self, message: Message) -> None:
        history = self._conversation.messages
        pieces: list[str] = []
        try:
            async with aclosing(self._chat.reply(self._user, [*history, message], self._chat.defaults)) as reply:
                async for event in reply:
                    if isinstance(event, Delta):
                        pieces.append(event.text)
                        self._send(event.text)
        except (Refused, ContextLengthExceeded, MessagesRefused) as error:
            self._send(f"error: {error}")
        except EngineFailed as error:
            logger.error("a plain reply failed: %s", error)
            self._send("error: the server failed; try again")
        except Exception:
            logger.exception("a plain reply failed")
            self._send("error: the server failed; try again")
        if pieces:
            self._conversation.messages += [message, {"role": "assistant", "content": "".join(pieces)}]

    def _tell_notices(self) -> None:
        while self._notices:
            self._send(self._notices.pop(0))
