"""The responses of a user, on whichever host they run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from models.errors import APIError, ResponseNotFoundError, ServerError, ServerUnavailableError
from models.generation.events import Created
from models.generation.interface import Follower, Listener, ResponseRequest
from models.generation.manager import ResponseManager
from models.generation.response import beginning_of, replay
from models.hosts.once_follower import OnceFollower
from models.hosts.peer import Peer
from models.hosts.peers import Peers
from models.messages import Message
from models.store.conversations import Conversations
from models.store.database import DATABASE_ERRORS
from models.store.item import Item
from models.store.responses import RunningReply

logger = logging.getLogger("parley")

RETRY_SECONDS = 1.0


class Relay(NamedTuple):
    """A response of another host that a follower here gets, and the task that passes it on."""

    user: str
    id: str
    task: asyncio.Task[None]


class HostResponses:
    """A `ResponseService` for one of several hosts: what runs on another one is followed and ended there.

    While that host does not answer, its replies are followed as the database has them, until they have ended. New
    responses run on this host. One that is not stored is known only to its own host.
    """

    def __init__(self, own: ResponseManager, conversations: Conversations, peers: Peers) -> None:
        self._own = own
        self._conversations = conversations
        self._peers = peers
        self._relays: dict[Listener, dict[str, Relay]] = {}  # by follower, and by the id of the response
        self._cancelling: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, own: ResponseManager, conversations: Conversations, peers: Peers
    ) -> AsyncIterator[HostResponses]:
        """The responses of all hosts for as long as the context lasts. From now on, the others reach this one."""
        responses = cls(own, conversations, peers)
        await peers.serve(own)
        try:
            yield responses
        finally:
            await responses._close()

    def create(self, request: ResponseRequest, listener: Listener) -> str:
        """Start a response, send its events to a listener, the first one perhaps at once, and return its id."""
        return self._own.create(request, listener)

    async def follow(self, user: str, id: str, follower: Follower) -> None:
        """Send a follower all events of a response, past and future ones. Raises ResponseNotFoundError."""
        if await self._elsewhere(user, id) is None:
            return await self._own.follow(user, id, follower)
        caught_up = asyncio.Event()
        relaying = asyncio.create_task(self._relay(user, id, OnceFollower(follower, id), caught_up))
        relays = self._relays.setdefault(follower, {})
        if earlier := relays.get(id):
            earlier.task.cancel()
        relays[id] = Relay(user, id, relaying)
        relaying.add_done_callback(lambda _: self._forget(follower, id, relaying))
        await caught_up.wait()

    async def find(self, user: str, id: str) -> tuple[str | None, Item]:
        """The conversation and the reply of a response, as far as it is. Raises ResponseNotFoundError."""
        return await self._own.find(user, id)

    def leave(self, listener: Listener) -> None:
        """Stop sending events to a listener. A response that nobody follows ends after a while."""
        self._own.leave(listener)
        for relay in self._relays.pop(listener, {}).values():
            relay.task.cancel()

    async def cancel(self, user: str, id: str, steered: bool = False) -> None:
        """End a response. Raises ResponseNotFoundError if it does not run, or ServerUnavailableError."""
        if reply := await self._elsewhere(user, id):
            await (await self._host_of(reply)).cancel(user, id, steered)
        else:
            await self._own.cancel(user, id, steered)

    def cancel_all(self, listener: Listener) -> None:
        """End all responses that a listener follows."""
        self._own.cancel_all(listener)
        for relay in self._relays.get(listener, {}).values():
            cancelling = asyncio.create_task(self._try_cancel(relay.user, relay.id))
            self._cancelling.add(cancelling)
            cancelling.add_done_callback(self._cancelling.discard)

    def abandon(self, user: str, id: str) -> None:
        """End a response that was created here and whose client has disconnected, if it is still running."""
        self._own.abandon(user, id)

    async def find_message(self, user: str, id: str) -> Message:
        """The message of a stored item, by its id. Raises ItemNotFoundError."""
        return await self._own.find_message(user, id)

    async def wait_ended(self, user: str, id: str) -> None:
        """Wait until a response has ended; return at once if it does not run. Raises ServerUnavailableError."""
        if reply := await self._elsewhere(user, id):
            await (await self._host_of(reply)).wait_ended(user, id)
        else:
            await self._own.wait_ended(user, id)

    async def delete(self, user: str, id: str) -> None:
        """Delete a response; it ends first, if it runs on a host that answers. Raises ResponseNotFoundError."""
        if reply := await self._elsewhere(user, id):
            await self._try_end(user, reply)
        await self._own.delete(user, id)

    async def set_leaf(self, user: str, id: str, item: str) -> None:
        """Make the branch of a conversation that goes through an item the current one. Raises APIError."""
        await self._own.set_leaf(user, id, item)

    async def delete_conversation(self, user: str, id: str) -> None:
        """Delete a conversation; responses that run in it end first, if they run on hosts that answer.

        Raises ConversationNotFoundError.
        """
        with suppress(*DATABASE_ERRORS):  # it is tried once more below, and tells then
            for reply in await self._conversations.replies_elsewhere(user, conversation=id):
                await self._try_end(user, reply)
        await self._own.delete_conversation(user, id)

    # Other hosts

    async def _elsewhere(self, user: str, id: str) -> RunningReply | None:
        """A response that runs on another host, as far as this can be known."""
        if self._own.runs(user, id):
            return None
        with suppress(*DATABASE_ERRORS):  # this host may have it in memory
            for reply in await self._conversations.replies_elsewhere(user, id=id):
                return reply
        return None

    async def _host_of(self, reply: RunningReply) -> Peer:
        """The host that runs a reply. Raises ServerUnavailableError."""
        if reply.address is None:
            raise ServerUnavailableError("the reply runs on another host, which has no PARLEY_PEER_ADDRESS")
        return await self._peers.at(reply.address)

    async def _relay(self, user: str, id: str, follower: OnceFollower, caught_up: asyncio.Event) -> None:
        """Pass a response of another host on until it has ended, whatever happens to the hosts."""
        try:
            while True:
                with suppress(ServerError):  # a host or the database does not answer
                    await self._pass_on(user, id, follower, caught_up)
                if follower.ended:
                    return
                caught_up.set()
                await asyncio.sleep(RETRY_SECONDS)
        except ResponseNotFoundError:
            follower.end_deleted()
        except Exception:
            logger.exception("%s cannot be followed any more", id)
        finally:
            caught_up.set()

    async def _pass_on(self, user: str, id: str, follower: OnceFollower, caught_up: asyncio.Event) -> None:
        """Pass a response on, from its host or from the database, as far as it goes. Raises APIError."""
        reply = await self._elsewhere(user, id)
        if reply is None:
            return await self._own.follow(user, id, follower)
        try:
            async with asyncio.timeout(RETRY_SECONDS):  # so that text of the database comes meanwhile
                host = await self._host_of(reply)
            await host.follow(user, id, follower, caught_up.set)
        except (ResponseNotFoundError, ServerUnavailableError, TimeoutError):
            conversation, stored = await self._own.find(user, id)
            created = Created(conversation, beginning_of(stored))
            await replay(follower, created, stored.output, ended=lambda: False)

    async def _try_cancel(self, user: str, id: str) -> None:
        with suppress(APIError):
            await self.cancel(user, id)

    async def _try_end(self, user: str, reply: RunningReply) -> None:
        with suppress(ServerUnavailableError):
            await (await self._host_of(reply)).end(user, reply.id)

    def _forget(self, follower: Follower, id: str, relaying: asyncio.Task[None]) -> None:
        """A relay has ended; another one of the same response may have begun since."""
        relays = self._relays.get(follower, {})
        if (relay := relays.get(id)) and relay.task is relaying:
            del relays[id]
        if not relays:
            self._relays.pop(follower, None)

    async def _close(self) -> None:
        tasks = [relay.task for relays in self._relays.values() for relay in relays.values()]
        tasks += self._cancelling
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
