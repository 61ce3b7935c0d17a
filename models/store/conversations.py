"""The conversations of all users, in the database."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, exists, func, literal, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from models.errors import ConversationLockedError, ConversationNotFoundError, ItemNotFoundError
from models.output_item import OutputItem
from models.store.branches import Fork, in_branches
from models.store.database import Database, conversations_table, items_table
from models.store.item import Edge, Item, Status, linked, node_id, part_id, part_index
from models.store.responses import Responses
from models.store.rows import BLANK, CONVERSATION, ITEM, TEXTS, count_bytes, growing_columns, read_items
from models.store.storage_limits import MAX_PAGE, StorageLimits
from models.store.tree import (
    IN_PROGRESS,
    PRESENT,
    branch_to,
    delete_trees,
    fitting,
    newest_leaf,
    owned,
    read_branch,
    read_sized,
    read_sizes,
    read_slice,
    sizes,
)
from models.store.versions import Version, read_versions


@dataclass(frozen=True)
class Conversation:
    """A conversation without its items; times are Unix seconds.

    `leaf` is the last item of the current branch; `response_id` is the same, while that is a reply in progress.
    """

    id: str
    title: str
    created: float
    updated: float
    leaf: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    response_id: str | None = None


@dataclass(frozen=True)
class Listing:
    """Which conversations to list: at most `limit`, after the one with the id `after`, that contain `query`."""

    limit: int = 50
    after: str | None = None
    query: str = ""


class ItemPage(NamedTuple):
    """Some items of a branch, in order, with their versions; `earlier` is how many come before them."""

    items: list[Item]
    earlier: int
    versions: Mapping[str, Version]


class Placed(NamedTuple):
    """An item, and the fork if it is the first one of a branch that is not the current one."""

    item: Item
    fork: Fork | None = None


class Path(NamedTuple):
    """The nodes from the beginning of a conversation to one of them, the leaf, and whether the conversation exists.

    They have what a prompt is made from, as `read_messages` says.
    """

    items: Sequence[Item]
    leaf: str | None
    exists: bool


SUMMARY = (
    CONVERSATION.id,
    CONVERSATION.title,
    CONVERSATION.created,
    CONVERSATION.updated,
    CONVERSATION.leaf,
    CONVERSATION.metadata,
    select(ITEM.id).where(ITEM.id == CONVERSATION.leaf, IN_PROGRESS).scalar_subquery(),
)


class Conversations(Responses):
    """The conversations in the database. A user cannot find those of other users.

    A conversation is a tree of items; its current branch ends at its leaf. Trees that are not listed are found only by
    the ids of their responses.
    """

    def __init__(self, database: Database, owner: str = "", limits: StorageLimits | None = None) -> None:
        super().__init__(database, owner, limits)
        self._searching = asyncio.Semaphore(2)  # a search reads all that a user has stored

    @staticmethod
    def new_id() -> str:
        """An id for a conversation that is about to begin."""
        return f"conv_{uuid.uuid4().hex}"

    async def list_page(self, user: str, listing: Listing) -> tuple[list[Conversation], bool]:
        """The conversations of a listing, the latest first, and whether there are more.

        The query is searched in titles and in messages. Raises ConversationNotFoundError.
        """
        chosen = select(*SUMMARY).where(CONVERSATION.user_id == user, CONVERSATION.listed)
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
            found = [_conversation(row) for row in await connection.execute(chosen)]
        return found[: listing.limit], len(found) > listing.limit

    async def find(self, user: str, id: str) -> Conversation:
        """One conversation. Raises ConversationNotFoundError."""
        async with self._database.connect() as connection:
            row = (await connection.execute(select(*SUMMARY).where(owned(user, id)))).one_or_none()
        if row is None:
            raise ConversationNotFoundError
        return _conversation(row)

    async def create(
        self,
        user: str,
        items: Sequence[Item] = (),
        metadata: Mapping[str, str] | None = None,
        title: str | None = None,
    ) -> Conversation:
        """A new conversation, with some input items; its title is made from them, unless one is given.

        Raises ConversationFullError or StorageFullError.
        """
        id = self.new_id()
        async with self._transaction() as connection:
            await self._insert_conversation(connection, user, id, items, title, metadata)
            await self._insert_items(connection, id, None, items)
            await self._set_leaf(connection, id, items[-1].id if items else None)
            await self._check_limits(connection, user, id)
        return await self.find(user, id)

    async def update(
        self, user: str, id: str, title: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> Conversation:
        """Change the title of a conversation, or its metadata, or both. Raises ConversationNotFoundError."""
        changes = {"title": title, "metadata": metadata}
        changes = {name: value for name, value in changes.items() if value is not None}
        async with self._transaction() as connection:
            await self._lock(connection, owned(user, id), used=False)
            if changes:
                await connection.execute(update(conversations_table).where(owned(user, id)).values(changes))
        return await self.find(user, id)

    async def set_leaf(self, user: str, id: str, item: str) -> Conversation:
        """Make the branch that goes through an item, and on to the newest leaf below it, the current one.

        A deleted item is a way too. Raises ConversationNotFoundError, ItemNotFoundError or, while a reply runs at the
        current leaf, ConversationLockedError.
        """
        async with self._transaction() as connection:
            await self._lock(connection, owned(user, id), used=False)
            await _check_idle(connection, await _leaf(connection, user, id))
            leaf = await newest_leaf(connection, id, node_id(item))
            if leaf is None:
                raise ItemNotFoundError
            await self._set_leaf(connection, id, leaf)
        return await self.find(user, id)

    async def delete(self, user: str, id: str) -> None:
        """Delete a conversation with its items. Raises ConversationNotFoundError."""
        async with self._transaction() as connection:
            await self._lock(connection, owned(user, id))
            await delete_trees(connection, [id])

    # Items

    async def path(self, user: str, id: str, after: str | Edge = Edge.END) -> Path:
        """The nodes from the beginning of a conversation to an item on any branch, or to an edge.

        Raises ItemNotFoundError, with the parameter `after`.
        """
        async with self._database.connect() as connection:
            row = (await connection.execute(select(CONVERSATION.leaf).where(owned(user, id)))).one_or_none()
            leaf = row[0] if row else None
            last = node_id(after) if isinstance(after, str) else leaf if after is Edge.END else None
            items = await read_branch(connection, branch_to(user, last, id)) if row and last else []
        if isinstance(after, str) and not items:
            raise ItemNotFoundError
        return Path(items, leaf, row is not None)

    async def read_page(self, user: str, id: str, limit: int, before: str | None = None) -> ItemPage:
        """The last items of the current branch, or those that lead to `before`: at most `limit`, and PAGE_BYTES.

        Raises ItemNotFoundError, with the parameter `before`.
        """
        async with self._browse() as connection:
            last = await _leaf(connection, user, id) if before is None else node_id(before)
            branch = branch_to(user, last, id, steps=limit + 1)
            found = await read_sizes(connection, sizes(branch).order_by(ITEM.depth.desc()))
            if before is not None and not found:
                raise ItemNotFoundError(param="before")
            page = fitting(found if before is None else found[1:], limit)
            versions = await read_versions(connection, id, page)  # before the items, which may be deleted meanwhile
            return ItemPage(await read_sized(connection, page), page[-1].depth if page else 0, versions)

    async def pages(self, user: str, id: str) -> AsyncIterator[list[Placed]]:
        """All items on all branches, in the order of `in_branches`, a page at a time.

        Raises ConversationNotFoundError.
        """
        async with self._browse() as connection:
            leaf = await _leaf(connection, user, id)
            nodes = await read_sizes(connection, sizes().where(ITEM.conversation_id == id))
        left = await asyncio.to_thread(in_branches, nodes, leaf)  # takes tenths of a second for the largest tree
        while left:
            part = left[: len(fitting([step.node for step in left[:MAX_PAGE]], MAX_PAGE))]
            async with self._browse() as connection:
                items = {item.id: item for item in await read_sized(connection, [step.node for step in part])}
            if page := [Placed(items[step.node.id], step.fork) for step in part if step.node.id in items]:
                yield page
            left = left[len(part) :]

    async def list_items(
        self, user: str, id: str, limit: int, after: str | None = None, ascending: bool = False
    ) -> tuple[list[Item], bool]:
        """Items of the current branch, in either order, and whether there are more: at most `limit`, and PAGE_BYTES.

        They begin behind the item `after`; if that is a part of a reply, they begin with the reply, which may have more
        parts, and there is one more of them. Deleted ones are left out. Raises ConversationNotFoundError or, with the
        parameter `after`, ItemNotFoundError.
        """
        async with self._browse() as connection:
            branch = branch_to(user, await _leaf(connection, user, id), id)
            return await read_slice(connection, branch, limit, after, ascending)

    async def find_item(self, user: str, id: str, item: str) -> Item:
        """The node of an item on any branch. Raises ConversationNotFoundError or ItemNotFoundError."""
        async with self._browse() as connection:
            await _leaf(connection, user, id)
            return await _find_item(connection, id, item)

    async def append_items(self, user: str, id: str, items: Sequence[Item]) -> list[Item]:
        """Add input items behind the leaf, and return them with their parents.

        Raises ConversationNotFoundError, ConversationFullError, StorageFullError or, while a reply runs there,
        ConversationLockedError.
        """
        async with self._transaction() as connection:
            await self._lock(connection, owned(user, id))
            leaf = await _leaf(connection, user, id)
            await _check_idle(connection, leaf)
            if items:
                await self._insert_items(connection, id, leaf, items)
                await self._set_leaf(connection, id, items[-1].id)
            await self._check_limits(connection, user, id)
        return linked(items, leaf)

    async def delete_item(self, user: str, id: str, item: str) -> None:
        """Delete the content of an input item, or of a part of a reply. What comes after it stays.

        Raises ConversationNotFoundError, ItemNotFoundError or, if the reply is in progress, ConversationLockedError.
        """
        async with self._transaction() as connection:
            await self._lock(connection, owned(user, id), used=False)
            node, index = await _find_item(connection, id, item), part_index(item)
            if node.status is Status.IN_PROGRESS:
                raise ConversationLockedError
            if index is None:
                changes = BLANK
            else:
                parts = [*node.output[:index], OutputItem(node.output[index].type), *node.output[index + 1 :]]
                left = Item.of_reply(node.id, node.created, parts)
                changes = {name: value for name, value in growing_columns(left).items() if name in TEXTS}
            await connection.execute(update(items_table).where(ITEM.id == node.id).values(changes))
            await count_bytes(connection, [id])

    def _has(self, column: ColumnElement[str], words: str) -> ColumnElement[bool]:
        """Whether a text has some words, in capitals or not. LIKE takes seconds for some patterns in long texts."""
        find = func.instr if self._database.dialect.name == "sqlite" else func.strpos
        return find(func.lower(column), func.lower(literal(words, column.type))) > 0


async def _leaf(connection: AsyncConnection, user: str, id: str) -> str | None:
    """The leaf of a conversation that is listed. Raises ConversationNotFoundError."""
    row = (await connection.execute(select(CONVERSATION.leaf).where(owned(user, id)))).one_or_none()
    if row is None:
        raise ConversationNotFoundError
    return row.leaf  # type: ignore[no-any-return]


async def _check_idle(connection: AsyncConnection, leaf: str | None) -> None:
    """Raise ConversationLockedError if a reply runs at a leaf."""
    if (await connection.execute(select(ITEM.id).where(ITEM.id == leaf, IN_PROGRESS))).first():
        raise ConversationLockedError


async def _find_item(connection: AsyncConnection, conversation: str, item: str) -> Item:
    """The node of an item in a conversation. Raises ItemNotFoundError."""
    chosen = select(items_table).where(ITEM.id == node_id(item), ITEM.conversation_id == conversation, PRESENT)
    for node in await read_items(connection, chosen):
        numbered = enumerate(node.output)
        parts = [part_id(node.id, part.type, index) for index, part in numbered if not part.is_deleted]
        if item in (parts if node.is_reply else [node.id]):
            return node
    raise ItemNotFoundError


def _conversation(row: Sequence[Any]) -> Conversation:
    id, title, created, updated, leaf, metadata, response_id = row
    return Conversation(id, title, created, updated, leaf, metadata or {}, response_id)
