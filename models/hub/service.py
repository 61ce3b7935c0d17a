"""What the hub does for one worker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Struct

from models.generation.interface import ResponseRequest, Stateless
from models.generation.parts import Parts, Readiness, Status
from models.hub.link import Link
from models.hub.remote_listener import RemoteListener
from models.hub.wire import OnceEncoder
from models.hub.worker_calls import WorkerCalls
from models.messages import Message
from models.model_info import ModelInfo
from models.store.conversations import Conversation
from models.store.item import Item
from models.users.connections import Change
from models.users.sessions import Session
from models.users.users import User


class Opened(Struct, frozen=True):
    """What a worker has to know of a hub that is ready."""

    models: tuple[ModelInfo, ...]  # the default one first
    started: int  # Unix seconds
    owner: str  # of the replies that it runs, in the database


@dataclass(frozen=True, eq=False)
class RemoteConnection:
    """A connection of a worker, by its number."""

    link: Link
    number: int
    user: str
    login_session: str | None

    def presence_changed(self, change: Change, user: str) -> None:
        """Tell the client that another user has joined or left."""
        self.link.try_tell(WorkerCalls.presence_changed, self.number, change, user)

    def conversation_changed(self, id: str, conversation: Conversation | None) -> None:
        """Tell the client that a conversation has changed; None: that it is deleted."""
        self.link.try_tell(WorkerCalls.conversation_changed, self.number, id, conversation)

    def close(self, code: int, reason: str) -> None:
        """Close the connection."""
        self.link.try_tell(WorkerCalls.close, self.number, code, reason)


class HubService:
    """What one worker may ask the hub. Listeners and connections of the worker have numbers.

    A worker waits in `opened` until the model is loaded, before it calls anything else.
    """

    def __init__(
        self,
        parts_for: Callable[[int], Awaitable[Parts]],
        encoder: OnceEncoder,
        on_stopping: Callable[[HubService], bool],
        link: Link,
    ) -> None:
        self.is_stopping = self.at_once = False  # the worker
        self._parts: Parts
        self._parts_for = parts_for
        self._encoder = encoder
        self._on_stopping = on_stopping
        self._link = link
        self._following: set[RemoteListener] = set()
        self._stateless: set[int] = set()  # listeners of replies that nobody can resume
        self._connections: dict[int, RemoteConnection] = {}

    async def opened(self, supervisor: int) -> Opened:
        """Wait until the hub is ready. Raises ServerUnavailableError if it cannot start, or has another supervisor."""
        parts = self._parts = await self._parts_for(supervisor)
        self._link.try_tell(WorkerCalls.logins_changed, parts.users.logins)  # a result could overtake later changes
        return Opened(parts.models.all, parts.started, parts.conversations.owner)

    async def stopping(self, at_once: bool) -> bool:
        """The worker ends: at once, or as soon as its clients have their replies. Returns whether the hub ends too."""
        self.is_stopping, self.at_once = True, at_once
        return self._on_stopping(self)

    # Responses, as in ResponseService

    def create(self, request: ResponseRequest, listener: int) -> None:
        """Start a response."""
        if isinstance(request.target, Stateless):
            self._stateless.add(listener)
        self._parts.responses.create(request, self._listener(listener))

    async def follow(self, user: str, id: str, listener: int) -> None:
        """Send a listener all events of a response."""
        await self._parts.responses.follow(user, id, self._listener(listener))

    async def find(self, user: str, id: str) -> tuple[str | None, Item]:
        """The conversation and the reply of a response."""
        return await self._parts.responses.find(user, id)

    def leave(self, listener: int) -> None:
        """Stop sending events to a listener, for ever."""
        remote = RemoteListener(self._link, listener, self._encoder)
        self._parts.responses.leave(remote)
        self._following.discard(remote)
        self._stateless.discard(listener)

    async def cancel(self, user: str, id: str, steered: bool) -> None:
        """End a response."""
        await self._parts.responses.cancel(user, id, steered)

    def cancel_all(self, listener: int) -> None:
        """End all responses that a listener follows."""
        self._parts.responses.cancel_all(RemoteListener(self._link, listener, self._encoder))

    def abandon(self, user: str, id: str) -> None:
        """End a response whose client has disconnected."""
        self._parts.responses.abandon(user, id)

    async def find_message(self, user: str, id: str) -> Message:
        """The message of a stored item."""
        return await self._parts.responses.find_message(user, id)

    async def wait_ended(self, user: str, id: str) -> None:
        """Wait until a response has ended."""
        await self._parts.responses.wait_ended(user, id)

    async def delete(self, user: str, id: str) -> None:
        """Delete a response."""
        await self._parts.responses.delete(user, id)

    async def set_leaf(self, user: str, id: str, item: str) -> None:
        """Make another branch of a conversation the current one."""
        await self._parts.responses.set_leaf(user, id, item)

    async def delete_conversation(self, user: str, id: str) -> None:
        """Delete a conversation."""
        await self._parts.responses.delete_conversation(user, id)

    # Conversations, as far as they are written

    async def create_conversation(
        self, user: str, items: Sequence[Item], metadata: Mapping[str, str] | None, title: str | None
    ) -> Conversation:
        """A new conversation."""
        return await self._parts.conversations.create(user, items, metadata, title)

    async def update_conversation(
        self, user: str, id: str, title: str | None, metadata: Mapping[str, str] | None
    ) -> Conversation:
        """Change the title of a conversation, or its metadata, or both."""
        return await self._parts.conversations.update(user, id, title, metadata)

    async def append_items(self, user: str, id: str, items: Sequence[Item]) -> list[Item]:
        """Add input items to a conversation."""
        return await self._parts.conversations.append_items(user, id, items)

    async def delete_item(self, user: str, id: str, item: str) -> None:
        """Delete the content of an item."""
        await self._parts.conversations.delete_item(user, id, item)

    def conversation_changed(self, user: str, id: str) -> None:
        """Tell the clients of a user that a conversation has changed in the database."""
        self._parts.feed.changed(user, id)

    # Connections and users

    async def join(self, user: str, connection: int, login_session: str | None) -> None:
        """Register a new connection. Raises TooManyConnectionsError."""
        remote = RemoteConnection(self._link, connection, user, login_session)
        await self._parts.connections.join(user, remote)
        self._connections[connection] = remote
        if self._link.lost.is_set():  # while it waited
            self.leave_connection(connection)

    def rejoin(self, user: str, connection: int, login_session: str | None) -> None:
        """Register a connection that an earlier hub had."""
        remote = self._connections[connection] = RemoteConnection(self._link, connection, user, login_session)
        self._parts.connections.add(user, remote, announce=False)

    def leave_connection(self, connection: int) -> None:
        """Remove a connection."""
        if remote := self._connections.pop(connection, None):
            self._parts.connections.leave(remote.user, remote)

    async def log_in(self, secret: bytes, user_id: str | None, address: str, device: str) -> User:
        """The user with a secret. Raises WrongCredentialsError, TooManyLoginsError or DatabaseUnavailableError."""
        return await self._parts.users.log_in(secret.decode(errors="surrogatepass"), user_id, address, device)

    async def end_session(self, session: Session) -> None:
        """End the session of a browser."""
        await self._parts.users.end_session(session)

    # Operators

    async def ready(self) -> Readiness:
        """Whether the model can answer."""
        return await Status(self._parts).ready()

    async def metrics(self) -> bytes:
        """The metrics for Prometheus."""
        return await Status(self._parts).metrics()

    async def arguments(self) -> Mapping[str, Any]:
        """The arguments in effect."""
        return await Status(self._parts).arguments()

    def count(self, name: Literal["login_failures", "slow_clients"]) -> None:
        """Count something in the metrics."""
        getattr(self._parts.metrics, name).inc()

    # The end of the worker

    def end(self) -> None:
        """Leave what its clients followed, which goes on for a while: they may resume it through another worker."""
        for number in self._stateless:
            self.cancel_all(number)
        for listener in [*self._following]:
            self.leave(listener.number)
        for connection in [*self._connections]:
            self.leave_connection(connection)

    def _listener(self, number: int) -> RemoteListener:
        listener = RemoteListener(self._link, number, self._encoder)
        self._following.add(listener)
        return listener
