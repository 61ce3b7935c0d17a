"""The tree of a conversation in the database: branches, slices of them, and what is deleted with a response."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from sqlalchemy import (
    CTE,
    ColumnElement,
    Select,
    and_,
    delete,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from models.errors import ItemNotFoundError, ResponseNotFoundError
from models.store.database import conversations_table, items_table, texts_table
from models.store.item import Item, Status, is_response, node_id
from models.store.rows import (
    BLANK,
    CONVERSATION,
    ITEM,
    TEXT,
    count_bytes,
    delete_unused_texts,
    read_items,
    read_messages,
)
from models.store.storage_limits import PAGE_BYTES

PRESENT = or_(ITEM.status.is_(None), ITEM.status != Status.DELETED)
IN_PROGRESS = ITEM.status == literal_column(
    "'in_progress'"
)  # not a parameter, so that it fits the condition of the index


class Size(NamedTuple):
    """An item without its content."""

    id: str
    parent: str | None
    depth: int
    created: float
    bytes: int


class _Node(NamedTuple):
    """A node of a branch that may be deleted; `children` counts the nodes right below it."""

    id: str
    conversation_id: str
    parent: str | None
    status: Status | None
    inputs: int | None
    children: int


def owned(user: str, id: str, listed: bool = True) -> ColumnElement[bool]:
    """Whether a conversation has this id and is the user's; also one that is not listed, if `listed` is False."""
    mine = and_(CONVERSATION.id == id, CONVERSATION.user_id == user)
    return and_(mine, CONVERSATION.listed) if listed else mine


def branch_to(user: str, node: str | None, conversation: str | None = None, steps: int | None = None) -> CTE:
    """The node of a user's conversation and those before it, or only `steps` of them: `id`, `parent`, `depth`.

    Each step goes to an item that is one less deep, so that no wrong parent can make it endless.
    """
    chosen = select(ITEM.id, ITEM.parent, ITEM.depth, ITEM.conversation_id, literal(1).label("step"))
    mine = [ITEM.id == node, CONVERSATION.user_id == user]
    if conversation is not None:
        mine.append(owned(user, conversation))
    first = chosen.join(conversations_table, CONVERSATION.id == ITEM.conversation_id).where(*mine)
    branch = first.cte("branch", recursive=True)
    earlier = items_table.alias("earlier")
    next_one = select(*(earlier.c[name] for name in ("id", "parent", "depth", "conversation_id")), branch.c.step + 1)
    next_one = next_one.where(
        earlier.c.id == branch.c.parent,
        earlier.c.depth == branch.c.depth - 1,
        earlier.c.conversation_id == branch.c.conversation_id,
    )
    return branch.union_all(next_one if steps is None else next_one.where(branch.c.step < steps))


async def read_branch(connection: AsyncConnection, branch: CTE) -> list[Item]:
    """The items of a branch, in order, as `read_messages` gives them."""
    chosen = select(items_table).join(branch, branch.c.id == ITEM.id).order_by(ITEM.depth)
    return await read_messages(connection, chosen)


def sizes(branch: CTE | None = None) -> Select[Any]:
    """The columns of `Size` of the items of a branch, or of all items."""
    texts = (  # which each item shows, although they are stored once
        select(func.coalesce(func.sum(TEXT.bytes), 0))
        .where(TEXT.conversation_id == ITEM.conversation_id, TEXT.id.in_([ITEM.instructions, ITEM.request]))
        .scalar_subquery()
    )
    items = items_table if branch is None else branch.join(items_table, branch.c.id == ITEM.id)
    return select(ITEM.id, ITEM.parent, ITEM.depth, ITEM.created, ITEM.bytes + texts).select_from(items)


async def read_sizes(connection: AsyncConnection, chosen: Select[Any]) -> list[Size]:
    """The result of a selection that `sizes` began."""
    return [Size(*row) for row in await connection.execute(chosen)]


def fitting(found: Sequence[Size], limit: int) -> Sequence[Size]:
    """The first ones: at most `limit`, and PAGE_BYTES, but two at least: a question and its reply."""
    found = found[:limit]
    return found[: max(2, sum(size <= PAGE_BYTES for size in accumulate(one.bytes for one in found)))]


async def read_sized(connection: AsyncConnection, found: Sequence[Size], descending: bool = False) -> list[Item]:
    """The items of some sizes, in order."""
    order = ITEM.depth.desc() if descending else ITEM.depth
    return await read_items(
        connection, select(items_table).where(ITEM.id.in_([one.id for one in found])).order_by(order)
    )


async def read_slice(
    connection: AsyncConnection,
    branch: CTE,
    limit: int,
    after: str | None,
    ascending: bool,
    among: ColumnElement[bool] = PRESENT,
) -> tuple[list[Item], bool]:
    """Some of the items of a branch in either order, behind the item `after`, and whether there are more.

    If `after` is a part of a reply, they begin with the reply. Raises ItemNotFoundError.
    """
    chosen = sizes(branch).where(PRESENT, among).order_by(ITEM.depth if ascending else ITEM.depth.desc())
    if after is not None:
        node = node_id(after)
        depth = (await connection.execute(select(branch.c.depth).where(branch.c.id == node))).scalar_one_or_none()
        if depth is None:
            raise ItemNotFoundError
        inclusive = node != after
        limit += inclusive
        side = ITEM.depth > depth if ascending else ITEM.depth < depth
        chosen = chosen.where(or_(side, ITEM.id == node) if inclusive else side)
    found = await read_sizes(connection, chosen.limit(limit + 1))
    page = fitting(found, limit)
    return await read_sized(connection, page, not ascending), len(found) > len(page)


async def newest_leaf(connection: AsyncConnection, conversation: str, node: str | None) -> str | None:
    """Of the items at or below a node that nothing comes after, the one that was created last; None: of all items.

    Returns None if the conversation has no such node.
    """
    child = items_table.alias("child")
    begins = ITEM.parent.is_(None) if node is None else ITEM.id == node
    first = select(ITEM.id, ITEM.created).where(begins, ITEM.conversation_id == conversation)
    below = first.cte("below", recursive=True)
    comes_after = and_(child.c.conversation_id == conversation, child.c.parent == below.c.id)
    below = below.union(select(child.c.id, child.c.created).where(comes_after))  # distinct: wrong parents end it too
    is_leaf = ~exists().where(child.c.conversation_id == conversation, child.c.parent == below.c.id)
    chosen = select(below.c.id).where(is_leaf).order_by(below.c.created.desc(), below.c.id.desc())
    return (await connection.execute(chosen.limit(1))).scalar()


async def delete_trees(connection: AsyncConnection, ids: Sequence[str]) -> None:
    """Delete conversations with all that is in them."""
    await connection.execute(delete(conversations_table).where(CONVERSATION.id.in_(ids)))
    await connection.execute(delete(items_table).where(ITEM.conversation_id.in_(ids)))
    await connection.execute(delete(texts_table).where(TEXT.conversation_id.in_(ids)))


async def delete_node(connection: AsyncConnection, user: str, id: str) -> str:
    """Delete a response whose conversation is locked. Returns the conversation. Raises ResponseNotFoundError."""
    rows = await _with_children(connection, branch_to(user, id))
    if not is_response(id) or not rows or rows[0].status is Status.DELETED:
        raise ResponseNotFoundError("there is no such response")
    doomed, conversation = _doomed(rows), rows[0].conversation_id
    leaf = (await connection.execute(select(CONVERSATION.leaf).where(CONVERSATION.id == conversation))).scalar()
    if doomed:
        await connection.execute(delete(items_table).where(ITEM.id.in_(doomed)))
        above = rows[len(doomed) - 1].parent
    else:
        await connection.execute(update(items_table).where(ITEM.id == id).values(BLANK | {"output": "[]"}))
        above = rows[0].parent
    if leaf in (id, *doomed):
        leaf = await newest_leaf(connection, conversation, above)  # so that what is left beside it can be reached
        await connection.execute(update(conversations_table).where(CONVERSATION.id == conversation).values(leaf=leaf))
    await delete_unused_texts(connection, conversation)
    await count_bytes(connection, [conversation])
    left = exists().where(ITEM.conversation_id == conversation)
    empty = select(CONVERSATION.id).where(CONVERSATION.id == conversation, ~CONVERSATION.listed, ~left)
    if (await connection.execute(empty)).first():
        await delete_trees(connection, [conversation])
    return conversation


async def _with_children(connection: AsyncConnection, branch: CTE) -> list[_Node]:
    """The nodes of a branch, the last one first."""
    below = items_table.alias("below")
    same_tree = below.c.conversation_id == branch.c.conversation_id
    children = select(func.count()).where(same_tree, below.c.parent == branch.c.id).scalar_subquery()
    columns = (ITEM.id, ITEM.conversation_id, ITEM.parent, ITEM.status, ITEM.inputs, children.label("children"))
    chosen = select(*columns).select_from(branch.join(items_table, branch.c.id == ITEM.id))
    return [_Node(*row) for row in await connection.execute(chosen.order_by(ITEM.depth.desc()))]


def _doomed(rows: Sequence[_Node]) -> list[str]:
    """The nodes that are deleted with the first one: its input, and deleted ones before it, unless others need them."""
    doomed: list[str] = []
    inputs = 0  # how many of the next nodes are the input of a reply that is doomed
    for row in rows:
        if row.children > bool(doomed):
            break
        if not doomed or row.status is Status.DELETED:
            inputs = row.inputs or max(inputs - 1, 0)
        elif inputs:
            inputs -= 1
        else:
            break
        doomed.append(row.id)
    return doomed
