"""Runs responses. Keeps replies that belong to no conversation in memory for a while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace

from models.errors import (
    APIError,
    ContextLengthExceededError,
    ConversationLockedError,
    ConversationNotFoundError,
    EngineError,
    InvalidValueError,
    ItemNotFoundError,
    NotStoredError,
    PreviousResponseNotFoundError,
    ResponseNotFoundError,
    ServerError,
    ServerUnavailableError,
    one_line,
)
from models.generation.admission import Admission, Ticket
from models.generation.events import Created, Finished
from models.generation.interface import (
    Branch,
    Follower,
    Listener,
    NewConversation,
    ResponseRequest,
    Stateless,
    StoredConversation,
    Unstored,
)
from models.generation.response import ActiveResponse, Phase, beginning_of, replay
from models.language.chat import Chat, PreparedReply
from models.language.events import ArgumentsDelta, Done, Event, ReasoningDelta, TextDelta, ToolCallStarted
from models.messages import Message, Usage
from models.ops.logs import log
from models.ops.metrics import Metrics, ResponseTimer
from models.settings import Settings
from models.store.conversations import Conversations
from models.store.item import Item, Status, count_left_out, node_id, part_index, visible_messages
from models.store.place import Place
from models.store.responses import FoundPath
from models.store.write_buffer import WriteBuffer
from models.users.conversation_feed import ConversationFeed

logger = logging.getLogger("parley")

WRITE_SECONDS = 0.5  # between two writes of all growing replies
EXPIRY_SECONDS = 3600.0  # between two searches for responses that are too old


class ResponseManager:
    """Runs each response in its own tasks, independent of its listeners, and stores replies while they grow.

    A response that nobody follows for `linger` seconds is cancelled. A reply that belongs to no conversation can be
    resumed for `linger` seconds after its end, if the write buffer has room.
    """

    def __init__(
        self,
        chat: Chat,
        admission: Admission,
        conversations: Conversations,
        write_buffer: WriteBuffer,
        feed: ConversationFeed,
        metrics: Metrics,
        linger: int,
    ) -> None:
        self._chat = chat
        self._admission = admission
        self._conversations = conversations
        self._write_buffer = write_buffer
        self._feed = feed
        self._metrics = metrics
        self._linger = linger
        self._active: dict[str, ActiveResponse] = {}

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        chat: Chat,
        admission: Admission,
        conversations: Conversations,
        feed: ConversationFeed,
        settings: Settings,
        metrics: Metrics,
    ) -> AsyncIterator[ResponseManager]:
        """A manager that stores growing replies, and ends all responses when the context ends."""
        write_buffer = WriteBuffer(conversations, settings.replay_bytes, on_stored=feed.changed)
        manager = cls(chat, admission, conversations, write_buffer, feed, metrics, settings.linger)
        tasks = [asyncio.create_task(manager._write_growing()), asyncio.create_task(manager._delete_expired())]
        try:
            yield manager
        finally:
            await manager._end_all()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            if write_buffer.unwritten and not await write_buffer.write([]):
                logger.error("lost %d replies that could not be stored", write_buffer.unwritten)

    @property
    def trouble(self) -> str | None:
        """Why nothing can be stored at the moment; None if it can."""
        return self._write_buffer.trouble

    # Requests of clients

    def runs(self, user: str, id: str) -> bool:
        """Whether a response of a user runs here."""
        return self._active_of(user, id) is not None

    def create(self, request: ResponseRequest, listener: Listener) -> str:
        """Start a response, send its events to a listener, the first one perhaps at once, and return its id."""
        response = ActiveResponse(request, self._chat.models.of(request.chat.model).defaults)
        response.add_listener(listener)
        if response.conversation is not None and self._active_in(request.user, response.conversation):
            response.reject(ConversationLockedError())
        else:
            response.start(self._generate(response), self._conclude(response))
            self._active[response.id] = response
        return response.id

    async def follow(self, user: str, id: str, follower: Follower) -> None:
        """Send a follower all events of a response, past and future ones. Raises ResponseNotFoundError."""
        if response := self._active_of(user, id):
            return await response.catch_up(follower)
        conversation, reply = await self.find(user, id)
        if reply.status is Status.IN_PROGRESS:
            raise ServerUnavailableError("another process runs this reply: try again in a moment")
        await replay(follower, Created(conversation, beginning_of(reply)), reply.output)
        follower.on_event(Finished(conversation, reply))

    async def find(self, user: str, id: str) -> tuple[str | None, Item]:
        """The conversation and the reply of a response, as far as it is. Raises ResponseNotFoundError."""
        if response := self._active_of(user, id):
            return response.conversation, response.item
        found = await self._write_buffer.find_response(user, id)
        named = found.listed and found.item.previous is None
        return found.conversation if named else None, found.item

    async def find_message(self, user: str, id: str) -> Message:
        """The message of a stored item, by its id. Raises ItemNotFoundError."""
        index = part_index(id)
        if index is None:
            return (await self._write_buffer.find_node(user, id)).message
        with suppress(ResponseNotFoundError):
            _, reply = await self.find(user, node_id(id))
            if index < len(reply.output) and not reply.output[index].is_deleted:
                return Item.of_reply(reply.id, reply.created, [reply.output[index]]).message
        raise ItemNotFoundError

    def leave(self, listener: Listener) -> None:
        """Stop sending events to a listener. A response that nobody follows ends after a while."""
        for response in self._active.values():
            response.remove_listener(listener, self._linger)

    async def cancel(self, user: str, id: str, steered: bool = False) -> None:
        """End a response; one that is `steered` is incomplete, not cancelled. Raises ResponseNotFoundError."""
        response = self._active_of(user, id)
        if response is None:
            raise ResponseNotFoundError("no such reply is running")
        response.cancel(*((Status.INCOMPLETE, "steered") if steered else (Status.CANCELLED, "client_cancelled")))

    def cancel_all(self, listener: Listener) -> None:
        """End all responses that a listener follows."""
        for response in self._active.values():
            if response.is_followed_by(listener):
                response.cancel(Status.CANCELLED, "client_cancelled")

    def abandon(self, user: str, id: str) -> None:
        """End a response whose client has disconnected, if it is still running."""
        if response := self._active_of(user, id):
            response.cancel(Status.CANCELLED, "client_disconnected")

    async def wait_ended(self, user: str, id: str) -> None:
        """Wait until a response has ended; return at once if it does not run."""
        if response := self._active_of(user, id):
            await response.wait_concluded()

    async def delete(self, user: str, id: str) -> None:
        """Delete a response; it ends first, if it runs. Raises ResponseNotFoundError."""
        self.abandon(user, id)
        await self.wait_ended(user, id)
        if conversation := await self._write_buffer.delete_response(user, id):
            self._feed.changed(user, conversation)

    async def set_leaf(self, user: str, id: str, item: str) -> None:
        """Make the branch of a conversation that goes through an item, and on to the newest leaf, the current one.

        Raises ConversationNotFoundError, ItemNotFoundError or, while a reply runs there, ConversationLockedError.
        """
        if self._active_in(user, id):  # also one that is not stored yet: its client has seen another leaf
            raise ConversationLockedError
        await self._write_buffer.set_leaf(user, id, item)
        self._feed.changed(user, id)

    async def delete_conversation(self, user: str, id: str) -> None:
        """Delete a conversation; responses that run in it end first. Raises ConversationNotFoundError."""
        running = [one for one in self._active.values() if (one.user, one.stored_in) == (user, id)]
        for response in running:
            response.cancel(Status.CANCELLED, "client_cancelled")
        for response in running:
            await response.wait_concluded()
        await self._write_buffer.delete(user, id)
        self._feed.deleted(user, id)

    # Actions of the operator

    def revoke(self, user: str) -> None:
        """End the responses of a user whose secret is no longer valid: nobody may follow them any more."""
        for response in self._active.values():
            if response.user == user:
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
        async with self._admission.ticket(response.user) as ticket:
            before = await self._read(response)
            if not response.request.generate:
                await self._announce(response)
                return response.end("stop")
            try:
                reply = await self._prepare(response, before, ticket)
                await self._announce(response)
                del before  # a response may run long, and a conversation may be large
                async for position in ticket.wait():
                    response.set_position(position)
                response.set_admitted()
                await self._stream(response, reply, timer)
            finally:
                timer.end(ticket.waited, response.usage)

    async def _read(self, response: ActiveResponse) -> Sequence[Item]:
        """Find out where the request goes, and return the items before it."""
        user, items = response.user, list[Item]()
        match response.request.target:
            case NewConversation(id, listed):
                response.stored_in, response.place = id, Place(new=True, listed=listed)
            case StoredConversation(id, after, create):
                path = await self._write_buffer.path(user, id, after)
                if not path.exists and not create:
                    raise ConversationNotFoundError
                response.stored_in, items = id, list(path.items)
                response.place = Place(items[-1].id if items else None, path.leaf, new=not path.exists)
            case Branch(str(after)) | Unstored(str(after)) as target:
                found = await self._find_previous(user, after)
                items = list(found.items)
                response.place = Place(after, advances=False, listed=found.listed)
                if isinstance(target, Branch):
                    response.stored_in = found.conversation
                    if found.conversation is None:  # it is only in memory, for those who resume it
                        raise PreviousResponseNotFoundError(after)
        if items and items[-1].status == Status.IN_PROGRESS:
            raise ConversationLockedError
        return items

    async def _find_previous(self, user: str, id: str) -> FoundPath:
        try:
            return await self._write_buffer.path_of_response(user, id)
        except ResponseNotFoundError:
            raise PreviousResponseNotFoundError(id) from None

    async def _prepare(self, response: ActiveResponse, before: Sequence[Item], ticket: Ticket) -> PreparedReply:
        """The reply with its prompt, made from the earlier items and the messages of the request."""
        asked = response.request.chat
        asked = replace(asked, messages=[*visible_messages(before), *asked.messages])
        if not asked.messages and asked.prompt is None:
            raise InvalidValueError("input must contain text", "input")
        response.set_prompt(Usage(0), count_left_out(before))  # in case it ends before the prompt is ready
        try:
            response.enter(Phase.PREPARING)
            await asyncio.sleep(0)  # a cancellation that waited for this phase takes effect here
            reply = await self._chat.prepare(asked)
        except ContextLengthExceededError as error:
            await self._admission.count_tokens(response.user, error.tokens)  # it was work all the same
            raise
        except asyncio.CancelledError:
            if response.cancelled:
                await self._announce(response)
            raise
        ticket.usage = reply.usage
        response.set_prompt(reply.usage, count_left_out(before) + reply.left_out)
        return reply

    async def _announce(self, response: ActiveResponse) -> None:
        """Store the messages and the empty reply, then send `Created`."""
        response.enter(Phase.STORING)
        if response.stored_in is None:
            return response.announce()
        stored = await self._write_buffer.begin(response.turn)
        response.announce()
        if not stored:
            response.warn(NotStoredError())

    async def _stream(self, response: ActiveResponse, reply: PreparedReply, timer: ResponseTimer) -> None:
        left_out = reply.left_out
        async with aclosing(reply.events()) as events:
            async for event in events:
                if not isinstance(event, Done):
                    timer.delta()
                response.leave_out(reply.left_out - left_out)
                left_out = reply.left_out
                add_event(response, event)

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
            response.fail(error if isinstance(error, APIError) else ServerError())
        response.close()
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
        if response.stored_in is None:
            asyncio.get_running_loop().call_later(self._linger, self._write_buffer.forget, response.id)
        stored = await self._write_buffer.finish(response.turn)
        if not stored and response.stored_in is not None:
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
            growing = [one for one in self._active.values() if one.has_output and one.stored_in is not None]
            waiting = self._write_buffer.unwritten or self._write_buffer.trouble
            if (growing or waiting) and not await self._write_buffer.write(response.item for response in growing):
                for response in growing:
                    response.warn(NotStoredError())

    async def _delete_expired(self) -> None:
        while True:
            try:
                await self._conversations.delete_expired()
            except Exception as error:
                logger.error("old responses cannot be deleted: %s", one_line(error))
            await asyncio.sleep(EXPIRY_SECONDS)

    def _active_of(self, user: str, id: str) -> ActiveResponse | None:
        """A response, if it runs and belongs to the user."""
        response = self._active.get(id)
        return response if response and response.user == user else None

    def _active_in(self, user: str, conversation: str) -> ActiveResponse | None:
        """The response that runs in a conversation of a user, if any."""
        active = self._active.values()
        return next((one for one in active if (one.user, one.conversation) == (user, conversation)), None)


def add_event(response: ActiveResponse, event: Event) -> None:
    """Add what the model has said to its response."""
    match event:
        case TextDelta(text, logprobs):
            response.add_text("message", text, logprobs)
        case ReasoningDelta(text):
            response.add_text("reasoning", text)
        case ToolCallStarted(name):
            response.begin_call(name)
        case ArgumentsDelta(text):
            response.add_text("function_call", text)
        case Done(reason):
            response.end(reason)
