"""How the rest of the app requests replies, and what it may know about the model (`ModelInfo`). Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from models.generation.events import ResponseEvent
from models.messages import Message
from models.options import Options
from models.store.item import Edge


@dataclass(frozen=True)
class Stateless:
    """Nothing is stored, no message is left out of the prompt, and the reply is gone after its end."""


@dataclass(frozen=True)
class Unstored:
    """The reply belongs to no conversation. It can be resumed for a while, from memory."""


@dataclass(frozen=True)
class NewConversation:
    """The reply begins a conversation. Its id is new, so there are no items to read."""

    id: str


@dataclass(frozen=True)
class StoredConversation:
    """The reply continues a conversation after one of its items. Later items are deleted.

    A conversation that does not exist is an error, unless `create` is set: then this reply begins it.
    """

    id: str
    after: str | Edge = Edge.END
    create: bool = False


Target = Stateless | Unstored | NewConversation | StoredConversation


@dataclass(frozen=True)
class ResponseRequest:
    """A request for a reply to messages."""

    user: str
    messages: Sequence[Message]
    options: Options
    target: Target


class Listener(Protocol):
    """An object that receives the events of responses."""

    def on_event(self, event: ResponseEvent) -> None:
        """Handle an event, without waiting."""


class Follower(Listener, Protocol):
    """A listener that can catch up on a response."""

    async def wait_sent(self) -> None:
        """Wait until the follower has passed on all events."""


class ResponseService(Protocol):
    """Runs responses. A user cannot find the responses of other users."""

    def create(self, request: ResponseRequest, listener: Listener) -> str:
        """Start a response, send its events to a listener, and return its id. Raises ConversationBusyError."""

    async def follow(self, user: str, id: str, starting_after: int, follower: Follower) -> None:
        """Send a follower all events after the text delta `starting_after`. Raises ResponseNotFoundError."""

    def leave(self, listener: Listener) -> None:
        """Stop sending events to a listener. A response that nobody follows ends after a while."""

    def cancel(self, user: str, id: str) -> None:
        """End a response. Raises ResponseNotFoundError."""

    def cancel_all(self, listener: Listener) -> None:
        """End all responses that a listener follows."""

    def abandon(self, user: str, id: str) -> None:
        """End a response whose client has disconnected, if it is still running."""

    async def delete_conversation(self, user: str, id: str) -> None:
        """Delete a conversation; a response that runs in it ends first. Raises ConversationNotFoundError."""


@dataclass(frozen=True)
class ModelInfo:
    """What clients may know about the model."""

    name: str
    context: int  # how many tokens a prompt and its reply may have together
    defaults: Options
