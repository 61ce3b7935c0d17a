"""How the rest of the app asks for replies. It knows nothing of language models, and loads no torch."""

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
    """Nothing is stored, nothing of the prompt is left out, and the reply is gone when it has ended."""


@dataclass(frozen=True)
class Unstored:
    """The reply belongs to no conversation. It can be resumed for a while, from memory."""


@dataclass(frozen=True)
class NewConversation:
    """The reply begins a conversation whose id is new, so there is nothing to read."""

    id: str


@dataclass(frozen=True)
class StoredConversation:
    """The reply goes on with a conversation, after an item of it. Items behind that are deleted.

    A conversation that does not exist is an error, unless `create` is set: then it begins with this reply.
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
    """Someone who follows replies."""

    def on_event(self, event: ResponseEvent) -> None:
        """Take an event, without waiting."""


class Follower(Listener, Protocol):
    """A listener that can catch up on a reply."""

    async def wait_sent(self) -> None:
        """Wait until it has passed on all events."""


class ResponseService(Protocol):
    """Runs replies. Those of other users do not exist for a user."""

    def create(self, request: ResponseRequest, listener: Listener) -> str:
        """Start a reply, tell its events to a listener, and return its id. Raises ConversationBusyError."""

    async def follow(self, user: str, id: str, starting_after: int, follower: Follower) -> None:
        """Tell a follower the events after a text delta, up to the last. Raises ResponseNotFoundError."""

    def leave(self, listener: Listener) -> None:
        """Tell a listener nothing more. A reply that nobody follows ends after a while."""

    def cancel(self, user: str, id: str) -> None:
        """End a reply. Raises ResponseNotFoundError."""

    def cancel_all(self, listener: Listener) -> None:
        """End all replies that a listener follows."""

    def abandon(self, user: str, id: str) -> None:
        """End a reply whose client has gone, if it is still running."""

    async def delete_conversation(self, user: str, id: str) -> None:
        """Delete a conversation; a reply that is running in it ends first. Raises ConversationNotFoundError."""


@dataclass(frozen=True)
class ModelInfo:
    """What clients may know of the model."""

    name: str
    context: int  # tokens of a prompt and its reply together
    defaults: Options
