"""The conversations of all users, in a database."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, and_, bindparam, delete, exists, insert, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncEngine

from models.database import conversations_table as conversations, items_table as items
from models.item import Item, title
from models.listing import Listing
from models.refused import InvalidValue, Refused


class ConversationNotFound(Refused):
    """A conversation that is not there, or is somebody else's."""

    code = "conversation_not_found"
    message = "there is no such conversation"


class Document(NamedTuple):
    """A conversation to be taken away."""

    name: str
    media_type: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """A conversation without its items; times are Unix seconds."""

    id: str
    title: str
    created: float
    updated: float

    def public(self, items: Iterable[Item]) -> dict[str, Any]:
        """The conversation with its items, as JSON has them."""
        return asdict(self) | {"items": [item.public() for item in items]}

    def document(self, items: Iterable[Item], format: str) -> Document:
        """The conversation with its items as `markdown` or `json`. Raises InvalidValue."""
        if format == "json":
            text = json.dumps(self.public(items), ensure_ascii=False, indent=2)
            return Document(f"{self.id}.json", "application/json", text)
        if format == "markdown":
            said = [f"**{item.role.capitalize()}**\n\n{item.content}" for item in items]
            return Document(f"{self.id}.md", "text/markdown", "\n\n".join([f"# {self.title}", *said]) + "\n")
        raise InvalidValue("format must be markdown or json", "format")


SUMMARY = [conversations.c[field.name] for field in fields(Conversation)]
GROWING = ("content", "status", "reason", "usage", "cuts", "decode_seconds")
ITEM = [items.c[field.name] for field in fields(Item)]
JOINED = items.join(conversations, conversations.c.id == items.c.conversation_id)


class Conversations:
    """What users said and were told. To each of them, what others have is not there."""

    def __init__(self, database: AsyncEngine) -> None:
        self._database = database
        self._browsing = asyncio.Semaphore(4)  # so that replies find a connection, however much is read beside them
        # SQLite has one writer at a time, and the others look every few milliseconds whether it has finished.
        self._writing = asyncio.Semaphore(1 if database.dialect.name == "sqlite" else 4)

    @staticmethod
    def new_id() -> str:
        """The id of a conversation that is about to begin."""
        return f"conv_{uuid.uuid4().hex}"

    async def latest(self, user: str, listing: Listing) -> tuple[list[Conversation], bool]:
        """The conversations of a listing, the latest first, and whether there are more. Raises ConversationNotFound.

        A query is looked for in titles and in what was said.
        """
        chosen = select(*SUMMARY).where(conversations.c.user_id == user)
        if listing.after is not None:
            last = await self.find(user, listing.after)
            place = tuple_(conversations.c.updated, conversations.c.id)
            chosen = chosen.where(place < tuple_(last.updated, last.id))
        if listing.query:
            said = exists().where(items.c.conversation_id == conversations.c.id, _has(items.c.content, listing.query))
            chosen = chosen.where(or_(_has(conversations.c.title, listing.query), said))
        chosen = chosen.order_by(conversations.c.updated.desc(), conversations.c.id.desc()).limit(listing.limit + 1)
        async with self._browsing, self._database.connect() as connection:
            found = [Conversation(*row) for row in await connection.execute(chosen)]
        return found[: listing.limit], len(found) > listing.limit

    async def find(self, user: str, id: str) -> Conversation:
        """One conversation. Raises ConversationNotFound."""
        async with self._database.connect() as connection:
            row = (await connection.execute(select(*SUMMARY).where(_theirs(user, id)))).one_or_none()
        if row is None:
            raise ConversationNotFound
        return Conversation(*row)

    async def read(self, user: str, id: str) -> tuple[Conversation, list[Item]]:
        """One conversation and what was said in it. Raises ConversationNotFound."""
        async with self._browsing:
            return await self.find(user, id), await self.items(user, id)

    async def items(self, user: str, id: str) -> list[Item]:
        """What was said in a conversation, in order; nothing where there is no such conversation."""
        chosen = select(*ITEM).select_from(JOINED).where(_theirs(user, id)).order_by(items.c.position)
        async with self._database.connect() as connection:
            return [Item(*row) for row in await connection.execute(chosen)]

    async def reply(self, user: str, id: str) -> tuple[str, Item] | None:
        """A reply and the id of the conversation it is in."""
        chosen = select(conversations.c.id, *ITEM).select_from(JOINED)
        chosen = chosen.where(conversations.c.user_id == user, items.c.id == id, items.c.status.is_not(None))
        async with self._database.connect() as connection:
            row = (await connection.execute(chosen)).one_or_none()
        return (row[0], Item(*row[1:])) if row else None

    async def rename(self, user: str, id: str, title: str) -> Conversation:
        """Give a conversation another title. Raises ConversationNotFound."""
        async with self._writing, self._database.begin() as connection:
            await connection.execute(update(conversations).where(_theirs(user, id)).values(title=title))
        return await self.find(user, id)

    async def delete(self, user: str, id: str) -> None:
        """Delete a conversation and what was said in it. Raises ConversationNotFound."""
        async with self._writing, self._database.begin() as connection:
            if not (await connection.execute(delete(conversations).where(_theirs(user, id)))).rowcount:
                raise ConversationNotFound
            await connection.execute(delete(items).where(items.c.conversation_id == id))

    async def add(self, user: str, id: str, position: int, new: Sequence[Item]) -> None:
        """Put items into a conversation at a position; what was there, and behind it, is dropped.

        A conversation that is not there begins with them at position 0. Raises ConversationNotFound.
        """
        now = time.time()
        rows = [asdict(item) | {"conversation_id": id, "position": place} for place, item in enumerate(new, position)]
        async with self._writing, self._database.begin() as connection:
            touched = await connection.execute(update(conversations).where(_theirs(user, id)).values(updated=now))
            if touched.rowcount:
                dropped = and_(items.c.conversation_id == id, items.c.position >= position)
                await connection.execute(delete(items).where(dropped))
            elif position:
                raise ConversationNotFound
            else:
                summary = {"id": id, "user_id": user, "title": title(new), "created": now, "updated": now}
                await connection.execute(insert(conversations).values(summary))
            await connection.execute(insert(items), rows)

    async def write(self, replies: Iterable[Item]) -> None:
        """Write down how far replies have come, or how they ended; those that were deleted stay so."""
        async with self._writing, self._database.begin() as connection:
            rows = [{"reply": reply.id} | {name: getattr(reply, name) for name in GROWING} for reply in replies]
            if rows:
                await connection.execute(update(items).where(items.c.id == bindparam("reply")), rows)

    async def end_unfinished(self) -> int:
        """Mark as failed the replies whose process has ended before them; returns how many there were."""
        ended = {"status": "failed", "reason": "server_error"}
        async with self._writing, self._database.begin() as connection:
            unfinished = update(items).where(items.c.status == "in_progress").values(ended)
            return int((await connection.execute(unfinished)).rowcount)


def _theirs(user: str, id: str) -> ColumnElement[bool]:
    return and_(conversations.c.id == id, conversations.c.user_id == user)


def _has(column: ColumnElement[str], words: str) -> ColumnElement[bool]:
    return column.icontains(words, autoescape=True)
