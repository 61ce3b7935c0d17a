"""A worker: it talks to clients, and leaves the rest to the hub."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from models.errors import ServerUnavailableError
from models.generation.events import ResponseEvent
from models.hub.client import HubClient
from models.hub.launcher import Launcher
from models.hub.remote_parts import (
    RemoteConnections,
    RemoteConversations,
    RemoteFeed,
    RemoteMetrics,
    RemoteStatus,
    RemoteUsers,
)
from models.hub.remote_responses import RemoteResponses
from models.hub.service import HubService, Opened
from models.model_info import ModelInfo, ModelList
from models.settings import Settings
from models.store.conversations import Conversation
from models.store.database import Database, open_database
from models.users.connections import Change
from models.users.users import Logins

END_SECONDS = 2.0  # for the last events, after the hub has ended all replies


class Worker:
    """Puts the parts of a worker's server on `state`, and passes the calls of the hub on to them."""

    def __init__(self, state: Any, settings: Settings, database: Database, hub: HubClient) -> None:
        self._state = state
        self._hub = hub
        self._users = state.users = RemoteUsers.of(hub, settings, database)
        self._connections = state.connections = RemoteConnections(hub)
        state.conversations = RemoteConversations(database, hub)
        self._responses = state.responses = RemoteResponses(hub, state.conversations)
        state.feed, state.metrics, state.status = RemoteFeed(hub), RemoteMetrics(hub), RemoteStatus(hub)
        state.models = self._models = ModelList([])
        state.tokenizer = state.model = None

    @classmethod
    @asynccontextmanager
    async def opened(cls, state: Any, settings: Settings, launcher: Launcher) -> AsyncIterator[Worker]:
        """A worker, once its hub is ready. Raises StartError."""
        async with open_database(settings, migrate=False) as database:
            hub = HubClient(settings.data, launcher)
            worker = cls(state, settings, database, hub)
            async with hub.kept(worker):
                yield worker

    async def drain(self, seconds: float) -> None:
        """Give the responses that are followed here some seconds to end. New connections go to other workers."""
        self._hub.stopping = True
        self._connections.close_new(1012, "the server restarts")
        with suppress(TimeoutError, ServerUnavailableError):  # the hub does not answer, or has ended
            async with asyncio.timeout(seconds + END_SECONDS):
                ends = await self._hub.call(HubService.stopping, seconds == 0)
                await (self._hub.wait_lost() if ends else self._responses.wait_idle())

    # When the hub comes and goes

    def hub_opened(self, opened: Opened) -> None:
        """A hub is ready."""
        self._state.started = opened.started
        self.models_changed(opened.models)
        self._state.conversations.owner = opened.owner
        self._connections.rejoin()

    async def hub_lost(self) -> None:
        """The hub has ended."""
        await self._responses.end_all()

    # What the hub calls

    def on_event(self, listeners: list[int], event: ResponseEvent) -> None:
        """Pass an event of a response on to some listeners."""
        self._responses.on_event(listeners, event)

    async def wait_sent(self, listener: int) -> None:
        """Wait until a listener has passed on all events."""
        await self._responses.wait_sent(listener)

    def presence_changed(self, connection: int, change: Change, user: str) -> None:
        """Tell a client that another user has joined or left."""
        if found := self._connections.get(connection):
            found.presence_changed(change, user)

    def conversation_changed(self, connection: int, id: str, conversation: Conversation | None) -> None:
        """Tell a client that a conversation has changed; None: that it is deleted."""
        if found := self._connections.get(connection):
            found.conversation_changed(id, conversation)

    def close(self, connection: int, code: int, reason: str) -> None:
        """Close a connection."""
        if found := self._connections.get(connection):
            found.close(code, reason)

    def logins_changed(self, logins: Logins) -> None:
        """Replace who may log in."""
        self._users.replace(logins)

    def models_changed(self, models: tuple[ModelInfo, ...]) -> None:
        """Replace the models that clients may choose from."""
        self._models.replace(models)
