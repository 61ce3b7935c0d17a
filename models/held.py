"""Replies that are in no database: they are of no conversation, or could not be written yet."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.conversations import Conversations
from models.item import Item

REPLY_BYTES, ITEM_BYTES = 2000, 500  # about what one takes beside its text, and an item of what it answers


@dataclass(frozen=True)
class Held:
    """One of them, and whose it is; with `position`, what it answers is not in the conversation yet either."""

    user: str
    conversation: str | None
    reply: Item
    said: Sequence[Item] = ()
    position: int | None = None  # in the conversation, of what was said

    @property
    def bytes(self) -> int:
        """How much memory it takes, about."""
        texts = [text for item in (*self.said, self.reply) for text in (item.content, item.cuts)]
        return (
            REPLY_BYTES
            + ITEM_BYTES * len(self.said)
            + sum(map(sys.getsizeof, [*texts, *(self.reply.options or {}).values()]))
        )

    def after(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of its conversation with this in them."""
        if self.position is not None:
            return [*items[: self.position], *self.said, self.reply]
        return [self.reply if item.id == self.reply.id else item for item in items]

    async def add_to(self, conversations: Conversations) -> None:
        """Add what was said and the reply to the conversation. Raises ConversationNotFound."""
        assert self.conversation is not None
        assert self.position is not None
        await conversations.add(self.user, self.conversation, self.position, [*self.said, self.reply])


class HeldReplies:
    """Such replies, by id. The oldest are dropped where all take more than `most_bytes`."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._held: dict[str, Held] = {}

    def hold(self, held: Held) -> list[str]:
        """Keep a reply, in place of an earlier state of it. Returns the ids of those that were to be written, and are
        dropped for want of room."""
        id, earlier = held.reply.id, self._held.get(held.reply.id)
        if earlier and earlier.position is not None:
            held = replace(held, said=earlier.said, position=earlier.position)
        if held.position is None:  # nobody asks for its options here, and they may be large
            held = replace(held, reply=replace(held.reply, options=None))
        self.drop(id)
        self._held[id] = held
        self._bytes += held.bytes
        lost = []
        while self._bytes > self._most_bytes:
            oldest = next(iter(self._held.values()))
            self.drop(oldest.reply.id)
            if oldest.conversation is not None:
                lost.append(oldest.reply.id)
                self._close_up(oldest)
        return lost

    def _close_up(self, lost: Held) -> None:
        """Have what comes after a loss in its conversation take its place, else the next turn would be put there."""
        for held in self.missing(lost.user, lost.conversation):
            if lost.position is not None and held.position is not None and held.position > lost.position:
                position = held.position - len(lost.said) - 1
                self._held[held.reply.id] = replace(held, position=position)

    def drop(self, id: str) -> None:
        """Forget a reply, where it is not forgotten yet."""
        if held := self._held.pop(id, None):
            self._bytes -= held.bytes

    def release(self, held: Held) -> None:
        """Forget a reply that is written, unless more has come of it since."""
        if self._held.get(held.reply.id) is held:
            self.drop(held.reply.id)

    def find(self, user: str, id: str) -> tuple[str | None, Item] | None:
        """A reply of a user, with the id of its conversation."""
        held = self._held.get(id)
        return (held.conversation, held.reply) if held and held.user == user else None

    def missing(self, user: str, conversation: str | None) -> list[Held]:
        """What a conversation lacks in the database, in order."""
        return [held for held in self.unwritten if (held.user, held.conversation) == (user, conversation)]

    @property
    def unwritten(self) -> list[Held]:
        """Those that belong in the database."""
        return [held for held in self._held.values() if held.conversation is not None]
