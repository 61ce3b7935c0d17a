"""How the rest of the app requests replies. Loads no torch."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from msgspec import Struct

from models.chat_request import ChatRequest
from models.generation.events import ResponseEvent
from models.messages import Message
from models.store.item import Edge, Item


class Stateless(Struct, frozen=True, tag=True):
    """Nothing is stored, and the reply is gone after its end."""


class Unstored(Struct, frozen=True, tag=True):
    """The reply is not stored, but can be resumed for a while. It continues the response `after`, if any."""

    after: str | None = None


class NewConversation(Struct, frozen=True, tag=True):
    """The reply begins a conversation. Its id is new, so there are no items to read.

    One that is not listed only holds responses for those who know their ids.
    """

    id: str
    listed: bool = True


class StoredConversation(Struct, frozen=True, tag=True):
    """The reply continues a conversation after its current item, or after another one, as a new branch.

    A conversation that does not exist is an error, unless `create` is set: then this reply begins it.
    """

    id: str
    after: str | Edge = Edge.END
    create: bool = False


class Branch(Struct, frozen=True, tag=True):
    """The reply continues a stored response, as a branch of its conversation, whose current item stays."""

    after: str


Target = Stateless | Unstored | NewConversation | StoredConversation | Branch


def new_response_id() -> str:
    """An id for a new response."""
    return f"resp_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class ResponseRequest:
    """A request for a reply. `chat` has the new messages only: the earlier ones are read from the target.

    `id` is the id of the response.
    """

    chat: ChatRequest
    target: Target
    background: bool = False  # goes on when nobody follows it
    generate: bool = True  # else there is a response without output, which later ones can continue
    previous: str | None = None  # the response that it continues, as the client knows it
    details: Mapping[str, Any] = field(default_factory=dict)  # what the protocol wants back with the reply; JSON
    id: str = field(default_factory=new_response_id, compare=False)

    @property
    def user(self) -> str:
        return self.chat.user


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
        """Start a response, send its events to a listener, the first one perhaps at once, and return its id."""

    async def follow(self, user: str, id: str, follower: Follower) -> None:
        """Send a follower all events of a response, past and future ones. Raises ResponseNotFoundError."""

    async def find(self, user: str, id: str) -> tuple[str | None, Item]:
        """The conversation and the reply of a response, as far as it is. Raises ResponseNotFoundError."""

    def leave(self, listener: Listener) -> None:
        """Stop sending events to a listener. A response that nobody follows ends after a while."""

    async def cancel(self, user: str, id: str, steered: bool = False) -> None:
        """End a response; one that is `steered` is incomplete, not cancelled.

        Raises ResponseNotFoundError if it does not run.
        """

    def cancel_all(self, listener: Listener) -> None:
        """End all responses that a listener follows."""

    def abandon(self, user: str, id: str) -> None:
        """End a response whose client has disconnected, if it is still running."""

    async def find_message(self, user: str, id: str) -> Message:
        """The message of a stored item, by its id. Raises ItemNotFoundError."""

    async def wait_ended(self, user: str, id: str) -> None:
        """Wait until a response has ended; return at once if it does not run."""

    async def delete(self, user: str, id: str) -> None:
        """Delete a response; it ends first, if it runs. Raises ResponseNotFoundError."""

    async def set_leaf(self, user: str, id: str, item: str) -> None:
        """Make the branch of a conversation that goes through an item, and on to the newest leaf, the current one.

        Raises ConversationNotFoundError, ItemNotFoundError or, while a reply runs there, ConversationLockedError.
        """

    async def delete_conversation(self, user: str, id: str) -> None:
        """Delete a conversation; responses that run in it end first. Raises ConversationNotFoundError."""
