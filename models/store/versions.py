"""The versions of an item: the items of its conversation with the same parent, in the order of their creation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import false, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from models.store.rows import ITEM
from models.store.tree import Size


@dataclass(frozen=True)
class Version:
    """The place of an item among its versions: its `number`, from 1, how many there are, and the ids beside it."""

    number: int
    count: int
    older: str | None
    newer: str | None


async def read_versions(connection: AsyncConnection, conversation: str, items: Sequence[Size]) -> dict[str, Version]:
    """The versions of some items of a conversation, by their ids. The index of children has all that it reads."""
    parents = {item.parent for item in items}
    first = ITEM.parent.is_(None) if None in parents else false()
    siblings = or_(first, ITEM.parent.in_([parent for parent in parents if parent is not None]))
    order = (ITEM.created, ITEM.id)
    numbered = (
        select(
            ITEM.id,
            func.row_number().over(partition_by=ITEM.parent, order_by=order).label("number"),
            func.count().over(partition_by=ITEM.parent).label("count"),
            func.lag(ITEM.id).over(partition_by=ITEM.parent, order_by=order).label("older"),
            func.lead(ITEM.id).over(partition_by=ITEM.parent, order_by=order).label("newer"),
        )
        .where(ITEM.conversation_id == conversation, siblings)
        .subquery()
    )
    found = await connection.execute(select(numbered).where(numbered.c.id.in_([item.id for item in items])))
    return {id: Version(*version) for id, *version in found}
