"""The other parts of a worker's server that are in the hub: each one passes its calls on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from typing import Any, Literal, TypeVar

from models.errors import ServerUnavailableError
from models.generation.parts import Readiness
from models.hub.client import HubClient
from models.hub.service import HubService
from models.settings import Settings
from models.store.conversations import Conversation, Conversations
from models.store.database import Database
from models.store.item import Item
from models.users.connections import Connection
from models.users.sessions import Session
from models.users.users import User, Users

T = TypeVar("T")

ANSWER_SECONDS = 3.0


class RemoteConnections:
    """The connections of this worker, which the hub knows by numbers. See `ConnectionRegistry`."""

    def __init__(self, hub: HubClient) -> None:
        self._hub = hub
        self._numbers = count(1)
        self._connections: dict[int, tuple[str, Connection]] = {}
        self._number_of: dict[Connection, int] = {}
        self._closing: tuple[int, str] | None = None  # how new connections are closed at once
        self._empty = asyncio.Event()

    async def join(self, user: str, connection: Connection) -> None:
        """Register a connection. Raises TooManyConnectionsError or ServerUnavailableError."""
        number = next(self._numbers)
        self._number_of[connection], self._connections[number] = number, (user, connection)
        try:
            await self._hub.call(HubService.join, user, number, connection.login_session)
        except BaseException:
            self.leave(user, connection)
            raise
        if self._closing:
            connection.close(*self._closing)

    def leave(self, user: str, connection: Connection) -> None:
        """Remove a connection."""
        number = self._number_of.pop(connection)
        del self._connections[number]
        self._hub.try_tell(HubService.leave_connection, number)
        if not self._connections:
            self._empty.set()

    def rejoin(self) -> None:
        """Register all connections at a new hub."""
        for number, (user, connection) in self._connections.items():
            self._hub.try_tell(HubService.rejoin, user, number, connection.login_session)

    def get(self, number: int) -> Connection | None:
        """A connection that is still open, by its number."""
        found = self._connections.get(number)
        return found[1] if found else None

    def close_new(self, code: int, reason: str) -> None:
        """Close all connections that join from now on."""
        self._closing = code, reason

    async def close_all(self, code: int, reason: str) -> None:
        """Close all connections of this worker, and wait until the last has left."""
        self.close_new(code, reason)
        self._empty.clear()
        for _, connection in self._connections.values():
            connection.close(code, reason)
        if self._connections:
            await self._empty.wait()


class RemoteUsers(Users):
    """The users as the hub knows them. It counts failed logins, and reads the database."""

    _hub: HubClient

    @classmethod
    def of(cls, hub: HubClient, settings: Settings, database: Database) -> RemoteUsers:
        """The users of a hub. Raises StartError."""
        users = cls.open(settings, database)
        users._hub = hub
        return users

    async def log_in(self, secret: str, user_id: str | None, address: str, device: str = "") -> User:
        """The user with a secret. See `Users.log_in`."""
        encoded = secret.encode(errors="surrogatepass")
        return await self._hub.call(HubService.log_in, encoded, user_id, address, device)

    async def end_session(self, session: Session) -> None:
        """End a session, and close its connections, also those of other workers."""
        await self._hub.call(HubService.end_session, session)


class RemoteConversations(Conversations):
    """The conversations of the database. The hub writes them."""

    def __init__(self, database: Database, hub: HubClient) -> None:
        super().__init__(database)
        self._hub = hub

    async def create(
        self,
        user: str,
        items: Sequence[Item] = (),
        metadata: Mapping[str, str] | None = None,
        title: str | None = None,
    ) -> Conversation:
        """A new conversation. See `Conversations.create`."""
        return await self._hub.call(HubService.create_conversation, user, items, metadata, title)

    async def update(
        self, user: str, id: str, title: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> Conversation:
        """Change the title of a conversation, or its metadata, or both. See `Conversations.update`."""
        return await self._hub.call(HubService.update_conversation, user, id, title, metadata)

    async def append_items(self, user: str, id: str, items: Sequence[Item]) -> list[Item]:
        """Add input items behind the leaf. See `Conversations.append_items`."""
        return await self._hub.call(HubService.append_items, user, id, items)

    async def delete_item(self, user: str, id: str, item: str) -> None:
        """Delete the content of an item. See `Conversations.delete_item`."""
        await self._hub.call(HubService.delete_item, user, id, item)


class RemoteFeed:
    """Passes on which conversations have changed."""

    def __init__(self, hub: HubClient) -> None:
        self._hub = hub

    def changed(self, user: str, id: str) -> None:
        """A conversation of a user has changed, in the database."""
        self._hub.try_tell(HubService.conversation_changed, user, id)


class RemoteCounter:
    """A counter of the hub's metrics."""

    def __init__(self, hub: HubClient, name: Literal["login_failures", "slow_clients"]) -> None:
        self._hub = hub
        self._name = name

    def inc(self) -> None:
        """Count one more."""
        self._hub.try_tell(HubService.count, self._name)


class RemoteMetrics:
    """What a worker counts."""

    def __init__(self, hub: HubClient) -> None:
        self.login_failures = RemoteCounter(hub, "login_failures")
        self.slow_clients = RemoteCounter(hub, "slow_clients")


class RemoteStatus:
    """What operators may ask the hub, which answers within some seconds, or counts as stuck."""

    def __init__(self, hub: HubClient, seconds: float = ANSWER_SECONDS) -> None:
        self._hub = hub
        self._seconds = seconds

    async def ready(self) -> Readiness:
        """Whether the model can answer."""
        try:
            return await self._ask(HubService.ready)
        except ServerUnavailableError as error:
            return Readiness(str(error))

    async def metrics(self) -> bytes:
        """The metrics for Prometheus. Raises ServerUnavailableError."""
        return await self._ask(HubService.metrics)

    async def arguments(self) -> Mapping[str, Any]:
        """The arguments in effect. Raises ServerUnavailableError."""
        return await self._ask(HubService.arguments)

    async def _ask(self, method: Callable[[HubService], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(self._seconds):
                return await self._hub.call(method)
        except TimeoutError:
            raise ServerUnavailableError("the process that runs the replies does not answer") from None
