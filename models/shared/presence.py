"""Which users are connected to other hosts."""

from __future__ import annotations

from collections.abc import Callable


class Presence:
    """The users of the other hosts, `elsewhere`. A host that is alone has none, and tells nobody of its own.

    `on_change` is called with each user who has come to the other hosts, or has left the last one.
    """

    def __init__(self) -> None:
        self.elsewhere: frozenset[str] = frozenset()
        self.on_change: Callable[[str], None] = lambda user: None

    def came(self, user: str) -> None:
        """A user's first connection to this host has opened."""

    def went(self, user: str) -> None:
        """A user's last connection to this host has closed."""
