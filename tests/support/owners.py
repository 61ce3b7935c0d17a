"""Owners of a database, as other processes write them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from models.store.conversations import Conversations
from models.store.database import owners_table
from models.store.owner import OWNER, Owner


async def write_owner(database: AsyncEngine, **fields: Any) -> Owner:
    """Write another owner: a process on this machine that is alive, unless some fields say otherwise."""
    owner = Owner.of_this_process()._replace(**fields)
    async with database.begin() as connection:
        await connection.execute(owners_table.insert().values(owner._asdict()))
    return owner


async def read_owners(database: AsyncEngine) -> list[Owner]:
    """All owners, by id."""
    async with database.connect() as connection:
        chosen = select(*(OWNER[name] for name in Owner._fields)).order_by(OWNER.id)
        return [Owner(*row) for row in await connection.execute(chosen)]


async def remove_owner(database: AsyncEngine, id: str) -> None:
    """Remove an owner, as another process does that takes over from it."""
    async with database.begin() as connection:
        await connection.execute(owners_table.delete().where(OWNER.id == id))


async def owned_store(database: AsyncEngine, owner: str) -> Conversations:
    """The store of another owner."""
    await write_owner(database, id=owner)
    return Conversations(database, owner)
