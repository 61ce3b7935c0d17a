"""A connection to PostgreSQL that holds no lock for long while this process stands still."""

from __future__ import annotations

from typing import Any

IDLE_SECONDS = 15


async def connect(*arguments: Any, idle_seconds: float = IDLE_SECONDS, **options: Any) -> Any:
    """A connection of asyncpg. The server ends it if a transaction asks for nothing for `idle_seconds`.

    It does so also if it does not notice that the process, or its host, is gone.
    """
    import asyncpg  # type: ignore[import-untyped]  # only here: with SQLite, each process is 2 MB smaller

    connection = await asyncpg.connect(*arguments, **options)
    try:
        await connection.execute(f"SET idle_in_transaction_session_timeout = {1000 * idle_seconds:.0f}")
    except BaseException:  # also if it is cancelled
        connection.terminate()
        raise
    return connection
