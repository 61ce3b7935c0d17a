"""A connection to SQLite that can be stopped twice."""

from __future__ import annotations

import asyncio
import sqlite3
from functools import partial
from typing import Any, Self

import aiosqlite


class SQLiteConnection(aiosqlite.Connection):
    """aiosqlite's connection, which may be stopped more than once.

    If a query is cancelled while the event loop ends, SQLAlchemy stops its connection twice. aiosqlite would then wait
    forever for a thread that has ended, and so would the process.
    """

    stopped = False

    @classmethod
    def to(cls, path: str, **options: Any) -> Self:
        """A connection that opens when it is awaited; the options are those of `sqlite3.connect`."""
        connection = cls(partial(sqlite3.connect, path, **options), iter_chunk_size=64)
        connection._thread.daemon = True  # as SQLAlchemy has it: the process can end without closing it
        return connection

    def stop(self) -> asyncio.Future[Any] | None:
        """End the thread. Returns what tells of its end, the first time."""
        if self.stopped:
            return None
        self.stopped = True
        return super().stop()
