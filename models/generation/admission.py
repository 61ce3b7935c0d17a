"""Decides which response gets a slot, and which ones wait."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import chain, islice, zip_longest

from limits.aio.storage import Storage

from models.errors import QueueFullError, ServerStoppingError, TooManyResponsesError
from models.generation.rate_limiter import RateLimiter
from models.messages import Usage
from models.settings import Settings

USUAL_SECONDS = 5.0  # how long a reply has its slot, as long as none has ended yet
WEIGHT = 1 / 8  # of the last reply, in the mean of how long replies have their slots
MAX_RETRY_SECONDS = 60


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

    @property
    def held(self) -> float:
        """For how many seconds it has had its slot."""
        return self._clock() - self._admitted

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
    """Gives `slots` to the users in turn, at most `per_user` to each. Up to `queue` more responses wait.

    A user whose limit is reached is passed over, and keeps the turn. If many responses of one user wait, another user's
    first one waits for at most one of them. As many of one user may wait as the queue has places left, so that no user
    fills it: alone, half of it (Choudhury and Hahne, "Dynamic queue length thresholds", 1998).
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
        self._entering: Counter[str] = Counter()  # requests that will wait, and keep a place while they are counted
        self._seconds_held = USUAL_SECONDS  # how long a reply has its slot: a moving mean

    @classmethod
    def of(cls, settings: Settings, storage: Storage | None = None) -> Admission:
        """An admission with the limits of the settings; `storage` counts requests and tokens, else the memory does."""
        rate_limiter = RateLimiter(settings.rate, settings.token_rate, storage)
        return cls(settings.slots, settings.queue, settings.responses_per_user, rate_limiter)

    @property
    def waiting(self) -> list[Ticket]:
        """The tickets that wait, the next one first: the first of each user, then the second of each, and so on.

        Those that wait for a reply of their own user come last.
        """
        next_ones = {user: self._room_of(user) for user in self._waiting}
        return [
            *_in_turn(islice(tickets, next_ones[user]) for user, tickets in self._waiting.items()),
            *_in_turn(islice(tickets, next_ones[user], None) for user, tickets in self._waiting.items()),
        ]

    @property
    def running(self) -> int:
        """How many responses have a slot."""
        return self.in_flight.total() - sum(map(len, self._waiting.values()))

    def close(self) -> None:
        """Refuse all new responses from now on."""
        self.closed = True

    def shrink(self, slots: int) -> None:
        """Give out fewer slots from now on."""
        self.free -= self.slots - slots
        self.slots = slots

    @asynccontextmanager
    async def ticket(self, user: str) -> AsyncIterator[Ticket]:
        """A ticket for as long as the context lasts; then the tokens of its reply count. Raises what `enter` raises."""
        ticket = await self.enter(user)
        try:
            yield ticket
        finally:
            self.leave(ticket)
            if not ticket.position:  # a reply that never had a slot spends no tokens
                # The shield: a second cancellation must not save tokens.
                await asyncio.shield(self.count_tokens(user, ticket.usage.total_tokens))

    async def enter(self, user: str) -> Ticket:
        """A ticket for one more response. While its request is counted, it keeps its slot or its place in the queue.

        So only requests that have a place count, and simultaneous ones cannot take the same place. Raises
        ServerStoppingError, TooManyResponsesError, QueueFullError or RateLimitExceededError.
        """
        if self.closed:
            raise ServerStoppingError
        if self.free > 0 and self._room_of(user) > 0:
            return await self._enter_slot(user)
        self._check_queue(user)
        return await self._enter_queue(user)

    def leave(self, ticket: Ticket) -> None:
        """Give a ticket back. The next ticket gets its slot, and all later ones move up."""
        if ticket.position:
            self._waiting[ticket.user].remove(ticket)
        else:
            self.free += 1
            self._seconds_held += (ticket.held - self._seconds_held) * WEIGHT
        self._remove(ticket.user)

    async def count_tokens(self, user: str, tokens: int) -> None:
        """Count tokens against the user's limit. `ticket` does so for replies that had a slot."""
        await self._rate_limiter.count_tokens(user, tokens)

    async def _enter_slot(self, user: str) -> Ticket:
        self.free -= 1
        self.in_flight[user] += 1
        try:
            await self._rate_limiter.count_request(user)
        except BaseException:
            self.free += 1
            self._remove(user)
            raise
        return Ticket(user, 0, self._clock)

    async def _enter_queue(self, user: str) -> Ticket:
        self._entering[user] += 1
        try:
            await self._rate_limiter.count_request(user)
        finally:
            self._entering -= Counter([user])
        self.in_flight[user] += 1
        ticket = Ticket(user, self._queued + 1, self._clock)
        self._waiting.setdefault(user, deque()).append(ticket)
        self._admit()  # a slot may have become free meanwhile
        self._renumber()
        return ticket

    def _remove(self, user: str) -> None:
        """Forget one ticket of a user, and let the others move up."""
        self.in_flight -= Counter([user])  # drops users who have no ticket left
        self._waiting = {user: tickets for user, tickets in self._waiting.items() if tickets}
        self._admit()
        self._renumber()

    @property
    def _queued(self) -> int:
        return sum(map(len, self._waiting.values())) + self._entering.total()

    def _running_of(self, user: str) -> int:
        return self.in_flight[user] - len(self._waiting.get(user, ()))

    def _room_of(self, user: str) -> int:
        """How many more slots a user may have at the moment."""
        return max(0, self.per_user - self._running_of(user))

    def _check_queue(self, user: str) -> None:
        """Raise TooManyResponsesError or QueueFullError if one more response of a user may not wait."""
        own, left = len(self._waiting.get(user, ())) + self._entering[user], self.queue - self._queued
        if own < left:
            return
        if own or not self._room_of(user):
            raise TooManyResponsesError(
                f"you have {self.in_flight[user]} replies running or waiting: wait for one to end, or cancel one",
                self._seconds_until_one_ends(self._running_of(user)),
            )
        raise QueueFullError("the wait queue is full: try again later", self._seconds_until_one_ends(self.running))

    def _seconds_until_one_ends(self, running: int) -> int:
        """After how many seconds one of some running replies ends, if they last as long as the last ones did."""
        return min(MAX_RETRY_SECONDS, max(1, math.ceil(self._seconds_held / max(1, running))))

    def _admit(self) -> None:
        """Give the free slots to the users in turn."""
        while self.free > 0 and (user := next(filter(self._room_of, self._waiting), None)):
            self._waiting[user].popleft().move(0)
            self.free -= 1
            if tickets := self._waiting.pop(user):
                self._waiting[user] = tickets  # after all other users

    def _renumber(self) -> None:
        for position, ticket in enumerate(self.waiting, start=1):
            ticket.move(position)


def _in_turn(lines: Iterable[Iterable[Ticket]]) -> list[Ticket]:
    """The first of each line, then the second of each, and so on."""
    return [ticket for ticket in chain.from_iterable(zip_longest(*lines)) if ticket]
