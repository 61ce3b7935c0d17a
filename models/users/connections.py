"""Keeps the connections of users, and notifies other users of changes."""

from __future__ import annotations

import asyncio
import logging
from typing import Literal, Protocol

from limits import aio, parse
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from models.errors import TooManyConnectionsError
from models.shared.presence import Presence
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

    Other users are notified when a user's first connection opens and the last one closes, on any host, unless
    `announce` is False. After some changes in a minute, they hear only what became of the user `pause` seconds later.
    `limits` counts the connections that a user opens, else the memory does.
    """

    def __init__(
        self,
        announce: bool,
        per_user: int,
        limits: aio.storage.Storage | None = None,
        presence: Presence | None = None,
        pause: float = 60.0,
    ) -> None:
        self._announce = announce
        self._per_user = per_user
        self._pause = pause
        self._presence = presence or Presence()
        self._presence.on_change = self._announce_change
        self._opens = aio.strategies.FixedWindowRateLimiter(limits or aio.storage.MemoryStorage())
        self._opened = parse(f"{per_user + CONNECTS}/minute")
        self._joining: list[tuple[str, Connection]] = []  # that are being counted
        self._changes = FixedWindowRateLimiter(MemoryStorage())  # of its own, since each host hears of all changes
        self._connections: dict[str, list[Connection]] = {}
        self._announced = {*self._presence.elsewhere}  # users who are there, as far as the others know
        self._late: dict[str, asyncio.TimerHandle] = {}  # users about whom the others hear later
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return sum(map(len, self._connections.values()))

    def count(self, user: str) -> int:
        """How many connections a user has."""
        return len(self._connections.get(user, ()))

    async def join(self, user: str, connection: Connection) -> None:
        """Register a connection. Raises TooManyConnectionsError if the user may not open one more."""
        if len(self._of(user)) >= self._per_user:
            raise TooManyConnectionsError
        self._joining.append(joining := (user, connection))
        try:
            allowed = await self._opens.hit(self._opened, "opened", user)
        finally:
            self._joining.remove(joining)
        if not allowed:
            raise TooManyConnectionsError("you open connections too often: wait up to a minute")
        self.add(user, connection)

    def add(self, user: str, connection: Connection, announce: bool = True) -> None:
        """Register a connection that no limit applies to. Without `announce`, the others know already."""
        if user not in self._connections:
            self._presence.came(user)
        self._connections.setdefault(user, []).append(connection)
        if announce:
            self._announce_change(user)
        else:
            self._announced.add(user)

    def leave(self, user: str, connection: Connection) -> None:
        """Remove a connection."""
        self._connections[user].remove(connection)
        if not self._connections[user]:
            del self._connections[user]
            self._presence.went(user)
            self._announce_change(user)
        if not self._connections:
            self._empty.set()

    def close_user(self, user: str, code: int, reason: str) -> None:
        """Close all connections of a user."""
        for connection in self._of(user):
            connection.close(code, reason)

    def close_session(self, user: str, session: str, code: int, reason: str) -> None:
        """Close the connections that a session of a user has opened."""
        for connection in self._of(user):
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

    def _of(self, user: str) -> list[Connection]:
        """The connections of a user, also those that are being counted."""
        return [*self._connections.get(user, ()), *(one for owner, one in self._joining if owner == user)]

    def _is_there(self, user: str) -> bool:
        return user in self._connections or user in self._presence.elsewhere

    def _announce_change(self, user: str) -> None:
        """Tell the others whether a user is there, now or later, unless they know it."""
        if not self._announce or user in self._late or self._is_there(user) == (user in self._announced):
            return
        if self._changes.hit(CHANGES, "announced", user):
            self._tell_others(user)
        else:
            self._late[user] = asyncio.get_running_loop().call_later(self._pause, self._announce_late, user)

    def _announce_late(self, user: str) -> None:
        del self._late[user]
        if self._announce and self._is_there(user) != (user in self._announced):
            self._tell_others(user)

    def _tell_others(self, user: str) -> None:
        self._announced ^= {user}
        change: Change = "joined" if user in self._announced else "left"
        for other, connections in self._connections.items():
            if other != user:
                for connection in connections:
                    try:
                        connection.presence_changed(change, user)
                    except Exception:  # the others are notified all the same
                        logger.exception("a client could not be told of a user")
