"""What is said, on its way into the database."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain

from models.conversations import ConversationNotFound, Conversations
from models.database import DatabaseUnavailable, explained
from models.held import Held, HeldReplies
from models.item import Item
from models.refused import Refused

logger = logging.getLogger("parley")


class NotKept(Refused):
    """A reply that comes, and cannot be written down."""

    type = "server_error"
    code = "not_kept"
    message = "what is said cannot be kept at present; it is written down as soon as it can be"


class Journal:
    """Has conversations keep what is said. What they cannot take waits in memory, `most_bytes` of it, to be written.

    `trouble` says why nothing can be written at present.
    """

    def __init__(self, conversations: Conversations, most_bytes: int) -> None:
        self.trouble: str | None = None
        self._conversations = conversations
        self._held = HeldReplies(most_bytes)
        self._writing = asyncio.Lock()

    @property
    def unwritten(self) -> int:
        """How many replies wait to be written down."""
        return len(self._held.unwritten)

    async def read(self, user: str, conversation: str) -> Sequence[Item]:
        """What was said in a conversation, written or not. Raises DatabaseUnavailable."""
        missing = self._held.missing(user, conversation)
        items: Sequence[Item] = []
        if not missing or missing[0].position != 0:
            with _reading():
                items = await self._conversations.items(user, conversation)
        for held in missing:
            items = held.after(items)
        return items

    async def find(self, user: str, id: str) -> tuple[str | None, Item] | None:
        """A reply that has ended, and its conversation, if it has one. Raises DatabaseUnavailable."""
        if held := self._held.find(user, id):
            return held
        with _reading():
            return await self._conversations.reply(user, id)

    async def add(self, held: Held) -> bool:
        """Add to a conversation what was said and the reply, of which there is nothing yet. False: it has to wait.

        Raises ConversationNotFound.
        """
        if not self.trouble:
            try:
                if self._held.missing(held.user, held.conversation):
                    async with self._writing:
                        await self._write(self._held.missing(held.user, held.conversation), [])
                await held.add_to(self._conversations)
                return True
            except Refused:
                raise
            except Exception as error:
                self._failed(error)
        self._hold(held)
        return False

    async def end(self, held: Held) -> bool:
        """Write down a reply that has ended. False: it has to wait."""
        if held.conversation is not None and await self._try([held.reply]):
            return True
        self._hold(held)
        return False

    async def delete(self, user: str, conversation: str) -> None:
        """Delete a conversation, written or not. Raises ConversationNotFound."""
        async with self._writing:
            missing = self._held.missing(user, conversation)
            try:
                await self._conversations.delete(user, conversation)
            except ConversationNotFound:
                if not missing:
                    raise
            for held in missing:
                self._held.drop(held.reply.id)

    def forget(self, id: str) -> None:
        """Let go of a reply that nobody can want any longer."""
        self._held.drop(id)

    async def write(self, growing: Iterable[Item]) -> bool:
        """Write down how far replies are, after all that waits. False: it cannot be."""
        return await self._try(growing, again=True)

    async def _try(self, growing: Iterable[Item], again: bool = False) -> bool:
        async with self._writing:  # one such at a time, so that no earlier state comes later
            if self.trouble and not again:
                return False
            try:
                await self._write(self._held.unwritten, growing)
            except Exception as error:
                self._failed(error)
                return False
        if self.trouble:
            self.trouble = None
            logger.warning("what is said can be written down again")
        return True

    async def _write(self, waiting: Sequence[Held], growing: Iterable[Item]) -> None:
        for held in waiting:
            if held.position is not None:
                with suppress(ConversationNotFound):  # deleted since
                    await held.add_to(self._conversations)
        await self._conversations.write(chain((held.reply for held in waiting), growing))
        for held in waiting:
            self._held.release(held)

    def _hold(self, held: Held) -> None:
        if lost := self._held.hold(held):
            logger.error("PARLEY_REPLAY_BYTES of memory cannot hold what waits to be written down: lost %s", lost)

    def _failed(self, error: Exception) -> None:
        if not self.trouble:
            self.trouble = NotKept.message
            logger.error("what is said cannot be written down, and waits in memory: %s", explained(error))


@contextmanager
def _reading() -> Iterator[None]:
    """Whatever keeps the database from being read is told as DatabaseUnavailable."""
    try:
        yield
    except Exception as error:
        logger.error("what was said cannot be read: %s", explained(error))
        raise DatabaseUnavailable from error
