"""The responses of all users, in the database, and the turns that they are part of."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sqlalchemy import and_, bindparam, exists, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from models.errors import (
    ConversationLockedError,
    ConversationNotFoundError,
    ItemNotFoundError,
    ResponseNotFoundError,
)
from models.store.database import conversations_table, items_table, owners_table
from models.store.item import Item, Status, is_response
from models.store.owner import OWNER, Owner, remove_owners
from models.store.place import Place
from models.store.rows import CONVERSATION, ITEM, count_bytes, growing_columns, read_items
from models.store.storage_limits import MAX_PAGE, UNLISTED_SECONDS
from models.store.transactions import Transactions
from models.store.tree import (
    IN_PROGRESS,
    PRESENT,
    branch_to,
    delete_node,
    delete_trees,
    owned,
    read_branch,
    read_slice,
)

FAILED = {"status": Status.FAILED, "reason": "server_error"}
ABANDONED = and_(IN_PROGRESS, ~exists().where(OWNER.id == ITEM.owner))  # found by the index of what is in progress


class Found(NamedTuple):
    """A response, its conversation, and whether that one is listed. None: the response is only in memory."""

    conversation: str | None
    listed: bool
    item: Item


class FoundPath(NamedTuple):
    """The nodes from the beginning of a conversation to a response, which is the last one. See `Found` and `Path`."""

    conversation: str | None
    listed: bool
    items: Sequence[Item]


class RunningReply(NamedTuple):
    """A reply that another process runs, which other hosts reach at `address`, if it has one."""

    id: str
    address: str | None


class Responses(Transactions):
    """The responses in the database. A user cannot find those of other users.

    Responses that were stored without a conversation have a tree of their own, which is not listed. No other owner
    writes the replies that this one has in progress.
    """

    async def begin_turn(
        self, user: str, id: str, place: Place, input: Sequence[Item], reply: Item, accepted: bool = False
    ) -> None:
        """Put input items and a reply into a conversation, and create that one if the place says so.

        A turn that was `accepted` before is always stored: it becomes a branch if the leaf has changed, and if it is
        there already, the reply is updated. Raises ConversationNotFoundError, ItemNotFoundError if the parent is not
        there and, unless the turn was accepted before, ConversationLockedError, ConversationFullError or
        StorageFullError.
        """
        try:
            async with self._transaction() as connection:
                if accepted and await self._update(connection, [reply]):
                    return
                advances = await self._enter(connection, user, id, place, input, accepted)
                await self._insert_items(connection, id, place.parent, [*input, reply])
                if advances:
                    await self._set_leaf(connection, id, reply.id)
                if not accepted:
                    await self._check_limits(connection, user, id)
        except IntegrityError:  # another process has begun the conversation
            raise ConversationLockedError from None

    async def _enter(
        self, connection: AsyncConnection, user: str, id: str, place: Place, input: Sequence[Item], accepted: bool
    ) -> bool:
        """Lock the conversation of a turn, or create it. Returns whether the leaf advances.

        Raises ConversationNotFoundError or ConversationLockedError.
        """
        try:
            await self._lock(connection, owned(user, id, listed=False))
        except ConversationNotFoundError:
            if not place.new:
                raise
            await self._insert_conversation(connection, user, id, input, listed=place.listed)
            return True
        running = exists().where(ITEM.id == CONVERSATION.leaf, IN_PROGRESS)
        now = select(CONVERSATION.leaf, CONVERSATION.listed, running).where(CONVERSATION.id == id)
        leaf, listed, busy = (await connection.execute(now)).one()
        if not listed or not place.advances:
            return not listed
        unchanged = leaf == place.leaf and not busy
        if not unchanged and not accepted:
            raise ConversationLockedError
        return bool(unchanged)

    async def find_response(self, user: str, id: str) -> Found:
        """A response, as far as it is stored, with each of its pieces. Raises ResponseNotFoundError."""
        async with self._database.connect() as connection:
            home = await _home(connection, user, id)
            items = await read_items(connection, select(items_table).where(ITEM.id == id)) if home else []
        if not home or not items:
            raise ResponseNotFoundError("there is no such response")
        return Found(*home, items[0])

    async def replies_elsewhere(
        self, user: str, *, id: str | None = None, conversation: str | None = None
    ) -> Sequence[RunningReply]:
        """The replies with an id, or in a conversation, that other processes run."""
        wanted = ITEM.id == id if id else ITEM.conversation_id == conversation
        chosen = select(ITEM.id, OWNER.address).join(conversations_table, ITEM.conversation_id == CONVERSATION.id)
        chosen = chosen.outerjoin(owners_table, ITEM.owner == OWNER.id)
        chosen = chosen.where(wanted, CONVERSATION.user_id == user, IN_PROGRESS, ITEM.owner != self.owner)
        async with self._database.connect() as connection:
            return [RunningReply(*row) for row in await connection.execute(chosen)]

    async def path_of_response(self, user: str, id: str) -> FoundPath:
        """The nodes up to and including a response, as `read_messages` gives them. Raises ResponseNotFoundError."""
        async with self._database.connect() as connection:
            home = await _home(connection, user, id)
            items = await read_branch(connection, branch_to(user, id)) if home else []
        if not home or not items:
            raise ResponseNotFoundError("there is no such response")
        return FoundPath(*home, items)

    async def branch(self, user: str, node: str) -> Sequence[Item]:
        """The nodes up to and including one, in any conversation, listed or not. Raises ItemNotFoundError."""
        async with self._database.connect() as connection:
            items = await read_branch(connection, branch_to(user, node))
        if not items:
            raise ItemNotFoundError
        return items

    async def find_node(self, user: str, id: str) -> Item:
        """A node of any conversation, listed or not. Raises ItemNotFoundError."""
        async with self._browse() as connection:
            nodes = await read_branch(connection, branch_to(user, id, steps=1))
        if not nodes or nodes[0].status is Status.DELETED:
            raise ItemNotFoundError
        return nodes[0]

    async def input_items_of(
        self, user: str, id: str, limit: int, after: str | None = None, ascending: bool = False
    ) -> tuple[list[Item], bool]:
        """Input items of the request for a response, in either order, and whether there are more.

        At most `limit`, and PAGE_BYTES, behind the item `after`. Raises ResponseNotFoundError or ItemNotFoundError.
        """
        await self.find_response(user, id)
        async with self._browse() as connection:
            inputs = (await connection.execute(select(ITEM.inputs).where(ITEM.id == id))).scalar() or 0
            branch = branch_to(user, id, steps=inputs + 1)
            return await read_slice(connection, branch, limit, after, ascending, ITEM.id != id)

    async def delete_response(self, user: str, id: str) -> str:
        """Delete the text of a response for good. Nodes that nothing comes after are deleted, with the input of theirs.

        If the leaf is deleted, the newest leaf below the node before it is the leaf, or else that node. Returns the
        conversation. Raises ResponseNotFoundError.
        """
        home = select(ITEM.conversation_id).where(ITEM.id == id).scalar_subquery()
        async with self._transaction() as connection:
            try:
                await self._lock(connection, and_(CONVERSATION.id == home, CONVERSATION.user_id == user), used=False)
            except ConversationNotFoundError:
                raise ResponseNotFoundError("there is no such response") from None
            return await delete_node(connection, user, id)

    async def update_replies(self, replies: Iterable[Item]) -> None:
        """Store the current state of replies, unless they were deleted or are another process's now."""
        if states := [*replies]:
            async with self._transaction() as connection:
                await self._update(connection, states)

    async def _update(self, connection: AsyncConnection, replies: Sequence[Item]) -> bool:
        """Store the current state of replies. Returns whether any of them is there."""
        mine = and_(ITEM.id.in_([reply.id for reply in replies]), ITEM.owner == self.owner)
        home = select(ITEM.conversation_id).where(mine)
        locked = select(CONVERSATION.id).where(CONVERSATION.id.in_(home)).order_by(CONVERSATION.id).with_for_update()
        conversations = (await connection.execute(locked)).scalars().all()
        if not conversations:
            return False
        rows = [{"reply": reply.id} | growing_columns(reply) for reply in replies]
        one = and_(ITEM.id == bindparam("reply"), ITEM.owner == self.owner)
        await connection.execute(update(items_table).where(one), rows)
        if any(reply.status is not Status.IN_PROGRESS for reply in replies):
            await count_bytes(connection, conversations)
        return True

    async def fail_replies(self, ids: Sequence[str]) -> None:
        """Mark as failed the replies of this process that are in progress and have these ids."""
        running = and_(ITEM.id.in_(ids), ITEM.status == Status.IN_PROGRESS, ITEM.owner == self.owner)
        async with self._transaction() as connection:
            await connection.execute(update(items_table).where(running).values(FAILED))

    async def fail_unfinished(self, ended: Sequence[Owner] = ()) -> Sequence[tuple[str, str]]:
        """Remove owners that have ended, and mark as failed the replies in progress that have no owner any more.

        Returns the user and the conversation of each reply. An owner that has beaten since it was read stays. A reply
        whose conversation is locked is left to the next call.
        """
        if not ended:
            async with self._browse() as connection:  # which holds up no writer
                if not (await connection.execute(select(ITEM.id).where(ABANDONED).limit(1))).first():
                    return []
        homes = select(CONVERSATION.user_id, CONVERSATION.id, ITEM.id)
        homes = homes.join(items_table, ITEM.conversation_id == CONVERSATION.id).where(ABANDONED)
        async with self._transaction() as connection:
            await remove_owners(connection, ended)
            # A process that stands still may hold a lock until the database server ends its connection.
            unlocked = homes.with_for_update(of=conversations_table, skip_locked=True)
            found = (await connection.execute(unlocked)).all()
            failed = update(items_table).where(ABANDONED, ITEM.id.in_([reply for _, _, reply in found]))
            await connection.execute(failed.values(FAILED | {"owner": None}))
        return [(user, conversation) for user, conversation, _ in found]

    async def delete_expired(self) -> int:
        """Delete the trees that are not listed and were not used for UNLISTED_SECONDS. Returns how many there were.

        To be called at the start, and every hour or so. Some at a time, so that replies need not wait for long.
        """
        expired = and_(~CONVERSATION.listed, CONVERSATION.updated < time.time() - UNLISTED_SECONDS)
        busy = exists().where(ITEM.conversation_id == CONVERSATION.id, IN_PROGRESS)
        count = 0
        while True:
            async with self._transaction() as connection:
                chosen = select(CONVERSATION.id).where(expired, ~busy).limit(MAX_PAGE).with_for_update(skip_locked=True)
                ids = (await connection.execute(chosen)).scalars().all()
                await delete_trees(connection, ids)
            if not ids:
                return count
            count += len(ids)


async def _home(connection: AsyncConnection, user: str, id: str) -> tuple[str, bool] | None:
    """The conversation of a user's response, and whether it is listed; None if there is no such response."""
    chosen = select(CONVERSATION.id, CONVERSATION.listed).join(items_table, ITEM.conversation_id == CONVERSATION.id)
    mine = and_(CONVERSATION.user_id == user, ITEM.id == id, PRESENT)
    row = (await connection.execute(chosen.where(mine))).one_or_none() if is_response(id) else None
    return (row[0], row[1]) if row else None
