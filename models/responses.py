"""The replies that are being made, and what is left of those that no conversation keeps."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from models import events
from models.chat import Chat
from models.conversations import ConversationNotFound, Conversations
from models.engine_thread import EngineFailed
from models.item import Item, left_out, messages, up_to
from models.refused import Refused
from models.reply import Started
from models.response import Listener, Reader, Response, replay
from models.settings import Settings

logger = logging.getLogger("parley")

WRITE_SECONDS = 0.5  # from one writing down of all that grew to the next


class ConversationBusy(Refused):
    """A reply is being made in the conversation already."""

    code = "conversation_busy"


class ResponseNotFound(Refused):
    """A reply that is not there, or is somebody else's."""

    code = "response_not_found"
    param = "response_id"


class Responses:
    """Makes replies, each in tasks of its own, whoever listens, and has conversations keep them as they grow.

    A reply that nobody listens to for `linger` seconds is ended. One outside of conversations can be followed for as
    long after its end, while all of these take `replay_bytes` at most.
    """

    def __init__(self, chat: Chat, conversations: Conversations, settings: Settings) -> None:
        self._chat = chat
        self._conversations = conversations
        self._linger = settings.linger
        self._replay_bytes = settings.replay_bytes
        self._live: dict[str, Response] = {}
        self._ended: dict[str, tuple[str, Item]] = {}  # with whose they are; those outside of conversations
        self._writing = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def running(cls, chat: Chat, conversations: Conversations, settings: Settings) -> AsyncIterator[Responses]:
        """Responses that are written down as they grow, and end with the context."""
        if unfinished := await conversations.end_unfinished():
            logger.warning(
                "%d replies had been cut off when the server ended; they are kept as far as they went", unfinished
            )
        responses = cls(chat, conversations, settings)
        writing = asyncio.create_task(responses._write_along())
        try:
            yield responses
        finally:
            await responses._end_all()
            writing.cancel()

    def create(self, response: Response, listener: Listener) -> None:
        """Begin to make a reply, and have a listener told of it. Raises ConversationBusy."""
        if self._in(response.user, response.conversation):
            raise ConversationBusy("a reply is being made in this conversation: wait for its end, or cancel it")
        response.chosen = response.options.beyond(self._chat.defaults)
        response.listeners[listener] = True
        response.making = asyncio.create_task(self._make(response))
        response.ending = asyncio.create_task(self._end(response))
        self._live[response.id] = response

    async def follow(self, user: str, id: str, starting_after: int, reader: Reader) -> None:
        """Send a reader what came after a delta, and what comes until the end. Raises ResponseNotFound."""
        response = self._live.get(id)
        if response and response.user == user:
            return await response.follow(reader, starting_after)
        owner, reply = self._ended.get(id, ("", None))
        conversation = None
        if reply is None or owner != user:
            conversation, reply = await self._conversations.reply(user, id) or (None, None)
        if reply is None:
            raise ResponseNotFound("there is no such reply, or it is no longer kept")
        await replay(reader, id, reply.deltas, starting_after)
        reader.send(events.response_done(conversation, reply))

    def leave(self, listener: Listener) -> None:
        """Tell a listener nothing more, since it has gone."""
        for response in self._live.values():
            if response.listeners.pop(listener, None) is not None and not response.listeners:
                response.end_unheard(self._linger)

    def cancel(self, user: str, id: str) -> None:
        """End a reply. Raises ResponseNotFound."""
        response = self._live.get(id)
        if response is None or response.user != user:
            raise ResponseNotFound("no such reply is being made")
        response.cancel("cancelled", "client_cancelled")

    def cancel_all(self, listener: Listener) -> None:
        """End all replies that a listener is told of."""
        for response in self._live.values():
            if listener in response.listeners:
                response.cancel("cancelled", "client_cancelled")

    async def end_in(self, user: str, conversation: str) -> None:
        """End the reply that is being made in a conversation, if there is one, and wait until it is."""
        for response in self._in(user, conversation):
            response.cancel("cancelled", "client_cancelled")
            await asyncio.wait([response.ending])

    def _in(self, user: str, conversation: str | None) -> list[Response]:
        """The reply that is being made in a conversation; a conversation of somebody else is another one."""
        if conversation is None:
            return []
        return [live for live in self._live.values() if (live.user, live.conversation) == (user, conversation)]

    async def _make(self, response: Response) -> None:
        with self._chat.admission.place(response.user) as ticket:
            before = await self._before(response)
            turns = [*messages(before), *response.request.input]
            async with aclosing(self._chat.reply(ticket, turns, response.options)) as reply:
                async for event in reply:
                    if isinstance(event, Started):
                        response.usage, response.left_out = event.usage, left_out(before) + event.left_out
                        await self._keep(response, len(before))
                        response.announce()
                    else:
                        response.take(event)

    async def _before(self, response: Response) -> Sequence[Item]:
        """What was said before a reply's input."""
        if response.conversation is None:
            return []
        items = await self._conversations.items(response.user, response.conversation)
        if not items and not response.begins:
            raise ConversationNotFound
        return items if response.request.after is None else up_to(items, response.request.after)

    async def _keep(self, response: Response, position: int) -> None:
        """Have the input kept, and the reply, of which there is nothing yet."""
        if response.conversation is not None:
            said = [Item.said(message, response.created) for message in response.request.input]
            adding = self._conversations.add(response.user, response.conversation, position, [*said, response.item])
            response.keeping = asyncio.create_task(adding)
            await asyncio.shield(response.keeping)  # a cancel that came now could leave a reply that nobody ends

    async def _end(self, response: Response) -> None:
        """Wait for a reply's end, whatever that is: what was announced is finished, and what cannot be is refused."""
        await asyncio.wait([response.making])
        try:
            response.making.result()
        except asyncio.CancelledError:
            response.status, response.reason = response.cancelled_as
        except Refused as refused:
            del self._live[response.id]
            return response.refuse(refused)
        except Exception as error:
            response.status, response.reason = "failed", "server_error"
            logger.error("%s failed", response.id, exc_info=None if isinstance(error, EngineFailed) else error)
        if response.keeping:
            await asyncio.wait([response.keeping])
            await self._write([response])
        elif response.conversation is None:
            self._hold(response)
        del self._live[response.id]
        response.finish()

    def _hold(self, response: Response) -> None:
        """Keep a reply for a while that no conversation keeps; the oldest go first."""
        self._ended[response.id] = response.user, response.item
        asyncio.get_running_loop().call_later(self._linger, self._ended.pop, response.id, None)
        sizes = [sys.getsizeof(reply.content) + sys.getsizeof(reply.cuts) for _, reply in self._ended.values()]
        while sum(sizes) > self._replay_bytes:
            del self._ended[next(iter(self._ended))], sizes[0]

    async def _write_along(self) -> None:
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            if growing := [live for live in self._live.values() if live.deltas and live.keeping]:
                await self._write(growing)

    async def _write(self, responses: Sequence[Response]) -> None:
        """Have replies written down as they are now: one at a time, so that no earlier state comes later."""
        try:
            async with self._writing:
                await self._conversations.write(response.item for response in responses)
        except Exception:
            logger.exception("replies could not be written down")

    async def _end_all(self) -> None:
        for response in self._live.values():
            response.cancel("failed", "server_shutdown")
        if self._live:
            await asyncio.wait([response.ending for response in self._live.values()])
