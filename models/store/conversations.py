"""The conversations of all users, in the database."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from models.errors import (
    ConversationBusyError,
    ConversationFullError,
    ConversationNotFoundError,
    DatabaseUnavailableError,
    ItemNotFoundError,
    StorageFullError,
)
from models.store.database import Database, conversations_table, instructions_table, items_table, owner_table
from models.store.item import Item, Status, title_of
from models.store.storage_limits import MAX_CONVERSATION_BYTES, MAX_ITEMS, MAX_PAGE, PAGE_BYTES, StorageLimits


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


class ItemPage(NamedTuple):
    """Some items of a conversation, in order; `earlier` is how many come before them."""

    items: list[Item]
    earlier: int


CONVERSATION, ITEM, INSTRUCTIONS = conversations_table.c, items_table.c, instructions_table.c
SUMMARY_COLUMNS = [CONVERSATION[field.name] for field in fields(Conversation)]
GROWING_COLUMNS = ("content", "status", "reason", "usage", "cuts", "decode_seconds", "bytes")
ITEM_COLUMNS = [*(ITEM[field.name] for field in fields(Item)), INSTRUCTIONS.text]
FAILED = {"status": Status.FAILED, "reason": "server_error"}
JOINED = items_table.join(conversations_table, CONVERSATION.id == ITEM.conversation_id).outerjoin(
    instructions_table,
    and_(INSTRUCTIONS.conversation_id == ITEM.conversation_id, INSTRUCTIONS.id == ITEM.instructions),
)


class Conversations:
    """The conversations in the database. A user cannot find those of other users.

    `owner` is this process: no other one writes the replies that it has in progress.
    """

    def __init__(self, database: Database, owner: str = "", limits: StorageLimits | None = None) -> None:
        self._database = database
        self._owner = owner
        self._limits = limits or StorageLimits()
        self._browsing = asyncio.Semaphore(4)  # so that reads leave database connections for replies
        self._searching = asyncio.Semaphore(2)  # a search reads all that a user has stored
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
            said = exists().where(ITEM.conversation_id == CONVERSATION.id, self._has(ITEM.content, listing.query))
            chosen = chosen.where(or_(self._has(CONVERSATION.title, listing.query), said))
        chosen = chosen.order_by(CONVERSATION.updated.desc(), CONVERSATION.id.desc()).limit(listing.limit + 1)
        turn = self._searching if listing.query else self._browsing
        async with turn, self._database.connect() as connection:
            found = [Conversation(*row) for row in await connection.execute(chosen)]
        return found[: listing.limit], len(found) > listing.limit

    async def find(self, user: str, id: str) -> Conversation:
        """One conversation. Raises ConversationNotFoundError."""
        async with self._database.connect() as connection:
            row = (await connection.execute(select(*SUMMARY_COLUMNS).where(_owned(user, id)))).one_or_none()
        if row is None:
            raise ConversationNotFoundError
        return Conversation(*row)

    async def items(self, user: str, id: str) -> list[Item]:
        """The items of a conversation, in order; none if there is no such conversation."""
        chosen = select(*ITEM_COLUMNS).select_from(JOINED).where(_owned(user, id)).order_by(ITEM.position)
        async with self._database.connect() as connection:
            return [_item(row) for row in await connection.execute(chosen)]

    async def pages(self, user: str, id: str) -> AsyncIterator[list[Item]]:
        """All items of a conversation, in order, a page at a time."""
        after = -1
        while True:
            async with self._browsing, self._database.connect() as connection:
                later = _sizes(user, id).where(ITEM.position > after).order_by(ITEM.position)
                places = await _places(connection, later, MAX_PAGE)
                page = await _page(connection, user, id, places)
            if not page:
                return
            after = places[-1]
            yield page

    async def read_page(self, user: str, id: str, limit: int, before: str | None = None) -> ItemPage:
        """The last items of a conversation, or those before the item `before`: at most `limit`, and PAGE_BYTES.

        Raises ItemNotFoundError.
        """
        async with self._browsing, self._database.connect() as connection:
            mine = _sizes(user, id)
            if before is not None:
                at = (await connection.execute(mine.where(ITEM.id == before))).one_or_none()
                if at is None:
                    raise ItemNotFoundError(param="before")
                mine = mine.where(ITEM.position < at[0])
            places = await _places(connection, mine.order_by(ITEM.position.desc()), limit)
            return ItemPage(await _page(connection, user, id, places), min(places, default=0))

    async def find_reply(self, user: str, id: str) -> tuple[str, Item] | None:
        """A reply, with the id of its conversation."""
        chosen = select(CONVERSATION.id, *ITEM_COLUMNS).select_from(JOINED)
        chosen = chosen.where(CONVERSATION.user_id == user, ITEM.id == id, ITEM.status.is_not(None))
        async with self._database.connect() as connection:
            row = (await connection.execute(chosen)).one_or_none()
        return (row[0], _item(row[1:])) if row else None

    async def rename(self, user: str, id: str, title: str) -> Conversation:
        """Change the title of a conversation. Raises ConversationNotFoundError."""
        async with self._transaction() as connection:
            await connection.execute(update(conversations_table).where(_owned(user, id)).values(title=title))
        return await self.find(user, id)

    async def delete(self, user: str, id: str) -> None:
        """Delete a conversation with its items. Raises ConversationNotFoundError."""
        async with self._transaction() as connection:
            if not (await connection.execute(delete(conversations_table).where(_owned(user, id)))).rowcount:
                raise ConversationNotFoundError
            await connection.execute(delete(items_table).where(ITEM.conversation_id == id))
            await connection.execute(delete(instructions_table).where(INSTRUCTIONS.conversation_id == id))

    async def put_items(self, user: str, id: str, position: int, new: Sequence[Item], accepted: bool = False) -> None:
        """Put items into a conversation at a position. Items at and after this position are deleted first.

        At position 0, a conversation that does not exist is created. Raises ConversationNotFoundError and, unless the
        items were accepted before, ConversationBusyError, ConversationFullError or StorageFullError.
        """
        now = time.time()
        try:
            async with self._transaction() as connection:
                touch = update(conversations_table).where(_owned(user, id)).values(updated=now)
                if (await connection.execute(touch)).rowcount:
                    await self._make_room(connection, id, position, new, accepted)
                elif position:
                    raise ConversationNotFoundError
                else:
                    summary = {"id": id, "user_id": user, "title": title_of(new), "created": now, "updated": now}
                    await connection.execute(insert(conversations_table).values(summary | {"bytes": 0}))
                await self._insert(connection, id, position, new)
                if not accepted:
                    await self._check_limits(connection, user, id, position + len(new))
        except IntegrityError:  # another process has begun the conversation, or a reply in it
            raise ConversationBusyError from None

    async def update_replies(self, replies: Iterable[Item]) -> None:
        """Store the current state of replies, unless they were deleted or are another process's now."""
        async with self._transaction() as connection:
            rows = [{"reply": reply.id} | {name: getattr(reply, name) for name in GROWING_COLUMNS} for reply in replies]
            if rows:
                mine = and_(ITEM.id == bindparam("reply"), ITEM.owner == self._owner)
                await connection.execute(update(items_table).where(mine), rows)

    async def fail_replies(self, ids: Sequence[str]) -> None:
        """Mark as failed the replies of this process that are in progress and have these ids."""
        running = and_(ITEM.id.in_(ids), ITEM.status == Status.IN_PROGRESS, ITEM.owner == self._owner)
        async with self._transaction() as connection:
            await connection.execute(update(items_table).where(running).values(FAILED))

    async def fail_unfinished(self) -> int:
        """Mark as failed the replies that earlier processes left unfinished. Returns how many there were.

        From then on, those processes cannot write them any more.
        """
        left = and_(ITEM.status == Status.IN_PROGRESS, func.coalesce(ITEM.owner, "") != self._owner)
        failed = FAILED | {"owner": None}
        async with self._transaction() as connection:
            return int((await connection.execute(update(items_table).where(left).values(failed))).rowcount)

    def _has(self, column: ColumnElement[str], words: str) -> ColumnElement[bool]:
        """Whether a text has some words, in capitals or not. LIKE takes seconds for some patterns in long texts."""
        find = func.instr if self._database.dialect.name == "sqlite" else func.strpos
        return find(func.lower(column), func.lower(literal(words, column.type))) > 0

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes. It is rolled back if another process has taken the database.

        A process that was stopped for a while must not replace what its successor has stored. Raises
        DatabaseUnavailableError.
        """
        async with self._writing, self._database.begin() as connection:
            yield connection
            # At the end, since by now the writes hold the lock that a successor needs.
            owner = (await connection.execute(select(owner_table.c.id).with_for_update(read=True))).scalar()
            if owner not in (None, self._owner):
                raise DatabaseUnavailableError("another process has taken the database")

    async def _make_room(
        self, connection: AsyncConnection, id: str, position: int, new: Sequence[Item], accepted: bool
    ) -> None:
        """Delete the items at and after a position. Raises ConversationBusyError."""
        if not accepted:
            other = and_(ITEM.status == Status.IN_PROGRESS, ITEM.id.not_in([item.id for item in new]))
            if (await connection.execute(select(ITEM.id).where(ITEM.conversation_id == id, other))).first():
                raise ConversationBusyError
        await connection.execute(delete(items_table).where(ITEM.conversation_id == id, ITEM.position >= position))
        used = exists().where(ITEM.conversation_id == id, ITEM.instructions == INSTRUCTIONS.id)
        await connection.execute(delete(instructions_table).where(INSTRUCTIONS.conversation_id == id, ~used))

    async def _insert(self, connection: AsyncConnection, id: str, position: int, new: Sequence[Item]) -> None:
        """Insert items, and instructions that the conversation has not had yet; count the bytes."""
        rows = []
        for place, item in enumerate(new, position):
            options = dict(item.options or {})
            text = options.pop("instructions", None)
            rows.append(
                asdict(item)
                | {"conversation_id": id, "position": place, "bytes": item.bytes}
                | {"options": item.options and options}
                | {"instructions": await _insert_instructions(connection, id, text) if text else None}
                | {"owner": self._owner if item.status else None}
            )
        await connection.execute(insert(items_table), rows)
        sums = [
            select(func.coalesce(func.sum(counted.c.bytes), 0)).where(counted.c.conversation_id == id).scalar_subquery()
            for counted in (items_table, instructions_table)
        ]
        await connection.execute(update(conversations_table).where(CONVERSATION.id == id).values(bytes=sum(sums)))

    async def _check_limits(self, connection: AsyncConnection, user: str, id: str, items: int) -> None:
        """Raise ConversationFullError or StorageFullError if there is more than allowed."""
        size = (await connection.execute(select(CONVERSATION.bytes).where(CONVERSATION.id == id))).scalar_one()
        if items > MAX_ITEMS or size > MAX_CONVERSATION_BYTES:
            raise ConversationFullError
        total = select(func.count(), func.sum(CONVERSATION.bytes)).where(CONVERSATION.user_id == user)
        number, size = (await connection.execute(total)).one()
        if number > self._limits.conversations or size > self._limits.bytes:
            raise StorageFullError


def _sizes(user: str, id: str) -> Select[Any]:
    """The places and the sizes of the items of a conversation."""
    size = ITEM.bytes + func.coalesce(INSTRUCTIONS.bytes, 0)
    return select(ITEM.position, size).select_from(JOINED).where(_owned(user, id))


async def _places(connection: AsyncConnection, sizes: Select[Any], limit: int) -> list[int]:
    """The places of the first items: at most `limit`, and PAGE_BYTES, but two at least: a question and its reply."""
    found = (await connection.execute(sizes.limit(limit))).all()
    count = max(2, sum(size <= PAGE_BYTES for size in accumulate(size for _, size in found)))
    return [place for place, _ in found[:count]]


async def _page(connection: AsyncConnection, user: str, id: str, places: list[int]) -> list[Item]:
    """The items at some places, in order."""
    chosen = select(*ITEM_COLUMNS).select_from(JOINED).where(_owned(user, id), ITEM.position.in_(places))
    return [_item(row) for row in await connection.execute(chosen.order_by(ITEM.position))]


async def _insert_instructions(connection: AsyncConnection, conversation: str, text: str) -> str:
    """Insert instructions, unless the conversation has them already. Returns their id."""
    encoded = text.encode()
    id = hashlib.sha256(encoded).hexdigest()
    known = exists().where(INSTRUCTIONS.conversation_id == conversation, INSTRUCTIONS.id == id)
    row = {"conversation_id": conversation, "id": id, "text": text, "bytes": len(encoded)}
    values = select(*(literal(value, INSTRUCTIONS[name].type) for name, value in row.items())).where(~known)
    await connection.execute(insert(instructions_table).from_select([*row], values))
    return id


def _item(row: Sequence[Any]) -> Item:
    """An item, from the values of ITEM_COLUMNS."""
    *values, instructions = row
    item = Item(*values)
    if instructions is None:
        return item
    return replace(item, options={"instructions": instructions, **(item.options or {})})


def _owned(user: str, id: str) -> ColumnElement[bool]:
    return and_(CONVERSATION.id == id, CONVERSATION.user_id == user)
