"""Who is connected, and telling the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Change = Literal["joined", "left"]
Notify = Callable[[Change, str], None]  # what happened, and to which user


class Presence:
    """The connections of each user. Others hear of a user's first one and of the end of the last."""

    def __init__(self, announce: bool = True) -> None:
        self._announce = announce
        self._connections: dict[str, list[Notify]] = {}

    def count(self, user: str) -> int:
        """How many connections a user has."""
        return len(self._connections.get(user, ()))

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
