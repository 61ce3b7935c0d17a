"""Runs responses. Keeps replies that belong to no conversation in memory for a while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress

from models.errors import (
    APIError,
    ContextLengthExceededError,
    ConversationBusyError,
    ConversationNotFoundError,
    EngineError,
    NotStoredError,
    ResponseNotFoundError,
    ServerError,
)
from models.generation.admission import Admission, Ticket
from models.generation.events import Finished
from models.generation.interface import (
    Follower,
    Listener,
    ResponseRequest,
    Stateless,
    StoredConversation,
)
from models.generation.response import ActiveResponse, Phase, replay
from models.language.chat import Chat, PreparedReply
from models.language.events import Done, TextPiece
from models.messages import Usage
from models.ops.logs import log
from models.ops.metrics import Metrics, ResponseTimer
from models.settings import Settings
from models.store.buffered_replies import BufferedReply
from models.store.conversations import Conversations
from models.store.item import Item, Status, count_left_out, items_up_to, visible_messages
from models.store.write_buffer import WriteBuffer

logger = logging.getLogger("parley")

WRITE_SECONDS = 0.5  # between two writes of all growing replies


class ResponseManager:
    """Runs each response in its own tasks, independent of its listeners, and stores replies while they grow.

    A response that nobody follows for `linger` seconds is cancelled. A reply that belongs to no conversation can be
    resumed for `linger` seconds after its end, if the write buffer has room.
    """

    def __init__(
        self, chat: Chat, admission: Admission, write_buffer: WriteBuffer, metrics: Metrics, linger: int
    ) -> None:
        self._chat = chat
        self._admission = admission
        self._write_buffer = write_buffer
        self._metrics = metrics
        self._linger = linger
        self._active: dict[str, ActiveResponse] = {}

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, chat: Chat, admission: Admission, conversations: Conversations, settings: Settings, metrics: Metrics
    ) -> AsyncIterator[ResponseManager]:
        """A manager that stores growing replies, and ends all responses when the context ends."""
        if count := await conversations.fail_unfinished():
            logger.warning("%d replies were cut off when the server ended; their text so far is kept", count)
        write_buffer = WriteBuffer(conversations, settings.replay_bytes)
        manager = cls(chat, admission, write_buffer, metrics, settings.linger)
        writing = asyncio.create_task(manager._write_growing())
        try:
            yield manager
        finally:
            await manager._end_all()
            writing.cancel()
            await asyncio.wait([writing])
            if write_buffer.unwritten and not await write_buffer.write([]):
                logger.error("lost %d replies that could not be stored", write_buffer.unwritten)

    @property
    def trouble(self) -> str | None:
        """Why nothing can be stored at the moment; None if it can."""
        return self._write_buffer.trouble

    # Requests of clients

    def create(self, request: ResponseRequest, listener: Listener) -> str:
        """Start a response, send its events to a listener, and return its id. Raises ConversationBusyError."""
        response = ActiveResponse(request, self._chat.defaults)
        if response.conversation is not None and self._active_in(request.user, response.conversation):
            raise ConversationBusyError
        response.add_listener(listener)
        response.start(self._generate(response), self._conclude(response))
        self._active[response.id] = response
        return response.id

    async def follow(self, user: str, id: str, starting_after: int, follower: Follower) -> None:
        """Send a follower all events after the text delta `starting_after`. Raises ResponseNotFoundError."""
        response = self._active.get(id)
        if response and response.user == user:
            return await response.catch_up(follower, starting_after)
        found = await self._write_buffer.find_reply(user, id)
        if found is None:
            raise ResponseNotFoundError("there is no such reply, or it is no longer kept")
        conversation, reply = found
        await replay(follower, id, reply.deltas, starting_after)
        follower.on_event(Finished(conversation, reply))

    def leave(self, listener: Listener) -> None:
        """Stop sending events to a listener. A response that nobody follows ends after a while."""
        for response in self._active.values():
            response.remove_listener(listener, self._linger)

    def cancel(self, user: str, id: str) -> None:
        """End a response. Raises ResponseNotFoundError."""
        response = self._active.get(id)
        if response is None or response.user != user:
            raise ResponseNotFoundError("no such reply is running")
        response.cancel(Status.CANCELLED, "client_cancelled")

    def cancel_all(self, listener: Listener) -> None:
        """End all responses that a listener follows."""
        for response in self._active.values():
            if response.is_followed_by(listener):
                response.cancel(Status.CANCELLED, "client_cancelled")

    def abandon(self, user: str, id: str) -> None:
        """End a response whose client has disconnected, if it is still running."""
        response = self._active.get(id)
        if response and response.user == user:
            response.cancel(Status.CANCELLED, "client_disconnected")

    async def delete_conversation(self, user: str, id: str) -> None:
        """Delete a conversation; a response that runs in it ends first. Raises ConversationNotFoundError."""
        if response := self._active_in(user, id):
            response.cancel(Status.CANCELLED, "client_cancelled")
            await response.wait_concluded()
        await self._write_buffer.delete(user, id)

    # Actions of the operator

    def revoke(self, user: str) -> None:
        """End the stateless responses of a user whose secret is no longer valid.

        The others end `linger` seconds after their connections close.
        """
        for response in self._active.values():
            if isinstance(response.request.target, Stateless) and response.user == user:
                response.cancel(Status.FAILED, "revoked")

    async def drain(self, seconds: float) -> None:
        """Refuse new responses, give the running ones some seconds to finish, then end the rest."""
        self._admission.close()
        if self._active:
            logger.warning("waiting up to %g s for %d replies", seconds, len(self._active))
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    for response in list(self._active.values()):
                        await response.wait_concluded()
        await self._end_all()

    async def _end_all(self) -> None:
        responses = list(self._active.values())
        for response in responses:
            response.cancel(Status.FAILED, "server_shutdown")
        for response in responses:
            await response.wait_concluded()

    # The life of a response

    async def _generate(self, response: ActiveResponse) -> None:
        """Generate the reply: prompt, storage, slot, text."""
        timer = self._metrics.time_response()
        with self._admission.ticket(response.user) as ticket:
            before = await self._items_before(response)
            try:
                reply = await self._prepare(response, before, ticket)
                await self._announce(response, len(before))
                del before  # a response may run long, and a conversation may be large
                async for position in ticket.wait():
                    response.set_position(position)
                response.set_admitted()
                await self._stream(response, reply, timer)
            finally:
                timer.end(ticket.waited, response.usage)

    async def _prepare(self, response: ActiveResponse, before: Sequence[Item], ticket: Ticket) -> PreparedReply:
        """The reply with its prompt, made from the earlier items and the messages of the request."""
        request = response.request
        messages = [*visible_messages(before), *request.messages]
        keep_all = isinstance(request.target, Stateless)
        response.set_prompt(Usage(0), count_left_out(before))  # in case it ends before the prompt is ready
        try:
            response.enter(Phase.PREPARING)
            await asyncio.sleep(0)  # a cancellation that waited for this phase takes effect here
            reply = await self._chat.prepare(request.user, messages, request.options, keep_all)
        except ContextLengthExceededError as error:
            self._admission.count_tokens(request.user, error.tokens)  # it was work all the same
            raise
        except asyncio.CancelledError:
            if response.cancelled:
                await self._announce(response, len(before))
            raise
        ticket.usage = reply.usage
        response.set_prompt(reply.usage, count_left_out(before) + reply.left_out)
        return reply

    async def _items_before(self, response: ActiveResponse) -> Sequence[Item]:
        """The items of the conversation that come before the messages of the request."""
        target = response.request.target
        if not isinstance(target, StoredConversation):
            return []
        items = await self._write_buffer.items(response.user, target.id)
        if not items and not target.create:
            raise ConversationNotFoundError
        return items_up_to(items, target.after)

    async def _announce(self, response: ActiveResponse, position: int) -> None:
        """Store the messages and the empty reply, then send `Created`."""
        response.enter(Phase.STORING)
        if response.conversation is None:
            return response.announce()
        messages = [Item.of_message(message, response.created) for message in response.request.messages]
        reply = BufferedReply(response.user, response.conversation, response.item, messages, position)
        stored = await self._write_buffer.begin(reply)
        response.announce()
        if not stored:
            response.warn(NotStoredError())

    async def _stream(self, response: ActiveResponse, reply: PreparedReply, timer: ResponseTimer) -> None:
        async with aclosing(reply.events()) as events:
            async for event in events:
                match event:
                    case TextPiece(text):
                        timer.delta()
                        response.add_text(text)
                    case Done(reason):
                        response.end(reason)

    async def _conclude(self, response: ActiveResponse) -> None:
        """Wait until the reply ends in any way; finish the response if it was announced, else reject it."""
        error = await response.wait_generated()
        if isinstance(error, asyncio.CancelledError):
            response.end_cancelled()
        elif error is not None:
            if not isinstance(error, APIError):
                logger.error("%s failed", response.id, exc_info=None if isinstance(error, EngineError) else error)
            if response.phase is not Phase.ANNOUNCED:
                return self._reject(response, error if isinstance(error, APIError) else ServerError())
            response.fail()
        await self._store(response)
        del self._active[response.id]
        self._record(response, response.status, response.reason)
        response.finish()

    def _reject(self, response: ActiveResponse, error: APIError) -> None:
        del self._active[response.id]
        self._record(response, "refused", error.code)
        response.reject(error)

    async def _store(self, response: ActiveResponse) -> None:
        """Store a reply that has ended: in its conversation, or in memory for a while."""
        if isinstance(response.request.target, Stateless):
            return
        if response.conversation is None:
            asyncio.get_running_loop().call_later(self._linger, self._write_buffer.forget, response.id)
        stored = await self._write_buffer.finish(BufferedReply(response.user, response.conversation, response.item))
        if not stored and response.conversation is not None:
            response.warn(NotStoredError())

    def _record(self, response: ActiveResponse, status: str, reason: str | None) -> None:
        """Count and log how a response ended."""
        self._metrics.responses.labels(status, reason).inc()
        details: dict[str, object] = {
            "response": response.id,
            "user": response.user,
            "status": status,
            "reason": reason,
        }
        log("reply", **details, **response.usage.counts(), seconds=round(response.seconds, 3))

    async def _write_growing(self) -> None:
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            growing = [one for one in self._active.values() if one.has_text and one.conversation is not None]
            waiting = self._write_buffer.unwritten or self._write_buffer.trouble
            if (growing or waiting) and not await self._write_buffer.write(response.item for response in growing):
                for response in growing:
                    response.warn(NotStoredError())

    def _active_in(self, user: str, conversation: str) -> ActiveResponse | None:
        """The response that runs in a conversation of a user, if any."""
        active = self._active.values()
        return next((one for one in active if (one.user, one.conversation) == (user, conversation)), None)
