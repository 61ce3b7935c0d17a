"""Writes messages to the database, and keeps them in memory while it cannot."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from models.errors import APIError, ConversationNotFoundError, DatabaseUnavailableError, NotStoredError, one_line
from models.store.buffered_replies import BufferedReplies, BufferedReply
from models.store.conversations import Conversations
from models.store.item import Item

logger = logging.getLogger("parley")

PATIENCE = 1.0  # seconds; a busy disk takes some tenths


class WriteBuffer:
    """Stores replies in the database. Replies that cannot be written wait in memory, in up to `max_bytes`.

    No reply waits longer than `patience` seconds for a write. Reads through the buffer include what waits. `trouble`
    says why nothing can be written at the moment.
    """

    def __init__(self, conversations: Conversations, max_bytes: int, patience: float = PATIENCE) -> None:
        self.trouble: str | None = None
        self._conversations = conversations
        self._buffered = BufferedReplies(max_bytes)
        self._patience = patience
        self._writing = asyncio.Lock()  # one write at a time, so that an old state never replaces a newer one
        self._lost: list[str] = []  # the ids of replies that were dropped: in the database, they must not seem to run
        self._begun: set[asyncio.Task[bool]] = set()  # writes that go on, also if nobody waits for them any more

    @property
    def unwritten(self) -> int:
        """How many replies wait to be written."""
        return len(self._buffered.unwritten)

    async def items(self, user: str, conversation: str) -> Sequence[Item]:
        """The items of a conversation, written or not. Raises DatabaseUnavailableError."""
        unwritten = self._buffered.unwritten_of(user, conversation)
        items: Sequence[Item] = []
        if not unwritten or unwritten[0].position != 0:
            with _reading():
                items = await self._conversations.items(user, conversation)
        for buffered in unwritten:
            items = buffered.applied_to(items)
        return items

    async def find_reply(self, user: str, id: str) -> tuple[str | None, Item] | None:
        """A reply that has ended, and the id of its conversation, if any. Raises DatabaseUnavailableError."""
        if buffered := self._buffered.find(user, id):
            return buffered
        with _reading():
            return await self._conversations.find_reply(user, id)

    async def begin(self, reply: BufferedReply) -> bool:
        """Store the input and the empty reply. Returns False if they wait in memory.

        Raises ConversationNotFoundError, ConversationBusyError, ConversationFullError or StorageFullError.
        """
        return await self._store(reply, lambda: self._put(reply))

    async def finish(self, reply: BufferedReply) -> bool:
        """Store a reply that has ended. Returns False if it waits in memory."""
        if reply.conversation is None:
            self._keep(reply)
            return False
        return await self._store(reply, lambda: self._try_write([reply.reply]))

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
                return True
            if not writing.done():
                writing.add_done_callback(asyncio.Task.exception)  # nobody waits for it any more
                self._note_trouble(TimeoutError(f"the database has not answered for {self._patience:g} s"))
        self._keep(reply)
        return False

    async def _put(self, reply: BufferedReply) -> bool:
        """Put the input and the empty reply into the conversation, after all that waits to be put there."""
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
        # Replies in the database come first, since a conversation has one reply in progress.
        if stored := [buffered.reply for buffered in waiting if buffered.position is None]:
            await self._conversations.update_replies(stored)
        for buffered in waiting:
            if buffered.position is not None:
                await self._write_accepted(buffered)
        await self._conversations.update_replies(growing)
        for buffered in waiting:
            self._buffered.drop_written(buffered)

    async def _write_accepted(self, buffered: BufferedReply) -> None:
        """Put a turn that was accepted before into its conversation. One that does not fit does not stop the others."""
        try:
            await buffered.write_to(self._conversations, accepted=True)
        except ConversationNotFoundError:  # deleted meanwhile
            pass
        except APIError as error:
            logger.error("%s cannot be stored: %s", buffered.reply.id, one_line(error))

    def _keep(self, reply: BufferedReply) -> None:
        if lost := self._buffered.keep(reply):
            logger.error("PARLEY_REPLAY_BYTES is too small for the replies that wait to be stored: lost %s", lost)
            self._lost = [*self._lost, *lost]

    def _note_trouble(self, error: Exception) -> None:
        if not self.trouble:
            self.trouble = NotStoredError.message
            logger.error("messages cannot be stored, and wait in memory: %s", one_line(error))


@contextmanager
def _reading() -> Iterator[None]:
    """Turn any error of a read into DatabaseUnavailableError."""
    try:
        yield
    except Exception as error:
        logger.error("messages cannot be read: %s", one_line(error))
        raise DatabaseUnavailableError from error
