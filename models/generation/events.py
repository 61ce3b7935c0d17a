"""The events that a response sends to its listeners. Each protocol renders them in its own way."""

from __future__ import annotations

from msgspec import Struct

from models.errors import APIError
from models.store.item import Item


class Created(Struct, frozen=True):
    """The request is accepted; messages that a conversation keeps are stored, or wait to be stored.

    A Finished event always follows.
    """

    response_id: str
    conversation: str | None
    left_out: int  # how many of the oldest messages had no room in the context


class Rejected(Struct, frozen=True):
    """There is no reply, and nothing is stored. This is the only event."""

    response_id: str
    error: APIError


class Queued(Struct, frozen=True):
    """The response waits for a slot; position 1 is next."""

    response_id: str
    position: int


class TextDelta(Struct, frozen=True):
    """A piece of the reply's text, never empty; the pieces are numbered from 1."""

    response_id: str
    sequence_number: int
    text: str


class Warned(Struct, frozen=True):
    """Something is wrong, but the response goes on."""

    response_id: str
    error: APIError


class Finished(Struct, frozen=True):
    """The response has ended. This is the last event."""

    conversation: str | None
    reply: Item


ResponseEvent = Created | Rejected | Queued | TextDelta | Warned | Finished
