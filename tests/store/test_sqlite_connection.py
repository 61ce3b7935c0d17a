from __future__ import annotations

import asyncio

import pytest

from models.store.sqlite_connection import SQLiteConnection

pytestmark = pytest.mark.anyio


async def test_a_connection_that_is_stopped_twice_ends() -> None:
    connection = await SQLiteConnection.to(":memory:")
    stopped = connection.stop()
    async with asyncio.timeout(10):
        with pytest.raises(ValueError, match="closed"):
            await connection.close()
        assert stopped
        await stopped


async def test_a_connection_that_is_stopped_while_it_closes_ends() -> None:
    connection = await SQLiteConnection.to(":memory:")
    closing = asyncio.create_task(connection.close())
    await asyncio.sleep(0)  # it waits for the thread now
    stopped = connection.stop()
    async with asyncio.timeout(10):
        await closing
        assert stopped
        await stopped
