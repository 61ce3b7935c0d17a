"""The conversations of all users, in the database."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

from sqlalchemy import ColumnElement, and_, bindparam, delete, exists, insert, or_, select, tuple_, update

from models.errors import ConversationNotFoundError
from models.store.database import Database, conversations_table, items_table
from models.store.item import Item, Status, title_of


@dataclass(frozen=True)
class Conversation:
    """A conversation without its items; times are Unix seconds."""

    id: str
    title: str
    created: float
    updated: float


@dataclass(frozen=True)
class Listing:
    """Which conversations to list: at most `limit`, after the one with the id `after`, that contain `query`."""

    limit: int = 50
    after: str | None = None
    query: str = ""


CONVERSATION, ITEM = conversations_table.c, items_table.c
SUMMARY_COLUMNS = [CONVERSATION[field.name] for field in fields(Conversation)]
GROWING_COLUMNS = ("content", "status", "reason", "usage", "cuts", "decode_seconds")
ITEM_COLUMNS = [ITEM[field.name] for field in fields(Item)]
JOINED = items_table.join(conversations_table, CONVERSATION.id == ITEM.conversation_id)


class Conversations:
    """The conversations in the database. A user cannot find those of other users."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._browsing = asyncio.Semaphore(4)  # so that reads leave database connections for replies
        # SQLite has one writer at a time; others would ask every few milliseconds whether it has finished.
        self._writing = asyncio.Semaphore(1 if database.dialect.name == "sqlite" else 4)

    @staticmethod
    def new_id() -> str:
        """An id for a conversation that is about to begin."""
        return f"conv_{uuid.uuid4().hex}"

    async def list_page(self, user: str, listing: Listing) -> tuple[list[Conversation], bool]:
        """The conversations of a listing, the latest first, and whether there are more.

        The query is searched in titles and in messages. Raises ConversationNotFoundError.
        """
        chosen = select(*SUMMARY_COLUMNS).where(CONVERSATION.user_id == user)
        if listing.after is not None:
            last = await self.find(user, listing.after)
            place = tuple_(CONVERSATION.updated, CONVERSATION.id)
            chosen = chosen.where(place < tuple_(last.updated, last.id))
        if listing.query:
            said = exists().where(ITEM.conversation_id == CONVERSATION.id, _has(ITEM.content, listing.query))
            chosen = chosen.where(or_(_has(CONVERSATION.title, listing.query), said))
        chosen = chosen.order_by(CONVERSATION.updated.desc(), CONVERSATION.id.desc()).limit(listing.limit + 1)
        async with self._browsing, self._database.connect() as connection:
            found = [Conversation(*row) for row in await connection.execute(chosen)]
        return found[: listing.limit], len(found) > listing.limit

    async def find(self, user: str, id: str) -> Conversation:
        """One conversation. Raises ConversationNotFoundError."""
        async with self._database.connect() as connection:
            row = (await connection.execute(select(*SUMMARY_COLUMNS).where(_owned(user, id)))).one_or_none()
        if row is None:
            raise ConversationNotFoundError
        return Conversation(*row)

    async def read(self, user: str, id: str) -> tuple[Conversation, list[Item]]:
        """One conversation with its items. Raises ConversationNotFoundError."""
        async with self._browsing:
            return await self.find(user, id), await self.items(user, id)

    async def items(self, user: str, id: str) -> list[Item]:
        """The items of a conversation, in order; none if there is no such conversation."""
        chosen = select(*ITEM_COLUMNS).select_from(JOINED).where(_owned(user, id)).order_by(ITEM.position)
        async with self._database.connect() as connection:
            return [Item(*row) for row in await connection.execute(chosen)]

    async def find_reply(self, user: str, id: str) -> tuple[str, Item] | None:
        """A reply, with the id of its conversation."""
        chosen = select(CONVERSATION.id, *ITEM_COLUMNS).select_from(JOINED)
        chosen = chosen.where(CONVERSATION.user_id == user, ITEM.id == id, ITEM.status.is_not(None))
        async with self._database.connect() as connection:
            row = (await connection.execute(chosen)).one_or_none()
        return (row[0], Item(*row[1:])) if row else None

    async def rename(self, user: str, id: str, title: str) -> Conversation:
        """Change the title of a conversation. Raises ConversationNotFoundError."""
        async with self._writing, self._database.begin() as connection:
            await connection.execute(update(conversations_table).where(_owned(user, id)).values(title=title))
        return await self.find(user, id)

    async def delete(self, user: str, id: str) -> None:
        """Delete a conversation with its items. Raises ConversationNotFoundError."""
        async with self._writing, self._database.begin() as connection:
            if not (await connection.execute(delete(conversations_table).where(_owned(user, id)))).rowcount:
                raise ConversationNotFoundError
            await connection.execute(delete(items_table).where(ITEM.conversation_id == id))

    async def put_items(self, user: str, id: str, position: int, new: Sequence[Item]) -> None:
        """Put items into a conversation at a position. Items at and after this position are deleted first.

        At position 0, a conversation that does not exist is created. Raises ConversationNotFoundError.
        """
        now = time.time()
        rows = [asdict(item) | {"conversation_id": id, "position": place} for place, item in enumerate(new, position)]
        async with self._writing, self._database.begin() as connection:
            touched = await connection.execute(update(conversations_table).where(_owned(user, id)).values(updated=now))
            if touched.rowcount:
                replaced = and_(ITEM.conversation_id == id, ITEM.position >= position)
                await connection.execute(delete(items_table).where(replaced))
            elif position:
                raise ConversationNotFoundError
            else:
                summary = {"id": id, "user_id": user, "title": title_of(new), "created": now, "updated": now}
                await connection.execute(insert(conversations_table).values(summary))
            await connection.execute(insert(items_table), rows)

    async def update_replies(self, replies: Iterable[Item]) -> None:
        """Store the current state of replies. Replies that were deleted stay deleted."""
        async with self._writing, self._database.begin() as connection:
            rows = [{"reply": reply.id} | {name: getattr(reply, name) for name in GROWING_COLUMNS} for reply in replies]
            if rows:
                await connection.execute(update(items_table).where(ITEM.id == bindparam("reply")), rows)

    async def fail_unfinished(self) -> int:
        """Mark as failed the replies that an earlier process left unfinished. Returns how many there were."""
        failed = {"status": Status.FAILED, "reason": "server_error"}
        async with self._writing, self._database.begin() as connection:
            unfinished = update(items_table).where(ITEM.status == Status.IN_PROGRESS).values(failed)
            return int((await connection.execute(unfinished)).rowcount)


def _owned(user: str, id: str) -> ColumnElement[bool]:
    return and_(CONVERSATION.id == id, CONVERSATION.user_id == user)


def _has(column: ColumnElement[str], words: str) -> ColumnElement[bool]:
    return column.icontains(words, autoescape=True)
