"""One message of a conversation, and what follows from all of them in order."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, TypedDict

from models.refused import Refused

Role = Literal["system", "user", "assistant"]
Status = Literal["in_progress", "completed", "incomplete", "cancelled", "failed"]

TITLE_LENGTH = 60


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: Role
    content: str


class ItemNotFound(Refused):
    """An item that is not in the conversation."""

    code = "item_not_found"
    param = "response.after"
    message = "there is no such item in the conversation"


@dataclass(frozen=True)
class Item:
    """A message as it is kept. All that stands after `created` belongs to replies that were made here.

    `left_out` is how many of the oldest messages behind the system prompt the model did not see; `cuts` are the
    lengths of the deltas that the content came in; `decode_seconds` went by between the first and the last of them.
    """

    id: str
    role: Role
    content: str
    created: float  # Unix seconds
    status: Status | None = None
    reason: str | None = None
    usage: Mapping[str, int] | None = None
    options: Mapping[str, Any] | None = None
    left_out: int | None = None
    cuts: str | None = None
    decode_seconds: float | None = None

    @classmethod
    def said(cls, message: Message, created: float) -> Item:
        """The item that a message becomes."""
        return cls(f"item_{uuid.uuid4().hex}", message["role"], message["content"], created)

    @property
    def sequence_number(self) -> int:
        """The number of the last delta; 0 where there is none."""
        return len((self.cuts or "").split())

    @property
    def deltas(self) -> list[str]:
        """The content in the pieces that it came in."""
        deltas, start = [], 0
        for length in map(int, (self.cuts or "").split()):
            deltas.append(self.content[start : start + length])
            start += length
        return deltas

    def public(self) -> dict[str, Any]:
        """The item as JSON has it."""
        message = {"id": self.id, "role": self.role, "content": self.content, "created": self.created}
        if self.status is None:
            return message
        return message | {
            "status": self.status,
            "status_details": {"reason": self.reason},
            "usage": self.usage,
            "options": self.options,
            "left_out": self.left_out,
            "sequence_number": self.sequence_number,
            "decode_seconds": self.decode_seconds,
        }


def up_to(items: Sequence[Item], id: str) -> Sequence[Item]:
    """The items up to the one with an id; none for "none". Raises ItemNotFound."""
    ends = [end for end, item in enumerate(items, start=1) if item.id == id]
    if not ends and id != "none":
        raise ItemNotFound
    return items[: ends[0]] if ends else []


def left_out(items: Sequence[Item]) -> int:
    """How many of the oldest messages behind the system prompt the model does not see any more."""
    unseen = next((item.left_out for item in reversed(items) if item.left_out is not None), 0)
    # What the system said at the cut would pass for its prompt.
    return unseen + len(_system(items[len(_system(items)) + unseen :]))


def messages(items: Sequence[Item]) -> list[Message]:
    """What the model sees of the items: the system prompt that they begin with, and those that are not left out."""
    prompt = _system(items)
    seen = [*prompt, *items[len(prompt) + left_out(items) :]]
    return [{"role": item.role, "content": item.content} for item in seen]


def _system(items: Sequence[Item]) -> list[Item]:
    """What the system says at the beginning of the items."""
    return list(takewhile(lambda item: item.role == "system", items))


def title(items: Sequence[Item]) -> str:
    """A title from the beginning of what the user said first."""
    first = next((item for item in items if item.role == "user"), items[0])
    line = " ".join(first.content.split())
    if len(line) <= TITLE_LENGTH:
        return line
    return f"{line[:TITLE_LENGTH].rpartition(' ')[0] or line[:TITLE_LENGTH]}…"
