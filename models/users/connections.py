"""Keeps the connections of users, and notifies other users of changes."""

from __future__ import annotations

import asyncio
from typing import Literal, Protocol

from models.errors import TooManyConnectionsError

Change = Literal["joined", "left"]


class Connection(Protocol):
    """A WebSocket of a user; `login_session` is the id of the browser's session, if its cookie opened it."""

    @property
    def login_session(self) -> str | None: ...

    def presence_changed(self, change: Change, user: str) -> None:
        """Notify the client that another user has joined or left."""

    def close(self, code: int, reason: str) -> None:
        """Close the connection, without waiting for it."""


class ConnectionRegistry:
    """The connections of each user, at most `per_user`.

    Other users are notified when a user's first connection opens and the last one closes, unless `announce` is False.
    """

    def __init__(self, announce: bool, per_user: int) -> None:
        self._announce = announce
        self._per_user = per_user
        self._connections: dict[str, list[Connection]] = {}
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return sum(map(len, self._connections.values()))

    def count(self, user: str) -> int:
        """How many connections a user has."""
        return len(self._connections.get(user, ()))

    def check(self, user: str) -> None:
        """Raise TooManyConnectionsError if a user may not open another connection."""
        if self.count(user) >= self._per_user:
            raise TooManyConnectionsError

    def join(self, user: str, connection: Connection) -> None:
        """Register a connection."""
        self._connections.setdefault(user, []).append(connection)
        if self.count(user) == 1:
            self._announce_change("joined", user)

    def leave(self, user: str, connection: Connection) -> None:
        """Remove a connection."""
        self._connections[user].remove(connection)
        if not self._connections[user]:
            del self._connections[user]
            self._announce_change("left", user)
        if not self._connections:
            self._empty.set()

    def close_user(self, user: str, code: int, reason: str) -> None:
        """Close all connections of a user."""
        for connection in self._connections.get(user, ()):
            connection.close(code, reason)

    def close_session(self, user: str, session: str, code: int, reason: str) -> None:
        """Close the connections that a session of a user has opened."""
        for connection in self._connections.get(user, ()):
            if connection.login_session == session:
                connection.close(code, reason)

    async def close_all(self, code: int, reason: str) -> None:
        """Close all connections, and wait until the last has left."""
        self._announce = False
        self._empty.clear()
        for user in self._connections:
            self.close_user(user, code, reason)
        if self._connections:
            await self._empty.wait()

    def _announce_change(self, change: Change, user: str) -> None:
        for other, connections in self._connections.items() if self._announce else ():
            if other != user:
                for connection in connections:
                    connection.presence_changed(change, user)
