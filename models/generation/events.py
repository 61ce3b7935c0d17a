"""The events that a response sends to its listeners. Each protocol renders them in its own way.

The first one is `Created`, the last one `Finished`. Between them, each part of the reply has `OutputItemAdded`, its
deltas, and `OutputItemDone`. A replay gives the same events, but for `Queued` and `Warned`, which tell of a moment.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from models.errors import APIError
from models.messages import Usage
from models.output_item import OutputItem, TokenLogprob
from models.store.item import Item


class Created(Struct, frozen=True, tag=True):
    """The request is accepted; messages that a conversation keeps are stored, or wait to be stored.

    A Finished event always follows. `reply` has no output yet. `conversation` is the one that the request names.
    """

    conversation: str | None
    reply: Item

    @property
    def response_id(self) -> str:
        return self.reply.id


class Rejected(Struct, frozen=True, tag=True):
    """There is no reply, and nothing is stored. This is the only event."""

    response_id: str
    error: APIError


class Queued(Struct, frozen=True, tag=True):
    """The response waits for a slot; position 1 is next."""

    response_id: str
    position: int


class OutputItemAdded(Struct, frozen=True, tag=True):
    """The reply begins its next part, whose text follows; the parts are numbered from 0."""

    response_id: str
    index: int
    item: OutputItem


class OutputDelta(Struct, frozen=True, tag=True):
    """A piece of the text of the part that was added last, never empty."""

    response_id: str
    index: int
    text: str
    logprobs: Sequence[TokenLogprob] | None = None  # of its tokens, if the request asks for them
    usage: Usage | None = None  # the counts so far, which grow; None in a replay


class OutputItemDone(Struct, frozen=True, tag=True):
    """A part has ended."""

    response_id: str
    index: int
    item: OutputItem


class Warned(Struct, frozen=True, tag=True):
    """Something is wrong, but the response goes on."""

    response_id: str
    error: APIError


class Finished(Struct, frozen=True, tag=True):
    """The response has ended. This is the last event."""

    conversation: str | None
    reply: Item

    @property
    def response_id(self) -> str:
        return self.reply.id


ResponseEvent = Created | Rejected | Queued | OutputItemAdded | OutputDelta | OutputItemDone | Warned | Finished
