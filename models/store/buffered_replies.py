"""Replies in memory: those without a conversation, and those that could not be written to the database yet."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from models.store.conversations import Conversations
from models.store.item import Item, linked
from models.store.place import Place

REPLY_BYTES, ITEM_BYTES = 2000, 500  # estimates of the memory of a reply without its text, and of an input item
PIECE_BYTES = 60  # of a piece of text without its characters
LOGPROB_BYTES = 200  # of a token with its probability
FIRST = Place()


@dataclass(frozen=True)
class BufferedReply:
    """A reply in memory, with the input and the place of its turn. If `begun` is set, the database has both.

    Without a conversation it is never written, and can only be found; then its place says what it continues.
    """

    user: str
    conversation: str | None
    reply: Item
    input: Sequence[Item] = ()
    place: Place = FIRST
    begun: bool = False

    @property
    def nodes(self) -> Sequence[Item]:
        """The input and the reply, below the parent of their place."""
        return linked([*self.input, self.reply], self.place.parent)

    @property
    def begins(self) -> bool:
        """Whether it begins a conversation that the database does not have yet."""
        return self.place.new and not self.begun

    @property
    def is_listed(self) -> bool:
        """Whether it is in a conversation that is listed."""
        return self.conversation is not None and self.place.listed

    @cached_property
    def bytes(self) -> int:
        """An estimate of the memory that it takes."""
        size = REPLY_BYTES + ITEM_BYTES * len(self.input)
        for item in (*self.input, self.reply):
            texts = [item.content, item.reasoning, *(call["arguments"] for call in item.tool_calls or ())]
            texts += [image["url"] for image in item.images or ()]
            values = [*(item.options or {}).values(), *(item.request or {}).values()]
            size += sum(map(sys.getsizeof, texts)) + sum(map(_size, values))
        for part in self.reply.output:
            tokens = chain.from_iterable(part.logprobs or ())
            size += PIECE_BYTES * len(part.pieces) + sys.getsizeof(part.text)
            size += sum(LOGPROB_BYTES * (1 + len(token.top)) for token in tokens)
        return size

    async def write_to(self, conversations: Conversations, accepted: bool = False) -> None:
        """Put the input and the reply into the conversation. Raises the errors of `begin_turn`."""
        assert self.conversation is not None
        await conversations.begin_turn(self.user, self.conversation, self.place, self.input, self.reply, accepted)


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
        if earlier and not earlier.begun:
            buffered = replace(buffered, input=earlier.input, place=earlier.place, begun=False)
        elif buffered.begun:
            buffered = replace(buffered, input=())
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
        """Put the turns that continue a lost one where that one was; the first one begins what that one began."""
        gone = {item.id for item in lost.nodes}
        begins = lost.begins
        for one in self.unwritten_of(lost.user, lost.conversation):
            if lost.begun or one.begun:
                continue
            place = replace(one.place, new=one.place.new or begins)
            if place.parent in gone:
                place = replace(place, parent=lost.place.parent)
            if place.leaf in gone:
                place = replace(place, leaf=lost.place.leaf)
            self._replies[one.reply.id] = replace(one, place=place)
            begins = False

    def drop(self, id: str) -> None:
        """Forget a reply, if it is there."""
        if buffered := self._replies.pop(id, None):
            self._bytes -= buffered.bytes

    def drop_written(self, written: BufferedReply) -> None:
        """Forget a reply that is in the database now, unless it has changed since."""
        if self._replies.get(written.reply.id) is written:
            self.drop(written.reply.id)

    def find(self, user: str, id: str) -> BufferedReply | None:
        """A reply of a user."""
        buffered = self._replies.get(id)
        return buffered if buffered and buffered.user == user else None

    def find_node(self, user: str, id: str) -> Item | None:
        """A reply of a user, or an input message of one, that the database may not have."""
        same = (one for one in self._replies.values() if one.user == user)
        return next((item for one in same for item in one.nodes if item.id == id), None)

    def walk(self, user: str, conversation: str | None, node: str | None) -> tuple[list[Item], str | None]:
        """The nodes in memory that lead to a node, and the id of the one before them, which is not in memory."""
        nodes: list[Item] = []
        while node and (turn := self._turn_of(user, conversation, node)):
            ids = [item.id for item in turn.nodes]
            nodes = [*turn.nodes[: ids.index(node) + 1], *nodes]
            node = turn.place.parent
        return nodes, node

    def _turn_of(self, user: str, conversation: str | None, node: str) -> BufferedReply | None:
        """The turn that has a node, if its beginning is not in the database."""
        same = (one for one in self._replies.values() if (one.user, one.conversation) == (user, conversation))
        return next((one for one in same if not one.begun and any(item.id == node for item in one.nodes)), None)

    def latest(self, user: str, items: Iterable[Item]) -> list[Item]:
        """The items, with the replies among them in the state that is in memory."""
        found = ((item, self.find(user, item.id)) for item in items)
        return [replace(one.reply, parent=item.parent) if one else item for item, one in found]

    def unwritten_of(self, user: str, conversation: str | None) -> list[BufferedReply]:
        """The replies of a conversation that are not in the database yet, in order."""
        return [one for one in self.unwritten if (one.user, one.conversation) == (user, conversation)]

    @property
    def unwritten(self) -> list[BufferedReply]:
        """All replies that wait to be written."""
        return [one for one in self._replies.values() if one.conversation is not None]


def leaf_behind(turns: Sequence[BufferedReply], leaf: str | None, exists: bool) -> tuple[str | None, bool]:
    """The leaf of a conversation behind some turns, and whether it is there and listed, from what the database says."""
    for turn in turns:
        if turn.begins and turn.place.listed and not exists:
            leaf, exists = turn.reply.id, True
        elif exists and not turn.begun and turn.place.advances and turn.place.leaf == leaf:
            leaf = turn.reply.id
    return leaf, exists


def _size(value: object) -> int:
    """An estimate of the memory that a JSON value takes."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    inner: Iterable[object] = value if isinstance(value, list | tuple) else ()
    return sys.getsizeof(value) + sum(map(_size, inner))
