"""What a server that runs replies consists of, and what operators may ask it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from msgspec import Struct

from models.errors import ServerStoppingError
from models.generation.admission import Admission
from models.generation.interface import ResponseService
from models.generation.manager import ResponseManager
from models.language.chat import Chat
from models.model_info import ModelList
from models.ops.metrics import Metrics
from models.settings import Settings
from models.shared.shared_state import SharedState
from models.store.conversations import Conversations
from models.users.connections import ConnectionRegistry
from models.users.conversation_feed import ConversationFeed
from models.users.users import Users


class Parts(Protocol):
    """The parts of a server, as they stand on `app.state`."""

    settings: Settings
    started: int  # Unix seconds
    users: Users
    conversations: Conversations
    connections: ConnectionRegistry
    metrics: Metrics
    admission: Admission
    chat: Chat
    shared: SharedState
    models: ModelList
    feed: ConversationFeed
    manager: ResponseManager  # of the responses that run here
    responses: ResponseService


class Readiness(Struct, frozen=True):
    """Whether the model can answer: `trouble` says why not, `warning` what else is wrong."""

    trouble: str | None = None
    warning: str | None = None


class Status:
    """What operators may ask a server."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def ready(self) -> Readiness:
        """Whether the model can answer."""
        parts = self._parts
        trouble = parts.chat.trouble or (ServerStoppingError.message if parts.admission.closed else None)
        warnings = parts.users.trouble, parts.manager.trouble, parts.shared.trouble, parts.chat.warning
        return Readiness(trouble, next(filter(None, warnings), None))

    async def metrics(self) -> bytes:
        """The metrics for Prometheus."""
        return self._parts.metrics.text()

    async def arguments(self) -> Mapping[str, Any]:
        """The settings without secrets, and the values in effect for the model."""
        return self._parts.settings.without_secrets() | {**self._parts.chat.arguments}
