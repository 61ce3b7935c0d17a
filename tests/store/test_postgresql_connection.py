from __future__ import annotations

import asyncio

import pytest

from models.store.postgresql_connection import connect
from tests.support.databases import PostgreSQL

pytestmark = pytest.mark.anyio


async def test_the_server_ends_a_transaction_that_stands_still(postgresql: PostgreSQL) -> None:
    connection = await connect(host=str(postgresql.folder), user="postgres", idle_seconds=0.05)
    ended = asyncio.Event()
    connection.add_termination_listener(lambda _: ended.set())
    await connection.execute("BEGIN")
    async with asyncio.timeout(20):
        await ended.wait()


async def test_a_connection_without_a_transaction_stays(postgresql: PostgreSQL) -> None:
    connection = await connect(host=str(postgresql.folder), user="postgres", idle_seconds=0.001)
    assert await connection.fetchval("SELECT 1 FROM pg_sleep(0.01)") == 1
    await connection.close()
