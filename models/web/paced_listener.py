"""A listening socket that accepts a few connections at a time."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

BURST = 16  # connections at a time
TURNS = 4  # of the event loop: until an accepted connection is known, and has made room by closing another


class PacedListener(socket.socket):
    """A listening socket that accepts at most `BURST` connections in some turns of the event loop.

    asyncio else accepts thousands at once, which use up all descriptors before the first one is known to anybody.
    """

    _accepted = 0

    @classmethod
    def of(cls, listener: socket.socket) -> PacedListener:
        """Take over a listening socket."""
        return cls(listener.family, listener.type, listener.proto, fileno=listener.detach())

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection and its address. Raises BlockingIOError if there is none, or none at the moment."""
        if self._accepted == BURST:
            raise BlockingIOError
        accepted = super().accept()
        if self._accepted == 0:
            self._wait(TURNS)
        self._accepted += 1
        return accepted

    def __reduce__(self) -> tuple[Any, ...]:
        """How multiprocessing passes it to a worker: as a plain socket. That stays open here meanwhile."""
        self._passed_on = socket.fromfd(self.fileno(), self.family, self.type, self.proto)
        return PacedListener.of, (self._passed_on,)

    def _wait(self, turns: int) -> None:
        if turns == 0:
            self._accepted = 0
        else:
            asyncio.get_running_loop().call_soon(self._wait, turns - 1)
