"""The replies that are being made, and what is left of those that no conversation keeps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from models import events
from models.chat import Chat
from models.conversations import ConversationNotFound, Conversations
from models.engine_thread import EngineFailed
from models.held import Held
from models.item import Item, left_out, messages, up_to
from models.journal import Journal, NotKept
from models.logs import log
from models.metrics import Metrics
from models.refused import Refused, ServerFailed
from models.reply import Started
from models.response import Listener, Reader, Response, replay
from models.settings import Settings

logger = logging.getLogger("parley")

WRITE_SECONDS = 0.5  # from one writing down of all that grew to the next


class ConversationBusy(Refused):
    """A reply is being made in the conversation already."""

    code = "conversation_busy"
    message = "a reply is being made in this conversation: wait for its end, or cancel it"


class ResponseNotFound(Refused):
    """A reply that is not there, or is somebody else's."""

    code = "response_not_found"
    param = "response_id"


class Responses:
    """Makes replies, each in tasks of its own, whoever listens, and has conversations keep them as they grow.

    A reply that nobody listens to for `linger` seconds is ended. One of no conversation can be followed for as long
    after its end, while all of those take `replay_bytes` at most.
    """

    def __init__(self, chat: Chat, journal: Journal, metrics: Metrics, linger: int) -> None:
        self._chat = chat
        self._journal = journal
        self._metrics = metrics
        self._linger = linger
        self._live: dict[str, Response] = {}

    @classmethod
    @asynccontextmanager
    async def running(
        cls, chat: Chat, conversations: Conversations, settings: Settings, metrics: Metrics
    ) -> AsyncIterator[Responses]:
        """Responses that are written down as they grow, and end with the context."""
        if count := await conversations.end_unfinished():
            logger.warning(
                "%d replies had been cut off when the server ended; they are kept as far as they went", count
            )
        responses = cls(chat, Journal(conversations, settings.replay_bytes), metrics, settings.linger)
        writing = asyncio.create_task(responses._write_along())
        try:
            yield responses
        finally:
            await responses._end_all()
            writing.cancel()
            await asyncio.wait([writing])
            if responses._journal.unwritten and not await responses._journal.write([]):
                logger.error("replies that could not be written down, and are lost: %d", responses._journal.unwritten)

    @property
    def trouble(self) -> str | None:
        """Why nothing that is said can be written down at present, if so."""
        return self._journal.trouble

    def create(self, response: Response, listener: Listener) -> None:
        """Begin to make a reply, and have a listener told of it. Raises ConversationBusy."""
        if self._in(response.user, response.conversation):
            raise ConversationBusy
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
        found = await self._journal.find(user, id)
        if found is None:
            raise ResponseNotFound("there is no such reply, or it is no longer kept")
        conversation, reply = found
        await replay(reader, id, reply.deltas, starting_after)
        reader.send(events.response_done(conversation, reply))

    def leave(self, listener: Listener) -> None:
        """Tell a listener nothing more, since it has gone."""
        for response in self._live.values():
            if response.listeners.pop(listener, None) is not None and not response.listeners:
                if response.unheard:
                    response.unheard.cancel()
                response.unheard = asyncio.get_running_loop().call_later(self._linger, self._end_unheard, response.id)

    def _end_unheard(self, id: str) -> None:
        response = self._live.get(id)
        if response and not response.listeners:
            response.cancel("cancelled", "client_disconnected")

    def cancel(self, user: str, id: str) -> None:
        """End a reply. Raises ResponseNotFound."""
        response = self._live.get(id)
        if response is None or response.user != user:
            raise ResponseNotFound("no such reply is being made")
        response.cancel()

    def cancel_all(self, listener: Listener) -> None:
        """End all replies that a listener is told of."""
        for response in self._live.values():
            if listener in response.listeners:
                response.cancel()

    def revoke(self, user: str) -> None:
        """End the completions of a user whose secret is no longer good; other replies end with their listeners."""
        for response in self._live.values():
            if response.completion and response.user == user:
                response.cancel("failed", "revoked")

    async def delete(self, user: str, conversation: str) -> None:
        """Delete a conversation, after the end of the reply that is being made in it. Raises ConversationNotFound."""
        for response in self._in(user, conversation):
            response.cancel()
            await asyncio.wait([response.ending])
        await self._journal.delete(user, conversation)

    def _in(self, user: str, conversation: str | None) -> list[Response]:
        """The reply that is being made in a conversation; a conversation of somebody else is another one."""
        if conversation is None:
            return []
        return [live for live in self._live.values() if (live.user, live.conversation) == (user, conversation)]

    async def drain(self, seconds: float) -> None:
        """Refuse new replies, give those that are being made time to come to their end, and end the others."""
        self._chat.admission.close()
        if self._live:
            logger.warning("replies that have %g s to come to their end: %d", seconds, len(self._live))
            await asyncio.wait([response.ending for response in self._live.values()], timeout=seconds)
        await self._end_all()

    async def _make(self, response: Response) -> None:
        with self._chat.admission.place(response.user) as ticket:
            before = await self._before(response)
            position, response.left_out = len(before), left_out(before)
            turns = [*messages(before), *response.request.input]
            coming = self._metrics.observe(
                ticket, self._chat.reply(ticket, turns, response.options, response.completion)
            )
            async with aclosing(coming) as reply:
                del before, turns  # a reply may wait long, and a history be large
                async for event in reply:
                    if isinstance(event, Started):
                        response.usage = ticket.usage = event.usage
                        response.left_out += event.left_out
                        await self._begin(response, position)
                    else:
                        response.take(event)

    async def _before(self, response: Response) -> Sequence[Item]:
        """What was said before a reply's input."""
        if response.conversation is None or response.request.conversation == "new":
            return []
        items = [] if response.new else await self._journal.read(response.user, response.conversation)
        if not items and not response.begins:
            raise ConversationNotFound
        return items if response.request.after is None else up_to(items, response.request.after)

    async def _begin(self, response: Response, position: int) -> None:
        """Have the input kept, and the reply, of which there is nothing yet; then tell of it."""
        if response.conversation is None:
            return response.announce()
        said = [Item.said(message, response.created) for message in response.request.input]
        kept = await self._journal.add(Held(response.user, response.conversation, response.item, said, position))
        response.announce()
        if not kept:
            response.warn(NotKept())

    async def _end(self, response: Response) -> None:
        """Wait for a reply's end, whatever that is: what was announced is finished, what was not is refused."""
        await asyncio.wait([response.making])
        try:
            response.making.result()
        except asyncio.CancelledError:
            response.status, response.reason = response.cancelled_as or ("failed", "server_shutdown")
        except Exception as error:
            if not isinstance(error, Refused):
                logger.error("%s failed", response.id, exc_info=None if isinstance(error, EngineFailed) else error)
            if not response.announced:
                return self._refuse(response, error if isinstance(error, Refused) else ServerFailed())
            response.status, response.reason = "failed", "server_error"
        await self._store(response)
        del self._live[response.id]
        self._note(response, response.status, response.reason)
        response.finish()

    def _refuse(self, response: Response, refused: Refused) -> None:
        del self._live[response.id]
        self._note(response, "refused", refused.code)
        response.refuse(refused)

    async def _store(self, response: Response) -> None:
        """Have the end of a reply kept, by its conversation or for a while."""
        if response.completion:
            return
        if response.conversation is None:
            asyncio.get_running_loop().call_later(self._linger, self._journal.forget, response.id)
        kept = await self._journal.end(Held(response.user, response.conversation, response.item))
        if not kept and response.conversation is not None:
            response.warn(NotKept())

    def _note(self, response: Response, status: str, reason: str | None) -> None:
        """Count what became of a reply, and log it."""
        self._metrics.responses.labels(status, reason).inc()
        seconds = round(time.monotonic() - response.asked_at, 3)
        what: dict[str, object] = {"response": response.id, "user": response.user, "status": status, "reason": reason}
        log("reply", **what, **response.usage.public(), seconds=seconds)

    async def _write_along(self) -> None:
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            growing = [live for live in self._live.values() if live.deltas and live.conversation is not None]
            something = growing or self._journal.unwritten or self._journal.trouble
            if something and not await self._journal.write(response.item for response in growing):
                for response in growing:
                    response.warn(NotKept())

    async def _end_all(self) -> None:
        for response in self._live.values():
            response.cancel("failed", "server_shutdown")
        if self._live:
            await asyncio.wait([response.ending for response in self._live.values()])
