"""One message of a conversation as it is stored, and functions over all messages in order."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from itertools import takewhile
from typing import Any

from models.errors import ItemNotFoundError
from models.messages import Message, Role

TITLE_LENGTH = 60


class Status(StrEnum):
    """Whether a reply is still in progress, or how it ended."""

    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"  # ended by max_output_tokens or the context
    CANCELLED = "cancelled"
    FAILED = "failed"


class Edge(Enum):
    """The start or the end of a conversation, as a place without an item."""

    START = "start"  # before the first item
    END = "end"  # after the last item


@dataclass(frozen=True)
class Item:
    """A message as it is stored. The fields after `created` belong to replies that were generated here."""

    id: str
    role: Role
    content: str
    created: float  # Unix seconds
    status: Status | None = None
    reason: str | None = None  # why the reply ended
    usage: Mapping[str, int] | None = None  # token counts
    options: Mapping[str, Any] | None = None  # the options that differ from the defaults
    left_out: int | None = None  # how many of the oldest messages after the system prompt the model did not see
    cuts: str | None = None  # the lengths of the deltas, separated by spaces
    decode_seconds: float | None = None  # from the first delta to the last

    @classmethod
    def of_message(cls, message: Message, created: float) -> Item:
        """A new item with a message."""
        return cls(f"item_{uuid.uuid4().hex}", message["role"], message["content"], created)

    @property
    def bytes(self) -> int:
        """The size of its text as it is stored, without its options."""
        return len(self.content.encode()) + len(self.cuts or "")

    @property
    def sequence_number(self) -> int:
        """The number of the last delta; 0 if there is none."""
        return len((self.cuts or "").split())

    @property
    def deltas(self) -> list[str]:
        """The content, split into its deltas."""
        deltas, start = [], 0
        for length in map(int, (self.cuts or "").split()):
            deltas.append(self.content[start : start + length])
            start += length
        return deltas


def items_up_to(items: Sequence[Item], after: str | Edge) -> Sequence[Item]:
    """The items up to and including the one with an id, or up to an edge. Raises ItemNotFoundError."""
    if after is Edge.END:
        return items
    if after is Edge.START:
        return []
    for end, item in enumerate(items, start=1):
        if item.id == after:
            return items[:end]
    raise ItemNotFoundError


def count_left_out(items: Sequence[Item]) -> int:
    """How many of the oldest messages after the system prompt the model does not see any more."""
    unseen = next((item.left_out for item in reversed(items) if item.left_out is not None), 0)
    # System messages right after the cut would be taken for the system prompt.
    return unseen + len(_system_prompt(items[len(_system_prompt(items)) + unseen :]))


def visible_messages(items: Sequence[Item]) -> list[Message]:
    """The messages that the model sees: the system prompt, and the messages that are not left out."""
    prompt = _system_prompt(items)
    seen = [*prompt, *items[len(prompt) + count_left_out(items) :]]
    return [{"role": item.role, "content": item.content} for item in seen]


def _system_prompt(items: Sequence[Item]) -> list[Item]:
    """The system messages at the beginning of the items."""
    return list(takewhile(lambda item: item.role == "system", items))


def title_of(items: Sequence[Item]) -> str:
    """A title made from the beginning of the first user message."""
    first = next((item for item in items if item.role == "user"), items[0])
    line = " ".join(first.content.split())
    if len(line) <= TITLE_LENGTH:
        return line
    return f"{line[:TITLE_LENGTH].rpartition(' ')[0] or line[:TITLE_LENGTH]}…"
