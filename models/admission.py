"""Who gets a slot, and who waits for one."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from itertools import chain, zip_longest

from models.rates import Rates
from models.refused import Refused
from models.reply import Usage


class QueueFull(Refused):
    """As many replies wait as may."""

    type = "rate_limit_error"
    code = "queue_full"
    retry_after = 5


class TooManyResponses(Refused):
    """The user has as many replies in flight as one may have."""

    type = "rate_limit_error"
    code = "too_many_responses"
    retry_after = 1


class ServerStopping(Refused):
    """The server is about to end, and begins nothing."""

    type = "server_error"
    code = "server_shutdown"
    message = "the server is stopping: try again in a moment"
    retry_after = 5


class Ticket:
    """One reply's place: `position` 0 has a slot, 1 is next. To be given back with `Admission.leave`."""

    def __init__(self, user: str, position: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.user = user
        self.position = position
        self.usage = Usage(0)  # of the reply, to be set by whoever makes it
        self.entered = self.admitted = clock()
        self._clock = clock
        self._moved = asyncio.Event()

    def move(self, position: int) -> None:
        """Take a new position."""
        if position != self.position:
            self.position = position
            self.admitted = self._clock()
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
    """Hands `slots` to replies, to one user's after the other's; `queue` more may wait, `per_user` of each in all.

    However many replies somebody waits for, the first one of anybody else waits for one of them at most.
    """

    def __init__(
        self,
        slots: int,
        queue: int,
        per_user: int,
        rates: Rates | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.free = slots  # below 0 where there are fewer slots than replies that have one
        self.slots = slots
        self.queue = queue
        self.per_user = per_user
        self.in_flight: Counter[str] = Counter()
        self.closed = False
        self._rates = rates
        self._clock = clock
        self._waiting: dict[str, deque[Ticket]] = {}  # by user, whose turn is next first

    @property
    def waiting(self) -> list[Ticket]:
        """Those that wait, who is next first: the first of each user, then the second of each, and so on."""
        rounds = zip_longest(*self._waiting.values())
        return [ticket for ticket in chain.from_iterable(rounds) if ticket]

    def close(self) -> None:
        """Refuse all that come from now on."""
        self.closed = True

    def shrink(self, slots: int) -> None:
        """Hand out fewer slots than before."""
        self.free -= self.slots - slots
        self.slots = slots

    @contextmanager
    def place(self, user: str) -> Iterator[Ticket]:
        """A place for as long as the context lasts. Raises what `enter` does."""
        ticket = self.enter(user)
        try:
            yield ticket
        finally:
            self.leave(ticket)

    def enter(self, user: str) -> Ticket:
        """A place for one more reply; the check and the count are one step.

        Raises ServerStopping, TooManyResponses, QueueFull or RateLimitExceeded.
        """
        waiting = sum(map(len, self._waiting.values()))
        if self.closed:
            raise ServerStopping
        if self.in_flight[user] >= self.per_user:
            raise TooManyResponses(f"{self.per_user} replies are in flight: wait for one to end, or cancel one")
        if self.free <= 0 and waiting >= self.queue:
            raise QueueFull(f"{self.queue} replies wait already: try again later")
        if self._rates:
            self._rates.ask(user)
        self.in_flight[user] += 1
        if self.free > 0:
            self.free -= 1
            return Ticket(user, 0, self._clock)
        ticket = Ticket(user, waiting + 1, self._clock)
        self._waiting.setdefault(user, deque()).append(ticket)
        self._number()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give a place back; who is next gets its slot, and all behind it move up."""
        self.in_flight -= Counter([ticket.user])  # drops users with none
        if ticket.position:
            self._waiting[ticket.user].remove(ticket)
        else:
            self.free += 1
            if self._rates:
                self._rates.spend(ticket.user, ticket.usage.total_tokens)
        self._waiting = {user: tickets for user, tickets in self._waiting.items() if tickets}
        if self._waiting and self.free > 0:
            self._admit_next()
        self._number()

    def _admit_next(self) -> None:
        user = next(iter(self._waiting))
        tickets = self._waiting.pop(user)
        tickets.popleft().move(0)
        self.free -= 1
        if tickets:
            self._waiting[user] = tickets  # behind all others

    def _number(self) -> None:
        for position, ticket in enumerate(self.waiting, start=1):
            ticket.move(position)
