"""Another host, as this one sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count

from models.errors import ServerUnavailableError
from models.generation.interface import Follower
from models.hosts.followers import Followed
from models.hosts.peer_service import PeerService
from models.hub.link import Link
from models.ops.waiting import wait_for_any


class Peer:
    """Follows and ends responses that run on another host. `followed` has the followers here, by number.

    All methods raise ServerUnavailableError if the connection is lost.
    """

    def __init__(self, link: Link, followed: dict[int, Followed]) -> None:
        self.link = link
        self._numbers = count(1)
        self._followed = followed

    async def follow(self, user: str, id: str, follower: Follower, on_caught_up: Callable[[], None]) -> None:
        """Send a follower all events of a response, until it has ended.

        `on_caught_up` is called after the past ones. Raises ResponseNotFoundError if it does not run there.
        """
        number, ended = next(self._numbers), asyncio.Event()
        self._followed[number] = Followed(follower, ended)
        try:
            await self.link.call(PeerService.follow, user, id, number)
            on_caught_up()
            await wait_for_any(ended.wait, self.link.lost.wait)
        finally:
            del self._followed[number]
            self.link.try_tell(PeerService.leave, number)
        if not ended.is_set():
            raise ServerUnavailableError

    async def cancel(self, user: str, id: str, steered: bool) -> None:
        """End a response. Raises ResponseNotFoundError if it does not run there."""
        await self.link.call(PeerService.cancel, user, id, steered)

    async def wait_ended(self, user: str, id: str) -> None:
        """Wait until a response has ended."""
        await self.link.call(PeerService.wait_ended, user, id)

    async def end(self, user: str, id: str) -> None:
        """End a response that is about to be deleted, and wait until it has ended."""
        await self.link.call(PeerService.end, user, id)
