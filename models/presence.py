"""Who is connected, and telling the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from models.refused import Refused

Change = Literal["joined", "left"]
Notify = Callable[[Change, str], None]  # what happened, and to which user


class TooManySockets(Refused):
    """One connection more than a user may have."""

    type = "rate_limit_error"
    code = "too_many_sockets"
    message = "you have too many connections open"


class Presence:
    """The connections of each user, `per_user` at most. Others hear of a user's first one and of the last one's end."""

    def __init__(self, announce: bool, per_user: int) -> None:
        self._announce = announce
        self._per_user = per_user
        self._connections: dict[str, list[Notify]] = {}

    def count(self, user: str) -> int:
        """How many connections a user has."""
        return len(self._connections.get(user, ()))

    def admit(self, user: str) -> None:
        """Nothing, where one more connection may join. Raises TooManySockets."""
        if self.count(user) >= self._per_user:
            raise TooManySockets

    def join(self, user: str, notify: Notify) -> None:
        """Count a connection in; `notify` is called when others come and go."""
        self._connections.setdefault(user, []).append(notify)
        if self.count(user) == 1:
            self._tell("joined", user)

    def leave(self, user: str, notify: Notify) -> None:
        """Count a connection out."""
        self._connections[user].remove(notify)
        if not self._connections[user]:
            del self._connections[user]
            self._tell("left", user)

    def _tell(self, change: Change, user: str) -> None:
        for other, connections in self._connections.items() if self._announce else ():
            if other != user:
                for notify in connections:
                    notify(change, user)
