"""Replies that have ended and are in no database: they are of no conversation, or could not be written yet."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from models.item import Item

REPLY_BYTES = 2000  # about what one takes beside its text


@dataclass(frozen=True)
class Held:
    """One of them, and whose it is."""

    user: str
    conversation: str | None
    reply: Item

    @property
    def bytes(self) -> int:
        """How much memory it takes, about."""
        return sys.getsizeof(self.reply.content) + sys.getsizeof(self.reply.cuts) + REPLY_BYTES


class HeldReplies:
    """Such replies, by id. The oldest are dropped where all take more than `most_bytes`."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._held: dict[str, Held] = {}

    def hold(self, user: str, conversation: str | None, reply: Item) -> None:
        """Keep a reply, but for its options, which nobody asks for here and which may be large."""
        held = self._held[reply.id] = Held(user, conversation, replace(reply, options=None))
        self._bytes += held.bytes
        while self._bytes > self._most_bytes:
            self.drop(next(iter(self._held)))

    def drop(self, id: str) -> None:
        """Forget a reply, where it is not forgotten yet."""
        if held := self._held.pop(id, None):
            self._bytes -= held.bytes

    def find(self, user: str, id: str) -> tuple[str | None, Item] | None:
        """A reply of a user, with the id of its conversation."""
        held = self._held.get(id)
        return (held.conversation, held.reply) if held and held.user == user else None

    @property
    def unwritten(self) -> list[Item]:
        """Those that belong in the database."""
        return [held.reply for held in self._held.values() if held.conversation is not None]
