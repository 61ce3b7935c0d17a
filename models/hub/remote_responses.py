"""The responses that the hub runs, as a worker sees them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

from models.errors import APIError, ServerError, ServerUnavailableError
from models.generation.events import (
    Created,
    Finished,
    OutputItemAdded,
    OutputItemDone,
    Rejected,
    ResponseEvent,
)
from models.generation.interface import Follower, Listener, ResponseRequest
from models.hub.client import HubClient
from models.hub.service import HubService
from models.messages import Message
from models.store.conversations import Conversations
from models.store.item import Item, Status

logger = logging.getLogger("parley")

LOOK_SECONDS = 1.0  # between two looks at a response that another host runs


@dataclass
class Followed:
    """A response that a listener follows."""

    user: str
    asked: bool  # by this listener, who gets an event in any case
    created: Created | None = None  # the first event, once it has come
    open: OutputItemAdded | None = None  # the part that has begun and not ended


class RemoteResponses:
    """A `ResponseService` whose responses run in the hub, which knows the listeners by numbers.

    If the hub ends, every response of it that is followed here ends too, as far as it was stored. One that another host
    runs goes on there; its end, with all of its text, comes from the database.
    """

    def __init__(self, hub: HubClient, conversations: Conversations) -> None:
        self._hub = hub
        self._conversations = conversations
        self._numbers = count(1)
        self._number_of: dict[Listener, int] = {}
        self._listeners: dict[int, Listener] = {}
        self._followed: dict[int, dict[str, Followed]] = {}  # by the number of the listener and the id
        self._idle = asyncio.Event()  # nothing is followed
        self._waiting: set[asyncio.Task[None]] = set()  # for the end of responses that another host runs

    # As in ResponseService

    def create(self, request: ResponseRequest, listener: Listener) -> str:
        """Start a response, send its events to a listener, the first one perhaps at once, and return its id."""
        number = self._note(listener, request.id, Followed(request.user, asked=True))
        try:
            created = self._hub.start(HubService.create, request, number)
            created.add_done_callback(partial(self._on_created, number, request.id))
        except APIError as error:
            self._reject(number, request.id, error)
        return request.id

    async def follow(self, user: str, id: str, follower: Follower) -> None:
        """Send a follower all events of a response, past and future ones. Raises ResponseNotFoundError."""
        followed = Followed(user, asked=False)
        number = self._note(follower, id, followed)
        try:
            await self._hub.call(HubService.follow, user, id, number)
        except BaseException as error:
            if isinstance(error, ServerUnavailableError) and followed.created:
                return  # `end_all` sends the last event
            self._forget(number, id)
            raise

    async def find(self, user: str, id: str) -> tuple[str | None, Item]:
        """The conversation and the reply of a response, as far as it is. Raises ResponseNotFoundError."""
        return await self._hub.call(HubService.find, user, id)

    def leave(self, listener: Listener) -> None:
        """Stop sending events to a listener. A response that nobody follows ends after a while."""
        if number := self._number_of.get(listener):
            self._remove(number)

    async def cancel(self, user: str, id: str, steered: bool = False) -> None:
        """End a response. Raises ResponseNotFoundError if it does not run."""
        await self._hub.call(HubService.cancel, user, id, steered)

    def cancel_all(self, listener: Listener) -> None:
        """End all responses that a listener follows."""
        if number := self._number_of.get(listener):
            self._hub.try_tell(HubService.cancel_all, number)

    def abandon(self, user: str, id: str) -> None:
        """End a response whose client has disconnected, if it is still running."""
        self._hub.try_tell(HubService.abandon, user, id)

    async def find_message(self, user: str, id: str) -> Message:
        """The message of a stored item, by its id. Raises ItemNotFoundError."""
        return await self._hub.call(HubService.find_message, user, id)

    async def wait_ended(self, user: str, id: str) -> None:
        """Wait until a response has ended; return at once if it does not run."""
        await self._hub.call(HubService.wait_ended, user, id)

    async def delete(self, user: str, id: str) -> None:
        """Delete a response; it ends first, if it runs. Raises ResponseNotFoundError."""
        await self._hub.call(HubService.delete, user, id)

    async def set_leaf(self, user: str, id: str, item: str) -> None:
        """Make the branch of a conversation that goes through an item the current one. Raises APIError."""
        await self._hub.call(HubService.set_leaf, user, id, item)

    async def delete_conversation(self, user: str, id: str) -> None:
        """Delete a conversation; responses that run in it end first. Raises ConversationNotFoundError."""
        await self._hub.call(HubService.delete_conversation, user, id)

    # What comes from the hub

    def on_event(self, listeners: list[int], event: ResponseEvent) -> None:
        """Pass an event on to some listeners."""
        for number in listeners:
            try:
                self._pass_on(number, event)
            except Exception:  # the others get it all the same
                logger.exception("unexpected error in a listener")

    async def wait_sent(self, number: int) -> None:
        """Wait until a follower has passed on all events."""
        if listener := self._listeners.get(number):
            await listener.wait_sent()  # type: ignore[attr-defined]

    async def end_all(self) -> None:
        """End all responses that are followed here: the hub has ended."""
        ended = [(number, id, one) for number, all in self._followed.items() for id, one in all.items()]
        for number, id, followed in ended:
            if not followed.created:
                if followed.asked:
                    self._reject(number, id, ServerUnavailableError())
            elif await self._runs_elsewhere(followed.user, id, if_unknown=False):
                waiting = asyncio.create_task(self._end_later(number, followed, followed.created))
                self._waiting.add(waiting)
                waiting.add_done_callback(self._waiting.discard)
            else:
                self._end(number, followed, followed.created, await self._reply_of(followed.user, followed.created))

    # The end of the worker

    async def wait_idle(self) -> None:
        """Wait until no responses are followed here."""
        while self._followed:
            self._idle.clear()
            await self._idle.wait()

    def _on_created(self, number: int, id: str, created: asyncio.Future[None]) -> None:
        error = None if created.cancelled() else created.exception()
        if error and not isinstance(error, ServerUnavailableError):  # else `end_all` ends it
            self._reject(number, id, error if isinstance(error, APIError) else ServerError())

    def _reject(self, number: int, id: str, error: APIError) -> None:
        self.on_event([number], Rejected(id, error))

    def _pass_on(self, number: int, event: ResponseEvent) -> None:
        id = event.response_id
        followed = self._followed.get(number, {}).get(id)
        if followed is None:
            return  # the listener has left
        listener = self._listeners[number]
        match event:
            case Created():
                followed.created = event
            case OutputItemAdded():
                followed.open = event
            case OutputItemDone():
                followed.open = None
        if isinstance(event, Finished | Rejected):
            self._forget(number, id)
        listener.on_event(event)

    def _note(self, listener: Listener, id: str, followed: Followed) -> int:
        """The number of a listener that begins to follow a response."""
        number = self._number_of.get(listener) or next(self._numbers)
        self._number_of[listener], self._listeners[number] = number, listener
        self._followed.setdefault(number, {})[id] = followed
        return number

    def _forget(self, number: int, id: str) -> None:
        """A listener does not follow a response any more."""
        if (all := self._followed.get(number)) and all.pop(id, None) and not all:
            self._remove(number)

    def _remove(self, number: int) -> None:
        del self._followed[number], self._number_of[self._listeners.pop(number)]
        self._hub.try_tell(HubService.leave, number)
        if not self._followed:
            self._idle.set()

    def _end(self, number: int, followed: Followed, created: Created, reply: Item) -> None:
        """Tell a listener that a response has ended."""
        if (part := followed.open) and part.index < len(reply.output):
            self.on_event([number], OutputItemDone(reply.id, part.index, reply.output[part.index]))
        self.on_event([number], Finished(created.conversation, reply))

    async def _end_later(self, number: int, followed: Followed, created: Created) -> None:
        """Wait until a response that another host runs has ended, unless its listener leaves."""
        id = created.response_id
        while self._followed.get(number, {}).get(id) is followed:
            if not await self._runs_elsewhere(followed.user, id, if_unknown=True):
                return self._end(number, followed, created, await self._reply_of(followed.user, created))
            await asyncio.sleep(LOOK_SECONDS)

    async def _runs_elsewhere(self, user: str, id: str, if_unknown: bool) -> bool:
        """Whether another host runs a response; `if_unknown` is returned while the database is away."""
        try:
            return bool(await self._conversations.replies_elsewhere(user, id=id))
        except Exception:
            return if_unknown

    async def _reply_of(self, user: str, created: Created) -> Item:
        """The reply as far as it was stored, or as it began. It has failed, unless it had ended before."""
        reply = created.reply
        with suppress(Exception):  # it is not stored, or the database is away
            reply = (await self._conversations.find_response(user, reply.id)).item
        if reply.status is Status.IN_PROGRESS:
            reply = replace(reply, status=Status.FAILED, reason=ServerError.code)
        return reply
