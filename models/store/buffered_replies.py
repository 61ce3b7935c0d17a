"""Replies in memory: those without a conversation, and those that could not be written to the database yet."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from models.store.conversations import Conversations
from models.store.item import Item

REPLY_BYTES, ITEM_BYTES = 2000, 500  # estimates of the memory of a reply without its text, and of an input item


@dataclass(frozen=True)
class BufferedReply:
    """A reply in memory. If `position` is set, its input is not in the database yet."""

    user: str
    conversation: str | None  # None: it is never written, and can only be resumed
    reply: Item
    input: Sequence[Item] = ()
    position: int | None = None  # of the input in the conversation

    @property
    def bytes(self) -> int:
        """An estimate of the memory that it takes."""
        texts = [text for item in (*self.input, self.reply) for text in (item.content, item.cuts)]
        sizes = map(sys.getsizeof, [*texts, *(self.reply.options or {}).values()])
        return REPLY_BYTES + ITEM_BYTES * len(self.input) + sum(sizes)

    def applied_to(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of its conversation, including this reply."""
        if self.position is not None:
            return [*items[: self.position], *self.input, self.reply]
        return [self.reply if item.id == self.reply.id else item for item in items]

    async def write_to(self, conversations: Conversations, accepted: bool = False) -> None:
        """Put the input and the reply into the conversation. Raises the errors of `put_items`."""
        assert self.conversation is not None
        assert self.position is not None
        items = [*self.input, self.reply]
        await conversations.put_items(self.user, self.conversation, self.position, items, accepted)


class BufferedReplies:
    """Replies in memory, by id. If all of them take more than `max_bytes`, old ones are dropped.

    Those without a conversation go first, since nobody loses a message with them.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._replies: dict[str, BufferedReply] = {}

    def keep(self, buffered: BufferedReply) -> list[str]:
        """Keep a reply; it replaces its earlier state.

        Returns the ids of lost replies: they waited to be written, and were dropped because there was no room.
        """
        id, earlier = buffered.reply.id, self._replies.get(buffered.reply.id)
        if earlier and earlier.position is not None:
            buffered = replace(buffered, input=earlier.input, position=earlier.position)
        if buffered.position is None:  # its options are in the database, or nobody needs them; they may be large
            buffered = replace(buffered, reply=replace(buffered.reply, options=None))
        self.drop(id)
        self._replies[id] = buffered
        self._bytes += buffered.bytes
        lost = []
        while self._bytes > self._max_bytes:
            unstored = (one for one in self._replies.values() if one.conversation is None)
            oldest = next(chain(unstored, self._replies.values()))
            self.drop(oldest.reply.id)
            if oldest.conversation is not None:
                lost.append(oldest.reply.id)
                self._close_gap(oldest)
        return lost

    def _close_gap(self, lost: BufferedReply) -> None:
        """Move later replies of the conversation into the gap of a lost one, else the next turn overwrites them."""
        for buffered in self.unwritten_of(lost.user, lost.conversation):
            if lost.position is not None and buffered.position is not None and buffered.position > lost.position:
                position = buffered.position - len(lost.input) - 1
                self._replies[buffered.reply.id] = replace(buffered, position=position)

    def drop(self, id: str) -> None:
        """Forget a reply, if it is there."""
        if buffered := self._replies.pop(id, None):
            self._bytes -= buffered.bytes

    def drop_written(self, written: BufferedReply) -> None:
        """Forget a reply that is in the database now, unless it has changed since."""
        if self._replies.get(written.reply.id) is written:
            self.drop(written.reply.id)

    def find(self, user: str, id: str) -> tuple[str | None, Item] | None:
        """A reply of a user, with the id of its conversation."""
        buffered = self._replies.get(id)
        return (buffered.conversation, buffered.reply) if buffered and buffered.user == user else None

    def unwritten_of(self, user: str, conversation: str | None) -> list[BufferedReply]:
        """The replies of a conversation that are not in the database yet, in order."""
        return [one for one in self.unwritten if (one.user, one.conversation) == (user, conversation)]

    @property
    def unwritten(self) -> list[BufferedReply]:
        """All replies that wait to be written."""
        return [one for one in self._replies.values() if one.conversation is not None]
