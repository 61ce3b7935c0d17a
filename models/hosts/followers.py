"""Followers here of responses on another host."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import NamedTuple

from models.generation.events import Finished, Rejected, ResponseEvent
from models.generation.interface import Follower

logger = logging.getLogger("parley")


class Followed(NamedTuple):
    """A follower of one response, and whether that has ended."""

    follower: Follower
    ended: asyncio.Event


class Followers:
    """What another host may call here: it knows the followers of its responses by numbers."""

    def __init__(self, followed: Mapping[int, Followed]) -> None:
        self._followed = followed

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

    async def wait_sent(self, listener: int) -> None:
        """Wait until a follower has passed on all events."""
        if followed := self._followed.get(listener):
            await followed.follower.wait_sent()
