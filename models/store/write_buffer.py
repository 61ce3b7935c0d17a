"""Writes messages to the database, and keeps them in memory while it cannot."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from models.errors import (
    APIError,
    ConversationNotFoundError,
    DatabaseUnavailableError,
    ItemNotFoundError,
    NotStoredError,
    ResponseNotFoundError,
    one_line,
)
from models.store.buffered_replies import BufferedReplies, BufferedReply, leaf_behind
from models.store.conversations import Conversations, Path
from models.store.item import Edge, Item, node_id
from models.store.responses import Found, FoundPath

logger = logging.getLogger("parley")

PATIENCE = 1.0  # seconds; a busy disk takes some tenths


class WriteBuffer:
    """Stores replies in the database. Replies that cannot be written wait in memory, in up to `max_bytes`.

    No reply waits longer than `patience` seconds for a write. Reads through the buffer include what waits. `trouble`
    says why nothing can be written at the moment. `on_stored` is called with the user and the conversation when a turn
    has begun or ended in the database.
    """

    def __init__(
        self,
        conversations: Conversations,
        max_bytes: int,
        patience: float = PATIENCE,
        on_stored: Callable[[str, str], None] = lambda user, conversation: None,
    ) -> None:
        self.trouble: str | None = None
        self._conversations = conversations
        self._on_stored = on_stored
        self._buffered = BufferedReplies(max_bytes)
        self._patience = patience
        self._writing = asyncio.Lock()  # one write at a time, so that an old state never replaces a newer one
        self._lost: list[str] = []  # the ids of replies that were dropped: in the database, they must not seem to run
        self._begun: set[asyncio.Task[bool]] = set()  # writes that go on, also if nobody waits for them any more

    @property
    def unwritten(self) -> int:
        """How many replies wait to be written."""
        return len(self._buffered.unwritten)

    async def path(self, user: str, conversation: str, after: str | Edge = Edge.END) -> Path:
        """The nodes up to an item of a conversation or to an edge, written or not. See `Conversations.path`.

        Raises ItemNotFoundError or DatabaseUnavailableError.
        """
        waiting = self._buffered.unwritten_of(user, conversation)
        with _asking():
            stored = Path([], None, False)
            if not waiting or not waiting[0].begins:
                stored = await self._conversations.path(user, conversation, Edge.START if waiting else after)
            if not waiting:
                return stored
            leaf, exists = leaf_behind(waiting, stored.leaf, stored.exists)
            last = node_id(after) if isinstance(after, str) else leaf if after is Edge.END else None
            items, last = self._buffered.walk(user, conversation, last if exists else None)
            if last:
                items = [*(await self._conversations.path(user, conversation, last)).items, *items]
        if isinstance(after, str) and not items:
            raise ItemNotFoundError
        return Path(self._buffered.latest(user, items), leaf, exists)

    async def find_response(self, user: str, id: str) -> Found:
        """A response, written or not, or only in memory.

        Raises ResponseNotFoundError or DatabaseUnavailableError.
        """
        if found := self._buffered.find(user, id):
            return Found(found.conversation, found.is_listed, found.reply)
        with _asking():
            return await self._conversations.find_response(user, id)

    async def find_node(self, user: str, id: str) -> Item:
        """A node of any conversation, written or not. Raises ItemNotFoundError or DatabaseUnavailableError."""
        if node := self._buffered.find_node(user, id):
            return node
        with _asking():
            return await self._conversations.find_node(user, id)

    async def path_of_response(self, user: str, id: str) -> FoundPath:
        """The nodes up to and including a response, written or not, or only in memory.

        Raises ResponseNotFoundError or DatabaseUnavailableError.
        """
        found = self._buffered.find(user, id)
        with _asking():
            if found is None or found.begun:
                conversation, listed, items = await self._conversations.path_of_response(user, id)
                return FoundPath(conversation, listed, self._buffered.latest(user, items))
            nodes, last = self._buffered.walk(user, found.conversation, id)
            try:
                stored = await self._conversations.branch(user, last) if last else []
            except ItemNotFoundError:  # what it continues is gone
                raise ResponseNotFoundError("there is no such response") from None
            return FoundPath(found.conversation, found.is_listed, self._buffered.latest(user, [*stored, *nodes]))

    async def begin(self, reply: BufferedReply) -> bool:
        """Store the input and the empty reply. Returns False if they wait in memory.

        Raises ConversationNotFoundError, ItemNotFoundError, ConversationLockedError, ConversationFullError or
        StorageFullError.
        """
        return await self._store(reply, lambda: self._put(reply))

    async def finish(self, reply: BufferedReply) -> bool:
        """Store a reply that has ended. Returns False if it waits in memory."""
        if reply.conversation is None:
            self._keep(reply)
            return False
        return await self._store(replace(reply, begun=True), lambda: self._try_write([reply.reply]))

    async def delete(self, user: str, conversation: str) -> None:
        """Delete a conversation, written or not. Raises ConversationNotFoundError."""
        async with self._writing:
            unwritten = self._buffered.unwritten_of(user, conversation)
            try:
                await self._conversations.delete(user, conversation)
            except ConversationNotFoundError:
                if not unwritten:
                    raise
            for buffered in unwritten:
                self._buffered.drop(buffered.reply.id)

    async def set_leaf(self, user: str, id: str, item: str) -> None:
        """Make the branch that goes through an item the current one. What waits to be written is written first.

        Raises ConversationNotFoundError, ItemNotFoundError, ConversationLockedError or DatabaseUnavailableError.
        """
        async with self._writing:
            with _asking():
                await self._write(self._buffered.unwritten, [])
                await self._conversations.set_leaf(user, id, item)

    async def delete_response(self, user: str, id: str) -> str | None:
        """Delete a response, written or not, or only in memory. What waits to be written is written first.

        Returns the conversation that had it, if any. Raises ResponseNotFoundError or DatabaseUnavailableError.
        """
        async with self._writing:
            found = self._buffered.find(user, id)
            if found and found.conversation is None:
                self._buffered.drop(id)
                return None
            with _asking():
                await self._write(self._buffered.unwritten, [])
                return await self._conversations.delete_response(user, id)

    def forget(self, id: str) -> None:
        """Drop a reply that can no longer be resumed."""
        self._buffered.drop(id)

    async def write(self, growing: Iterable[Item]) -> bool:
        """Write all waiting replies, then the growing ones. Returns False if nothing could be written."""
        return await self._try_write(growing, in_trouble=True)

    async def _store(self, reply: BufferedReply, write: Callable[[], Coroutine[Any, Any, bool]]) -> bool:
        """Wait for a write, unless it takes too long. A reply that is not written is kept. Raises APIError."""
        if not self.trouble:
            writing = asyncio.create_task(write())
            self._begun.add(writing)
            writing.add_done_callback(self._begun.discard)
            await asyncio.wait([writing], timeout=self._patience)
            if writing.done() and writing.result():
                self._tell_stored(reply)
                return True
            if not writing.done():
                writing.add_done_callback(_ignore)  # nobody waits for it any more
                self._note_trouble(TimeoutError(f"the database has not answered for {self._patience:g} s"))
        self._keep(reply)
        return False

    async def _put(self, reply: BufferedReply) -> bool:
        """Put the input and the empty reply into the conversation, behind all that waits to be put there."""
        async with self._writing:
            if self.trouble:
                return False
            try:
                if waiting := self._buffered.unwritten_of(reply.user, reply.conversation):
                    await self._write(waiting, [])
                if reply.reply.id not in [one.reply.id for one in waiting]:  # else this is an old state by now
                    await reply.write_to(self._conversations)
            except APIError:
                raise
            except Exception as error:
                self._note_trouble(error)
                return False
            return True  # trouble that came meanwhile ends with a write of all that waits

    async def _try_write(self, growing: Iterable[Item], in_trouble: bool = False) -> bool:
        async with self._writing:
            if self.trouble and not in_trouble:
                return False
            try:
                await self._write(self._buffered.unwritten, growing)
            except Exception as error:
                self._note_trouble(error)
                return False
        if self.trouble:
            self.trouble = None
            logger.warning("messages can be stored again")
        return True

    async def _write(self, waiting: Sequence[BufferedReply], growing: Iterable[Item]) -> None:
        if lost := self._lost:
            await self._conversations.fail_replies(lost)
            self._lost = self._lost[len(lost) :]
        # Replies in the database come first, since those behind them continue what has ended.
        if stored := [buffered.reply for buffered in waiting if buffered.begun]:
            await self._conversations.update_replies(stored)
        for buffered in waiting:
            if not buffered.begun:
                await self._write_accepted(buffered)
        await self._conversations.update_replies(growing)
        for buffered in waiting:
            self._buffered.drop_written(buffered)
            self._tell_stored(buffered)

    async def _write_accepted(self, buffered: BufferedReply) -> None:
        """Put a turn that was accepted before into its conversation. One that does not fit does not stop the others."""
        try:
            await buffered.write_to(self._conversations, accepted=True)
        except ConversationNotFoundError:  # deleted meanwhile
            pass
        except APIError as error:
            logger.error("%s cannot be stored: %s", buffered.reply.id, one_line(error))

    def _tell_stored(self, reply: BufferedReply) -> None:
        if reply.conversation is not None:
            self._on_stored(reply.user, reply.conversation)

    def _keep(self, reply: BufferedReply) -> None:
        if lost := self._buffered.keep(reply):
            logger.error("PARLEY_REPLAY_BYTES is too small for the replies that wait to be stored: lost %s", lost)
            self._lost = [*self._lost, *lost]

    def _note_trouble(self, error: Exception) -> None:
        if not self.trouble:
            self.trouble = NotStoredError.message
            logger.error("messages cannot be stored, and wait in memory: %s", one_line(error))


@contextmanager
def _asking() -> Iterator[None]:
    """Turn any error of the database into DatabaseUnavailableError."""
    try:
        yield
    except APIError:
        raise
    except Exception as error:
        logger.error("the database cannot be used: %s", one_line(error))
        raise DatabaseUnavailableError from error


def _ignore(writing: asyncio.Task[bool]) -> None:
    """Take the error of a task, else asyncio complains that nobody has."""
    if not writing.cancelled():
        writing.exception()
