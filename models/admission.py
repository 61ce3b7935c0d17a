"""Who gets a slot, and who waits for one."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from models.refused import Refused


class QueueFull(Refused):
    """As many replies wait as may."""

    type = "rate_limit_error"
    code = "queue_full"


class TooManyResponses(Refused):
    """The user has as many replies in flight as one may have."""

    type = "rate_limit_error"
    code = "too_many_responses"


class Ticket:
    """One reply's place: `position` 0 has a slot, 1 is next. To be given back with `Admission.leave`."""

    def __init__(self, user: str, position: int) -> None:
        self.user = user
        self.position = position
        self._moved = asyncio.Event()

    def move(self, position: int) -> None:
        """Take a new position."""
        self.position = position
        self._moved.set()

    async def turn(self) -> AsyncIterator[int]:
        """The positions while waiting, each new one once; ends when there is a slot."""
        while True:
            self._moved.clear()
            if not self.position:
                return
            yield self.position
            await self._moved.wait()


class Admission:
    """Hands `slots` to replies in the order they came; `queue` more may wait, `per_user` of each user's in all."""

    def __init__(self, slots: int, queue: int, per_user: int) -> None:
        self.free = slots
        self.queue = queue
        self.per_user = per_user
        self.waiting: deque[Ticket] = deque()
        self.in_flight: Counter[str] = Counter()

    @contextmanager
    def place(self, user: str) -> Iterator[Ticket]:
        """A place for as long as the context lasts. Raises TooManyResponses or QueueFull."""
        ticket = self.enter(user)
        try:
            yield ticket
        finally:
            self.leave(ticket)

    def enter(self, user: str) -> Ticket:
        """A place for one more reply. Raises TooManyResponses or QueueFull; the check and the count are one step."""
        if self.in_flight[user] >= self.per_user:
            raise TooManyResponses(f"{self.per_user} replies are in flight: wait for one to end, or cancel one")
        if not self.free and len(self.waiting) >= self.queue:
            raise QueueFull(f"{self.queue} replies wait already: try again later")
        self.in_flight[user] += 1
        if self.free:
            self.free -= 1
            return Ticket(user, 0)
        self.waiting.append(Ticket(user, len(self.waiting) + 1))
        return self.waiting[-1]

    def leave(self, ticket: Ticket) -> None:
        """Give a place back; who is next gets its slot, and all behind it move up."""
        self.in_flight -= Counter([ticket.user])  # drops users with none
        if ticket.position:
            self.waiting.remove(ticket)
        elif self.waiting:
            self.waiting.popleft().move(0)
        else:
            self.free += 1
        for position, behind in enumerate(self.waiting, start=1):
            if behind.position != position:
                behind.move(position)
