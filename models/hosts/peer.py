"""Another host, as this one sees it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

from models.errors import ServerUnavailableError
from models.generation.events import Finished, Rejected, ResponseEvent
from models.generation.interface import Follower
from models.hosts.peer_service import PeerService
from models.hub.link import Link
from models.ops.waiting import wait_for_any

logger = logging.getLogger("parley")


class Followed(NamedTuple):
    """A follower here of a response there, and whether that has ended."""

    follower: Follower
    ended: asyncio.Event


class Peer:
    """Follows and ends responses that run on another host, and is what that host may call here.

    All methods raise ServerUnavailableError if the connection is lost.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self._numbers = count(1)
        self._followed: dict[int, Followed] = {}

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

    # What the other host calls

    async def ping(self) -> None:
        """Answer, which shows that this host is well."""

    def on_event(self, listeners: list[int], event: ResponseEvent) -> None:
        """Pass an event on to some followers."""
        for number in listeners:
            if followed := self._followed.get(number):
                if isinstance(event, Finished | Rejected):
                    followed.ended.set()
                try:
                    followed.follower.on_event(event)
                except Exception:  # the others get it all the same
                    logger.exception("unexpected error in a listener")

    async def wait_sent(self, number: int) -> None:
        """Wait until a follower has passed on all events."""
        if followed := self._followed.get(number):
            await followed.follower.wait_sent()
