"""Keeps the connections of users, and notifies other users of changes."""

from __future__ import annotations

import asyncio
import logging
from typing import Literal, Protocol

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from models.errors import TooManyConnectionsError
from models.store.conversations import Conversation

logger = logging.getLogger("parley")

Change = Literal["joined", "left"]

CONNECTS = 60  # how many more connections than `per_user` a user may open in a minute
CHANGES = parse("6/minute")  # that others hear of at once


class Connection(Protocol):
    """A WebSocket of a user; `login_session` is the id of the browser's session, if its cookie opened it."""

    @property
    def login_session(self) -> str | None: ...

    def presence_changed(self, change: Change, user: str) -> None:
        """Notify the client that another user has joined or left."""

    def conversation_changed(self, id: str, conversation: Conversation | None) -> None:
        """Notify the client that a conversation of its user has changed; None: that it is deleted."""

    def close(self, code: int, reason: str) -> None:
        """Close the connection, without waiting for it."""


class ConnectionRegistry:
    """The connections of each user, at most `per_user` at once, and not many more in a minute.

    Other users are notified when a user's first connection opens and the last one closes, unless `announce` is False.
    After some changes in a minute, they hear only what became of the user `pause` seconds later.
    """

    def __init__(self, announce: bool, per_user: int, pause: float = 60.0) -> None:
        self._announce = announce
        self._per_user = per_user
        self._pause = pause
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._opened = parse(f"{per_user + CONNECTS}/minute")
        self._connections: dict[str, list[Connection]] = {}
        self._announced: set[str] = set()  # users who are there, as far as the others know
        self._late: dict[str, asyncio.TimerHandle] = {}  # users about whom the others hear later
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return sum(map(len, self._connections.values()))

    def count(self, user: str) -> int:
        """How many connections a user has."""
        return len(self._connections.get(user, ()))

    def check(self, user: str) -> None:
        """Count a new connection of a user. Raises TooManyConnectionsError if it is not allowed."""
        if self.count(user) >= self._per_user:
            raise TooManyConnectionsError
        if not self._limiter.hit(self._opened, "opened", user):
            raise TooManyConnectionsError("you open connections too often: wait up to a minute")

    def join(self, user: str, connection: Connection) -> None:
        """Register a connection."""
        self._connections.setdefault(user, []).append(connection)
        self._announce_change(user)

    def leave(self, user: str, connection: Connection) -> None:
        """Remove a connection."""
        self._connections[user].remove(connection)
        if not self._connections[user]:
            del self._connections[user]
            self._announce_change(user)
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

    def conversation_changed(self, user: str, id: str, conversation: Conversation | None) -> None:
        """Notify all clients of a user that a conversation has changed; None: that it is deleted."""
        for connection in [*self._connections.get(user, ())]:
            try:
                connection.conversation_changed(id, conversation)
            except Exception:  # the others are notified all the same
                logger.exception("a client could not be told of a change")

    async def close_all(self, code: int, reason: str) -> None:
        """Close all connections, and wait until the last has left."""
        self._announce = False
        self._empty.clear()
        for user in self._connections:
            self.close_user(user, code, reason)
        if self._connections:
            await self._empty.wait()

    def _announce_change(self, user: str) -> None:
        """Tell the others whether a user is there, now or later, unless they know it."""
        if not self._announce or user in self._late or (user in self._connections) == (user in self._announced):
            return
        if self._limiter.hit(CHANGES, "announced", user):
            self._tell_others(user)
        else:
            self._late[user] = asyncio.get_running_loop().call_later(self._pause, self._announce_late, user)

    def _announce_late(self, user: str) -> None:
        del self._late[user]
        if self._announce and (user in self._connections) != (user in self._announced):
            self._tell_others(user)

    def _tell_others(self, user: str) -> None:
        self._announced ^= {user}
        change: Change = "joined" if user in self._announced else "left"
        for other, connections in self._connections.items():
            if other != user:
                for connection in connections:
                    connection.presence_changed(change, user)
