"""What happens to a reply, as those who follow it are told. Each protocol renders these events in its own way."""

from __future__ import annotations

from msgspec import Struct

from models.errors import APIError
from models.store.item import Item


class Created(Struct, frozen=True):
    """The request is accepted and its messages are stored. A Finished event will follow, whatever happens."""

    response_id: str
    conversation: str | None
    left_out: int  # how many of the oldest messages had no room in the context


class Rejected(Struct, frozen=True):
    """There will be no reply, and nothing is stored. No other event comes."""

    response_id: str
    error: APIError


class Queued(Struct, frozen=True):
    """The reply waits for a slot; position 1 is next."""

    response_id: str
    position: int


class TextDelta(Struct, frozen=True):
    """A piece of the reply's text, never empty; the pieces are numbered from 1."""

    response_id: str
    sequence_number: int
    text: str


class Warned(Struct, frozen=True):
    """Something is wrong, but the reply goes on."""

    response_id: str
    error: APIError


class Finished(Struct, frozen=True):
    """The reply has ended. This is the last event."""

    conversation: str | None
    reply: Item


ResponseEvent = Created | Rejected | Queued | TextDelta | Warned | Finished
