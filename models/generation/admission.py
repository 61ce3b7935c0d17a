"""Decides which response gets a slot, and which ones wait."""

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
    """The place of one response: at `position` 0 it has a slot, at 1 it is next."""

    def __init__(self, user: str, position: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.user = user
        self.position = position
        self.usage = Usage(0)  # of the reply; the caller sets it
        self._clock = clock
        self._entered = self._admitted = clock()
        self._moved = asyncio.Event()

    @property
    def waited(self) -> float | None:
        """How many seconds it waited for its slot; None while it has no slot."""
        return None if self.position else self._admitted - self._entered

    def move(self, position: int) -> None:
        """Set a new position."""
        if position != self.position:
            self.position = position
            self._admitted = self._clock()
            self._moved.set()

    async def wait(self) -> AsyncIterator[int]:
        """Wait for the slot; yields each new position until then."""
        while True:
            self._moved.clear()
            if not self.position:
                return
            yield self.position
            await self._moved.wait()


class Admission:
    """Gives `slots` to the users in turn. Up to `queue` more responses wait; a user has at most `per_user` in all.

    If many responses of one user wait, another user's first one waits for at most one of them.
    """

    def __init__(
        self,
        slots: int,
        queue: int,
        per_user: int,
        rate_limiter: RateLimiter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.free = slots  # below 0 while more responses have slots than `slots` allows
        self.slots = slots
        self.queue = queue
        self.per_user = per_user
        self.in_flight: Counter[str] = Counter()
        self.closed = False
        self._rate_limiter = rate_limiter or RateLimiter()
        self._clock = clock
        self._waiting: dict[str, deque[Ticket]] = {}  # by user; the next user in turn comes first

    @classmethod
    def of(cls, settings: Settings) -> Admission:
        """An admission with the limits of the settings."""
        rate_limiter = RateLimiter(settings.rate, settings.token_rate)
        return cls(settings.slots, settings.queue, settings.responses_per_user, rate_limiter)

    @property
    def waiting(self) -> list[Ticket]:
        """The tickets that wait, the next one first: the first of each user, then the second of each, and so on."""
        rounds = zip_longest(*self._waiting.values())
        return [ticket for ticket in chain.from_iterable(rounds) if ticket]

    @property
    def running(self) -> int:
        """How many responses have a slot."""
        return self.in_flight.total() - len(self.waiting)

    def close(self) -> None:
        """Refuse all new responses from now on."""
        self.closed = True

    def shrink(self, slots: int) -> None:
        """Give out fewer slots from now on."""
        self.free -= self.slots - slots
        self.slots = slots

    @contextmanager
    def ticket(self, user: str) -> Iterator[Ticket]:
        """A ticket for as long as the context lasts. Raises the errors of `enter`."""
        ticket = self.enter(user)
        try:
            yield ticket
        finally:
            self.leave(ticket)

    def enter(self, user: str) -> Ticket:
        """A ticket for one more response. The check and the count happen in one step.

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
            raise QueueFullError("the wait queue is full: try again later")
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
        """Give a ticket back. The next ticket gets its slot, and all later ones move up."""
        self.in_flight -= Counter([ticket.user])  # drops users who have no ticket left
        if ticket.position:
            self._waiting[ticket.user].remove(ticket)
        else:
            self.free += 1
            self.count_tokens(ticket.user, ticket.usage.total_tokens)
        self._waiting = {user: tickets for user, tickets in self._waiting.items() if tickets}
        if self._waiting and self.free > 0:
            self._admit_next()
        self._renumber()

    def count_tokens(self, user: str, tokens: int) -> None:
        """Count tokens against the user's limit. `leave` does so for replies that had a slot."""
        self._rate_limiter.count_tokens(user, tokens)

    def _admit_next(self) -> None:
        user = next(iter(self._waiting))
        tickets = self._waiting.pop(user)
        tickets.popleft().move(0)
        self.free -= 1
        if tickets:
            self._waiting[user] = tickets  # after all other users

    def _renumber(self) -> None:
        for position, ticket in enumerate(self.waiting, start=1):
            ticket.move(position)
