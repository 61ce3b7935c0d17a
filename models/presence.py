"""Who is connected, and telling the others."""

from __future__ import annotations

import asyncio
from typing import Literal, Protocol

from models.refused import Refused

Change = Literal["joined", "left"]


class TooManySockets(Refused):
    """One connection more than a user may have."""

    type = "rate_limit_error"
    code = "too_many_sockets"
    message = "you have too many connections open"


class Connection(Protocol):
    """One of a user's connections."""

    def notify(self, change: Change, user: str) -> None:
        """Hear what happened, and to which user."""

    def close(self, code: int, reason: str) -> None:
        """Come to an end, without waiting for it."""


class Presence:
    """The connections of each user, `per_user` at most. Others hear of a user's first one and of the last one's end."""

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

    def admit(self, user: str) -> None:
        """Nothing, where one more connection may join. Raises TooManySockets."""
        if self.count(user) >= self._per_user:
            raise TooManySockets

    def join(self, user: str, connection: Connection) -> None:
        """Count a connection in."""
        self._connections.setdefault(user, []).append(connection)
        if self.count(user) == 1:
            self._tell("joined", user)

    def leave(self, user: str, connection: Connection) -> None:
        """Count a connection out."""
        self._connections[user].remove(connection)
        if not self._connections[user]:
            del self._connections[user]
            self._tell("left", user)
        if not self._connections:
            self._empty.set()

    def close(self, user: str, code: int, reason: str) -> None:
        """Close all connections of a user."""
        for connection in self._connections.get(user, ()):
            connection.close(code, reason)

    async def close_all(self, code: int, reason: str) -> None:
        """Close all connections, and wait until the last has left."""
        self._announce = False
        self._empty.clear()
        for user in self._connections:
            self.close(user, code, reason)
        if self._connections:
            await self._empty.wait()

    def _tell(self, change: Change, user: str) -> None:
        for other, connections in self._connections.items() if self._announce else ():
            if other != user:
                for connection in connections:
                    connection.notify(change, user)
