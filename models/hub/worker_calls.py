"""What the hub may call in a worker."""

from __future__ import annotations

from typing import Protocol

from models.generation.events import ResponseEvent
from models.model_info import ModelInfo
from models.store.conversations import Conversation
from models.users.connections import Change
from models.users.users import Logins


class WorkerCalls(Protocol):
    """The methods of a worker. Its listeners and connections have numbers."""

    def on_event(self, listeners: list[int], event: ResponseEvent) -> None:
        """Pass an event of a response on to some listeners."""

    async def wait_sent(self, listener: int) -> None:
        """Wait until a listener has passed on all events."""

    def presence_changed(self, connection: int, change: Change, user: str) -> None:
        """Tell a client that another user has joined or left."""

    def conversation_changed(self, connection: int, id: str, conversation: Conversation | None) -> None:
        """Tell a client that a conversation has changed; None: that it is deleted."""

    def close(self, connection: int, code: int, reason: str) -> None:
        """Close a connection."""

    def logins_changed(self, logins: Logins) -> None:
        """Replace who may log in."""

    def models_changed(self, models: tuple[ModelInfo, ...]) -> None:
        """Replace the models that clients may choose from."""
