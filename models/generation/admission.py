"""Which reply gets a slot, and which ones wait for one."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from itertools import chain, zip_longest

from models.errors import QueueFullError, ServerStoppingError, TooManyResponsesError
from models.generation.rate_limiter import RateLimiter
from models.messages import Usage
from models.settings import Settings


class Ticket:
    """The place of one reply: at `position` 0 it has a slot, at 1 it is next."""

    def __init__(self, user: str, position: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.user = user
        self.position = position
        self.usage = Usage(0)  # of the reply; whoever runs it sets this
        self._clock = clock
        self._entered = self._admitted = clock()
        self._moved = asyncio.Event()

    @property
    def waited(self) -> float | None:
        """How many seconds it waited for its slot; None while it has none."""
        return None if self.position else self._admitted - self._entered

    def move(self, position: int) -> None:
        """Set a new position."""
        if position != self.position:
            self.position = position
            self._admitted = self._clock()
            self._moved.set()

    async def wait(self) -> AsyncIterator[int]:
        """Wait for the slot; yields each new position on the way."""
        while True:
            self._moved.clear()
            if not self.position:
                return
            yield self.position
            await self._moved.wait()


class Admission:
    """Hands out `slots` to the users in turn. Up to `queue` more replies wait; a user has `per_user` replies in all.

    However many replies of one user wait, the first one of another user waits for one of them at most.
    """

    def __init__(
        self,
        slots: int,
        queue: int,
        per_user: int,
        rate_limiter: RateLimiter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.free = slots  # below 0 while more replies have slots than there are
        self.slots = slots
        self.queue = queue
        self.per_user = per_user
        self.in_flight: Counter[str] = Counter()
        self.closed = False
        self._rate_limiter = rate_limiter
        self._clock = clock
        self._waiting: dict[str, deque[Ticket]] = {}  # by user; the user whose turn is next comes first

    @classmethod
    def of(cls, settings: Settings) -> Admission:
        """An admission as the settings want it."""
        rates = RateLimiter(settings.rate, settings.token_rate) if settings.rate or settings.token_rate else None
        return cls(settings.slots, settings.queue, settings.responses_per_user, rates)

    @property
    def waiting(self) -> list[Ticket]:
        """The tickets that wait, the next one first: the first of each user, then the second of each, and so on."""
        rounds = zip_longest(*self._waiting.values())
        return [ticket for ticket in chain.from_iterable(rounds) if ticket]

    @property
    def running(self) -> int:
        """How many replies have a slot."""
        return self.in_flight.total() - len(self.waiting)

    def close(self) -> None:
        """Refuse all new replies from now on."""
        self.closed = True

    def shrink(self, slots: int) -> None:
        """Hand out fewer slots from now on."""
        self.free -= self.slots - slots
        self.slots = slots

    @contextmanager
    def ticket(self, user: str) -> Iterator[Ticket]:
        """A ticket for as long as the context lasts. Raises what `enter` raises."""
        ticket = self.enter(user)
        try:
            yield ticket
        finally:
            self.leave(ticket)

    def enter(self, user: str) -> Ticket:
        """A ticket for one more reply; the check and the count are one step.

        Raises ServerStoppingError, TooManyResponsesError, QueueFullError or RateLimitExceededError.
        """
        waiting = sum(map(len, self._waiting.values()))
        if self.closed:
            raise ServerStoppingError
        if self.in_flight[user] >= self.per_user:
            raise TooManyResponsesError(
                f"you have {self.per_user} replies running or waiting: wait for one to end, or cancel one"
            )
        if self.free <= 0 and waiting >= self.queue:
            raise QueueFullError(f"the wait queue is full with {self.queue} replies: try again later")
        if self._rate_limiter:
            self._rate_limiter.count_request(user)
        self.in_flight[user] += 1
        if self.free > 0:
            self.free -= 1
            return Ticket(user, 0, self._clock)
        ticket = Ticket(user, waiting + 1, self._clock)
        self._waiting.setdefault(user, deque()).append(ticket)
        self._renumber()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give a ticket back. The next one gets its slot, and all behind it move up."""
        self.in_flight -= Counter([ticket.user])  # drops users who have none left
        if ticket.position:
            self._waiting[ticket.user].remove(ticket)
        else:
            self.free += 1
            if self._rate_limiter:
                self._rate_limiter.count_tokens(ticket.user, ticket.usage.total_tokens)
        self._waiting = {user: tickets for user, tickets in self._waiting.items() if tickets}
        if self._waiting and self.free > 0:
            self._admit_next()
        self._renumber()

    def _admit_next(self) -> None:
        user = next(iter(self._waiting))
        tickets = self._waiting.pop(user)
        tickets.popleft().move(0)
        self.free -= 1
        if tickets:
            self._waiting[user] = tickets  # behind all other users

    def _renumber(self) -> None:
        for position, ticket in enumerate(self.waiting, start=1):
            ticket.move(position)
