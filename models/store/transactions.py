"""Transactions that write conversations, and the limits that they keep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from sqlalchemy import ColumnElement, exists, func, insert, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from models.errors import ConversationFullError, ConversationNotFoundError, DatabaseUnavailableError, StorageFullError
from models.store.database import Database, conversations_table
from models.store.item import Item, title_of
from models.store.owner import OWNER
from models.store.rows import CONVERSATION, ITEM, count_bytes, insert_items
from models.store.storage_limits import MAX_CONVERSATION_BYTES, MAX_ITEMS, StorageLimits
from models.store.tree import IN_PROGRESS, delete_trees


class Transactions:
    """What conversations and their responses have in common: the database, its owner, and the limits.

    `owner` is the id of this process among the owners of the database, or that of the one that it works for; it writes
    only while that one is there. Without an id, it always writes.
    """

    def __init__(self, database: Database, owner: str = "", limits: StorageLimits | None = None) -> None:
        self._database = database
        self.owner = owner
        self._limits = limits or StorageLimits()
        self._browsing = asyncio.Semaphore(4)  # so that reads leave database connections for replies
        # SQLite has one writer at a time; others would ask every few milliseconds whether it has finished.
        self._writing = asyncio.Semaphore(1 if database.dialect.name == "sqlite" else 4)

    @asynccontextmanager
    async def _browse(self) -> AsyncIterator[AsyncConnection]:
        """A connection that reads."""
        async with self._browsing, self._database.connect() as connection:
            yield connection

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes. It is rolled back if this process is no owner any more.

        A process that was stopped for a while must not replace what others have stored since. Raises
        DatabaseUnavailableError.
        """
        async with self._writing, self._database.begin() as connection:
            yield connection
            # At the end, and until the commit nobody can remove the owner. Its beats do not wait for this lock.
            own = select(OWNER.id).where(OWNER.id == self.owner).with_for_update(read=True, key_share=True)
            if self.owner and not (await connection.execute(own)).first():
                raise DatabaseUnavailableError("another process has taken over from this one")

    async def _lock(self, connection: AsyncConnection, mine: ColumnElement[bool], used: bool = True) -> None:
        """Keep others from changing a conversation until the transaction ends, and note that it is used.

        It comes before all reads of the conversation. Raises ConversationNotFoundError.
        """
        updated = time.time() if used else CONVERSATION.updated
        touched = await connection.execute(update(conversations_table).where(mine).values(updated=updated))
        if not touched.rowcount:
            raise ConversationNotFoundError

    async def _insert_conversation(
        self,
        connection: AsyncConnection,
        user: str,
        id: str,
        items: Sequence[Item],
        title: str | None = None,
        metadata: Mapping[str, str] | None = None,
        listed: bool = True,
    ) -> None:
        """Insert a conversation that is about to get items."""
        now = time.time()
        row = {"id": id, "user_id": user, "title": title_of(items) if title is None else title, "bytes": 0}
        row |= {"created": now, "updated": now, "metadata": metadata, "listed": listed}
        await connection.execute(insert(conversations_table), row)

    async def _insert_items(
        self, connection: AsyncConnection, id: str, parent: str | None, items: Sequence[Item]
    ) -> None:
        """Insert items below one of a conversation. Raises ItemNotFoundError."""
        await insert_items(connection, id, parent, items, self.owner)
        await count_bytes(connection, [id])

    async def _set_leaf(self, connection: AsyncConnection, id: str, leaf: str | None) -> None:
        await connection.execute(update(conversations_table).where(CONVERSATION.id == id).values(leaf=leaf))

    async def _check_limits(self, connection: AsyncConnection, user: str, id: str) -> None:
        """Raise ConversationFullError or StorageFullError if a conversation, or all of them, have more than allowed."""
        items = select(func.count()).where(ITEM.conversation_id == id).scalar_subquery()
        number, size = (await connection.execute(select(items, CONVERSATION.bytes).where(CONVERSATION.id == id))).one()
        if number > MAX_ITEMS or size > MAX_CONVERSATION_BYTES:
            raise ConversationFullError
        total = select(func.count(), func.sum(CONVERSATION.bytes)).where(CONVERSATION.user_id == user)
        number, size = (await connection.execute(total)).one()
        await self._make_room(connection, user, id, number - self._limits.conversations, size - self._limits.bytes)

    async def _make_room(self, connection: AsyncConnection, user: str, id: str, trees: int, bytes: int) -> None:
        """Delete so many of the user's other trees and bytes, those first that are not listed and were not used lately.

        Raises StorageFullError if the listed ones are too many.
        """
        if trees <= 0 and bytes <= 0:
            return
        busy = exists().where(ITEM.conversation_id == CONVERSATION.id, IN_PROGRESS)
        order = (CONVERSATION.updated, CONVERSATION.id)
        earlier = func.sum(CONVERSATION.bytes).over(order_by=order) - CONVERSATION.bytes
        number = func.row_number().over(order_by=order)
        columns = (CONVERSATION.id, CONVERSATION.updated, CONVERSATION.bytes)
        unlisted = select(*columns, earlier.label("earlier"), number.label("number")).where(
            CONVERSATION.user_id == user, ~CONVERSATION.listed, CONVERSATION.id != id, ~busy
        )
        oldest = unlisted.subquery()
        needed = or_(oldest.c.number <= trees, oldest.c.earlier < bytes)
        found = (await connection.execute(select(oldest.c.id, oldest.c.updated, oldest.c.bytes).where(needed))).all()
        if len(found) < trees or sum(size for _, _, size in found) < bytes:
            raise StorageFullError
        unused = tuple_(CONVERSATION.id, CONVERSATION.updated).in_([(id, updated) for id, updated, _ in found])
        # What another one is using, or has used just now, stays.
        free = select(CONVERSATION.id).where(unused).with_for_update(skip_locked=True)
        await delete_trees(connection, (await connection.execute(free)).scalars().all())
