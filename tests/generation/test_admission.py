from __future__ import annotations

import asyncio
from collections import Counter, deque
from contextlib import suppress
from itertools import chain, zip_longest

import pytest
from hypothesis import given, settings, strategies

from models.errors import (
    QueueFullError,
    RateLimitError,
    RateLimitExceededError,
    ServerStoppingError,
    TooManyResponsesError,
)
from models.generation.admission import Admission, Ticket
from models.generation.rate_limiter import RateLimiter
from models.messages import Usage
from models.settings import Settings
from tests.support.fake_clock import FakeClock
from tests.support.held_storage import HeldStorage

pytestmark = pytest.mark.anyio

PATIENCE = 10  # seconds, for what takes none


async def fill(admission: Admission, user: str) -> int:
    """Let a user enter until that is refused; returns how often it was not."""
    for count in range(10_000):
        try:
            await admission.enter(user)
        except (TooManyResponsesError, QueueFullError):
            return count
    raise AssertionError("nothing is refused")


# Slots and the wait queue


async def test_a_free_slot_is_given_at_once() -> None:
    admission = Admission(slots=2, queue=0, per_user=2)
    assert [(await admission.enter("ann")).position, (await admission.enter("bob")).position] == [0, 0]
    assert (admission.free, admission.running) == (0, 2)


async def test_a_ticket_with_a_slot_does_not_wait() -> None:
    ticket = await Admission(slots=1, queue=0, per_user=1).enter("ann")
    assert [position async for position in ticket.wait()] == []


async def test_a_waiting_ticket_yields_each_new_position_until_its_slot() -> None:
    admission = Admission(slots=1, queue=6, per_user=9)
    first, second, third, last = [await admission.enter("ann") for _ in range(4)]
    positions = aiter(last.wait())
    assert await anext(positions) == 3
    waiting = asyncio.ensure_future(anext(positions))
    admission.leave(first)
    assert await waiting == 2
    admission.leave(second)
    admission.leave(third)  # two moves before anyone looks: the first of them is not yielded
    with pytest.raises(StopAsyncIteration):
        await anext(positions)
    assert last.position == 0


async def test_a_ticket_does_not_move_when_one_behind_it_leaves() -> None:
    admission = Admission(slots=1, queue=6, per_user=9)
    _, second, last = [await admission.enter("ann") for _ in range(3)]
    positions = aiter(second.wait())
    assert await anext(positions) == 1
    admission.leave(last)
    waiting = asyncio.ensure_future(anext(positions))
    await asyncio.sleep(0)  # it looks for a new position
    assert not waiting.done()
    waiting.cancel()


async def test_tickets_behind_one_that_stops_waiting_move_up() -> None:
    admission = Admission(slots=1, queue=6, per_user=9)
    running, _, leaver, last = [await admission.enter("ann") for _ in range(4)]
    admission.leave(leaver)
    assert (running.position, last.position, admission.free) == (0, 2, 0)


async def test_a_slot_that_is_left_before_it_is_used_goes_to_the_next() -> None:
    admission = Admission(slots=1, queue=4, per_user=9)
    first, second, third = [await admission.enter("ann") for _ in range(3)]
    admission.leave(first)
    admission.leave(second)
    assert third.position == 0


async def test_a_full_wait_queue_refuses_the_next_reply() -> None:
    admission = Admission(slots=1, queue=1, per_user=2)
    await admission.enter("ann")
    await admission.enter("ann")
    with pytest.raises(QueueFullError, match="the wait queue is full: try again later") as raised:
        await admission.enter("bob")
    assert (raised.value.status, raised.value.code) == (503, "queue_full")
    assert admission.in_flight["bob"] == 0


# Limits of a user


async def test_replies_over_the_limit_of_their_user_wait_while_slots_are_free() -> None:
    admission = Admission(slots=9, queue=9, per_user=2)
    first, second, third, last = [await admission.enter("ann") for _ in range(4)]
    assert [ticket.position for ticket in (first, second, third, last)] == [0, 0, 1, 2]
    assert (admission.running, admission.free) == (2, 7)
    assert (await admission.enter("bob")).position == 0
    admission.leave(second)
    assert [ticket.position for ticket in (first, third, last)] == [0, 0, 1]
    assert admission.running == 3


async def test_twelve_replies_of_one_user_all_get_a_slot_four_at_a_time() -> None:
    settings = Settings()
    admission = Admission.of(settings)
    running = deque([await admission.enter("ann") for _ in range(12)])
    while running:
        has_slot = [ticket for ticket in running if not ticket.position]
        assert len(has_slot) == min(settings.responses_per_user, len(running))
        assert has_slot == list(running)[: len(has_slot)]
        admission.leave(running.popleft())


async def test_a_user_at_the_limit_is_passed_over_and_keeps_the_turn() -> None:
    admission = Admission(slots=2, queue=9, per_user=1)
    anns = [await admission.enter("ann") for _ in range(3)]
    bob, carla = await admission.enter("bob"), await admission.enter("carla")
    assert [ticket.position for ticket in (*anns, bob, carla)] == [0, 2, 3, 0, 1]
    admission.leave(bob)
    assert (carla.position, anns[1].position) == (0, 1)
    dave = await admission.enter("dave")
    assert (dave.position, anns[1].position) == (1, 2)
    admission.leave(anns[0])
    assert (anns[1].position, dave.position) == (0, 1)


@pytest.mark.parametrize(("queue", "one", "two"), [(256, 128, 86), (1, 1, 1), (2, 1, 1), (9, 5, 3)])
async def test_a_user_may_have_as_many_waiting_as_the_queue_has_places_left(queue: int, one: int, two: int) -> None:
    alone = Admission(slots=1, queue=queue, per_user=1)
    assert await fill(alone, "ann") == one + 1
    shared = Admission(slots=1, queue=queue, per_user=1)
    await shared.enter("carla")
    counts: Counter[str] = Counter()
    for user in ["ann", "bob"] * queue:
        with suppress(TooManyResponsesError, QueueFullError):
            await shared.enter(user)
            counts[user] += 1
    assert max(counts.values()) == two


async def test_a_user_who_waits_for_nothing_gets_one_of_the_last_places() -> None:
    admission = Admission(slots=1, queue=8, per_user=9)
    for user in ("ann", "bob"):
        await fill(admission, user)
    assert len(admission.waiting) == 6
    assert (await admission.enter("carla")).position == 3


async def test_a_user_over_the_share_of_the_queue_is_refused() -> None:
    admission = Admission(slots=9, queue=2, per_user=1)
    running, _ = await admission.enter("ann"), await admission.enter("ann")
    with pytest.raises(TooManyResponsesError, match="you have 2 replies running or waiting") as raised:
        await admission.enter("ann")
    assert (raised.value.status, raised.value.code) == (429, "too_many_responses")
    assert admission.in_flight["ann"] == 2
    admission.leave(running)
    assert (await admission.enter("ann")).position == 1


async def test_without_a_queue_the_limit_of_a_user_refuses() -> None:
    admission = Admission(slots=9, queue=0, per_user=1)
    await admission.enter("ann")
    with pytest.raises(TooManyResponsesError):
        await admission.enter("ann")
    assert (await admission.enter("bob")).position == 0


# When to try again


async def retry_after(admission: Admission, user: str) -> int | None:
    with pytest.raises(RateLimitError) as raised:
        await admission.enter(user)
    return raised.value.retry_after


async def test_a_refusal_says_when_one_of_the_running_replies_ends() -> None:
    clock = FakeClock()
    admission = Admission(slots=4, queue=1, per_user=2, clock=clock)
    for _ in range(100):  # replies that take 20 s
        ticket = await admission.enter("ann")
        clock.now += 20
        admission.leave(ticket)
        clock.now += 3600  # idle time does not count
    for user in ("ann", "ann", "bob", "carla", "dave"):
        await admission.enter(user)
    assert await retry_after(admission, "eve") == 5  # 20 s, and 4 replies run
    admission.leave(admission.waiting[0])
    await admission.enter("ann")
    assert await retry_after(admission, "ann") == 10  # 20 s, and 2 replies of hers run


async def test_the_time_to_try_again_follows_the_last_replies() -> None:
    clock = FakeClock()
    admission = Admission(slots=1, queue=0, per_user=1, clock=clock)
    told = []
    for seconds in (0, *[30] * 40, *[600] * 40, *[0] * 80):
        ticket = await admission.enter("ann")
        clock.now += seconds
        told.append(await retry_after(admission, "bob"))
        admission.leave(ticket)
    assert (told[0], told[40], told[80], told[-1]) == (5, 30, 60, 1)


async def test_the_wait_for_a_slot_is_no_time_of_a_reply() -> None:
    clock = FakeClock()
    admission = Admission(slots=1, queue=1, per_user=9, clock=clock)
    for _ in range(40):
        first, second = await admission.enter("ann"), await admission.enter("bob")
        clock.now += 3.5
        admission.leave(first)
        clock.now += 3.5
        admission.leave(second)
    await admission.enter("ann")
    await admission.enter("bob")
    assert await retry_after(admission, "carla") == 4


# Tickets


async def test_a_ticket_is_given_back_at_the_end_of_its_context() -> None:
    admission = Admission(slots=1, queue=1, per_user=1)
    async with admission.ticket("ann") as first:
        waiting = await admission.enter("bob")
        assert (first.user, first.position, waiting.position) == ("ann", 0, 1)
        assert dict(admission.in_flight) == {"ann": 1, "bob": 1}
    assert (waiting.position, admission.free) == (0, 0)
    assert dict(admission.in_flight) == {"bob": 1}


@pytest.mark.parametrize("failure", [ValueError, asyncio.CancelledError], ids=["error", "cancelled"])
async def test_a_ticket_is_given_back_after_a_failure(failure: type[BaseException]) -> None:
    admission = Admission(slots=1, queue=0, per_user=1)
    with pytest.raises(failure):
        async with admission.ticket("ann"):
            raise failure
    assert (admission.free, dict(admission.in_flight)) == (1, {})


@pytest.mark.parametrize(
    ("user", "error"),
    [("ann", TooManyResponsesError), ("bob", QueueFullError)],
    ids=["user limit", "full queue"],
)
async def test_a_refused_ticket_is_not_given_back(user: str, error: type[Exception]) -> None:
    admission = Admission(slots=1, queue=0, per_user=1)
    async with admission.ticket("ann"):
        with pytest.raises(error):
            async with admission.ticket(user):
                pytest.fail("there is no ticket")
        assert (admission.free, dict(admission.in_flight)) == (0, {"ann": 1})
    assert admission.free == 1


async def test_a_ticket_knows_how_long_it_waited_for_its_slot() -> None:
    clock = FakeClock()
    admission = Admission(slots=1, queue=1, per_user=9, clock=clock)
    first, second = await admission.enter("ann"), await admission.enter("ann")
    clock.now += 3
    assert (first.waited, second.waited) == (0, None)
    admission.leave(first)
    clock.now += 5
    assert second.waited == 3


# Fairness


steps = strategies.lists(
    strategies.tuples(strategies.sampled_from(["ann", "bob", "carla", "leave"]), strategies.integers(0, 9))
)


@settings(max_examples=500, deadline=None)
@given(steps, strategies.integers(1, 4), strategies.integers(0, 5), strategies.integers(1, 3))
async def test_slots_are_given_to_waiting_users_in_turn(
    steps: list[tuple[str, int]], slots: int, queue: int, per_user: int
) -> None:
    admission = Admission(slots, queue, per_user)
    running: list[Ticket] = []
    waiting: list[list[Ticket]] = []  # a line for each user; the user whose turn is next comes first

    def room(user: str) -> int:
        return per_user - sum(ticket.user == user for ticket in running)

    for user, index in steps:
        if user != "leave":
            own = next((line for line in waiting if line[0].user == user), [])
            left = queue - sum(map(len, waiting))
            has_slot = len(running) < slots and room(user) > 0
            try:
                ticket = await admission.enter(user)
            except TooManyResponsesError:
                assert not has_slot
                assert len(own) >= left
                assert own or not room(user)
            except QueueFullError:
                assert (len(running), left, own) == (slots, 0, [])
                assert room(user)
            else:
                if has_slot:
                    running.append(ticket)
                elif own:
                    own.append(ticket)
                else:
                    waiting.append([ticket])
                assert has_slot or len(own) <= left
        elif tickets := [*running, *chain.from_iterable(waiting)]:
            leaver = tickets[index % len(tickets)]
            admission.leave(leaver)
            running = [ticket for ticket in running if ticket is not leaver]
            waiting = [[ticket for ticket in line if ticket is not leaver] for line in waiting]
            waiting = [line for line in waiting if line]
            while len(running) < slots and (line := next((one for one in waiting if room(one[0].user)), None)):
                waiting.remove(line)
                running.append(line.pop(0))
                waiting += [line] if line else []
        parts = (
            [line[: room(line[0].user)] for line in waiting],  # the others wait for replies of their own user
            [line[room(line[0].user) :] for line in waiting],
        )
        order = [ticket for lines in parts for turn in zip_longest(*lines) for ticket in turn if ticket]
        assert [ticket.position for ticket in running] == [0] * len(running)
        assert [ticket.position for ticket in order] == list(range(1, len(order) + 1))
        assert admission.waiting == order
        assert (admission.running, admission.free) == (len(running), slots - len(running))
        assert dict(admission.in_flight) == Counter(ticket.user for ticket in [*running, *order])
        assert max(admission.in_flight.values(), default=0) <= per_user + queue


@pytest.mark.parametrize("slots", [1, 3])
async def test_a_single_request_waits_for_at_most_one_of_another_users_hundred(slots: int) -> None:
    admission = Admission(slots, queue=200, per_user=200)
    anns = [await admission.enter("ann") for _ in range(100)]
    bobs = await admission.enter("bob")
    assert bobs.position == 2
    running = anns[:slots]
    admission.leave(running.pop(0))
    assert (sum(not ticket.position for ticket in anns), bobs.position) == (slots + 1, 1)
    admission.leave(running.pop(0) if running else next(ticket for ticket in anns[1:] if not ticket.position))
    assert bobs.position == 0


async def test_a_ticket_that_is_overtaken_yields_its_new_position() -> None:
    admission = Admission(slots=1, queue=9, per_user=9)
    _, _, third = [await admission.enter("ann") for _ in range(3)]
    positions = aiter(third.wait())
    assert await anext(positions) == 2
    await admission.enter("bob")
    assert await anext(positions) == 3


# Fewer slots, closing, rate limits


async def test_after_a_shrink_nobody_is_admitted_until_enough_replies_have_ended() -> None:
    admission = Admission(slots=4, queue=9, per_user=9)
    running = [await admission.enter("ann") for _ in range(4)]
    waiting = await admission.enter("bob")
    admission.shrink(2)
    assert admission.slots == 2
    for left in (3, 2):
        admission.leave(running.pop())
        assert (len(running), waiting.position) == (left, 1)
    admission.leave(running.pop())
    assert waiting.position == 0
    admission.leave(waiting)
    admission.leave(running.pop())
    assert admission.free == 2


async def test_a_closed_admission_refuses_new_replies_and_serves_the_old_ones() -> None:
    admission = Admission(slots=1, queue=1, per_user=9)
    running, waiting = await admission.enter("ann"), await admission.enter("bob")
    admission.close()
    with pytest.raises(ServerStoppingError) as raised:
        await admission.enter("ann")
    assert (raised.value.code, dict(admission.in_flight)) == ("server_shutdown", {"ann": 1, "bob": 1})
    admission.leave(running)
    assert waiting.position == 0


async def test_a_user_over_the_request_limit_is_told_when_to_retry() -> None:
    admission = Admission(slots=9, queue=0, per_user=9, rate_limiter=RateLimiter(requests="2/hour"))
    admission.leave(await admission.enter("ann"))
    admission.leave(await admission.enter("ann"))
    with pytest.raises(RateLimitExceededError, match="2 requests per 1 hour") as raised:
        await admission.enter("ann")
    assert raised.value.retry_after is not None
    assert 3500 < raised.value.retry_after <= 3600
    assert (admission.free, dict(admission.in_flight)) == (9, {})
    assert (await admission.enter("bob")).position == 0


async def test_a_request_that_is_refused_for_lack_of_room_is_not_counted() -> None:
    admission = Admission(slots=1, queue=0, per_user=1, rate_limiter=RateLimiter(requests="2/hour"))
    running = await admission.enter("ann")
    for _ in range(3):
        with pytest.raises(TooManyResponsesError):
            await admission.enter("ann")
    admission.leave(running)
    await admission.enter("ann")


async def test_a_user_over_the_token_limit_is_refused() -> None:
    admission = Admission(slots=2, queue=1, per_user=9, rate_limiter=RateLimiter(tokens="100/day"))
    for output in (20, 50):
        async with admission.ticket("ann") as ticket:
            ticket.usage = Usage(input_tokens=20, output_tokens=output)
    with pytest.raises(RateLimitExceededError, match="100 tokens per 1 day"):
        await admission.enter("ann")
    assert (await admission.enter("bob")).position == 0


async def test_a_reply_that_never_had_a_slot_costs_no_tokens() -> None:
    admission = Admission(slots=1, queue=1, per_user=9, rate_limiter=RateLimiter(tokens="100/day"))
    await admission.enter("ann")
    async with admission.ticket("ann") as waiting:
        waiting.usage = Usage(input_tokens=1000)
    assert (await admission.enter("ann")).position == 1


async def test_the_limits_of_an_admission_are_those_of_the_settings() -> None:
    admission = Admission.of(Settings(slots=2, queue=1, responses_per_user=3, rate="4/day", token_rate="5/day"))
    assert (admission.slots, admission.queue, admission.per_user) == (2, 1, 3)
    async with admission.ticket("ann") as ticket:
        ticket.usage = Usage(input_tokens=5)
    with pytest.raises(RateLimitExceededError, match="5 tokens per 1 day"):
        await admission.enter("ann")
    for _ in range(4):
        admission.leave(await admission.enter("bob"))
    with pytest.raises(RateLimitExceededError, match="4 requests per 1 day"):
        await admission.enter("bob")


# While a request is being counted


def counting_slowly(slots: int, queue: int, requests: str = "9/hour") -> tuple[Admission, HeldStorage]:
    """An admission that counts requests when the test wants it."""
    storage = HeldStorage()
    return Admission(slots, queue, per_user=9, rate_limiter=RateLimiter(requests, storage=storage)), storage


async def test_a_request_that_is_being_counted_keeps_its_slot() -> None:
    admission, storage = counting_slowly(slots=1, queue=0)
    entering = asyncio.create_task(admission.enter("ann"))
    await storage.asked.wait()
    with pytest.raises(QueueFullError):
        await admission.enter("bob")
    storage.may_count.set()
    assert (await entering).position == 0
    assert dict(admission.in_flight) == {"ann": 1}


async def test_a_request_that_is_being_counted_keeps_its_place_in_the_queue() -> None:
    admission, storage = counting_slowly(slots=0, queue=2)
    entering = asyncio.create_task(admission.enter("ann"))
    await storage.asked.wait()
    with pytest.raises(TooManyResponsesError):
        await asyncio.wait_for(admission.enter("ann"), PATIENCE)
    storage.may_count.set()
    bob = await admission.enter("bob")
    assert ((await entering).position, bob.position, admission.waiting) == (2, 1, [bob, entering.result()])


async def test_simultaneous_requests_exceed_neither_the_slots_nor_the_queue_nor_the_limit() -> None:
    admission, storage = counting_slowly(slots=2, queue=4, requests="3/hour")
    users = [f"user {number}" for number in range(5)] * 4
    entering = asyncio.gather(*[admission.enter(user) for user in users], return_exceptions=True)
    await storage.asked.wait()
    storage.may_count.set()
    entered = [ticket for ticket in await entering if isinstance(ticket, Ticket)]
    assert len(entered) == 6
    assert (admission.running, len(admission.waiting), admission.free) == (2, 4, 0)
    for ticket in entered:
        admission.leave(ticket)
    assert await fill_until_refused(admission, "user 0") == 3 - [ticket.user for ticket in entered].count("user 0")


async def fill_until_refused(admission: Admission, user: str) -> int:
    """How many requests of a user are allowed, one after the other."""
    for count in range(100):
        try:
            admission.leave(await admission.enter(user))
        except RateLimitExceededError:
            return count
    raise AssertionError("nothing is refused")


async def test_a_slot_that_becomes_free_meanwhile_goes_to_the_request_that_was_counted() -> None:
    admission, storage = counting_slowly(slots=1, queue=2)
    storage.may_count.set()
    running = await admission.enter("ann")
    storage.may_count.clear()
    storage.asked.clear()
    entering = asyncio.create_task(admission.enter("bob"))
    await storage.asked.wait()
    admission.leave(running)
    storage.may_count.set()
    assert (await entering).position == 0
    assert (admission.running, admission.free) == (1, 0)


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "over the limit"])
@pytest.mark.parametrize("slots", [1, 0], ids=["slot", "queue"])
async def test_a_request_that_does_not_count_gives_its_place_back(slots: int, cancelled: bool) -> None:
    admission, storage = counting_slowly(slots, queue=2, requests="1/hour")
    storage.may_count.set()
    admission.leave(await admission.enter("ann"))
    storage.may_count.clear()
    storage.asked.clear()
    entering = asyncio.create_task(admission.enter("ann"))
    await storage.asked.wait()
    if cancelled:
        entering.cancel()
    storage.may_count.set()
    with pytest.raises(asyncio.CancelledError if cancelled else RateLimitExceededError):
        await entering
    assert (admission.free, dict(admission.in_flight), admission.waiting) == (slots, {}, [])
    assert (await admission.enter("bob")).position == 1 - slots


async def test_a_request_that_is_refused_hands_its_slot_to_one_that_came_meanwhile() -> None:
    admission, storage = counting_slowly(slots=1, queue=2, requests="1/hour")
    storage.may_count.set()
    admission.leave(await admission.enter("ann"))
    storage.may_count.clear()
    storage.asked.clear()
    anns = asyncio.create_task(admission.enter("ann"))
    await storage.asked.wait()
    bobs = asyncio.create_task(admission.enter("bob"))
    storage.may_count.set()
    with pytest.raises(RateLimitExceededError):
        await anns
    assert (await bobs).position == 0


async def test_the_tokens_of_a_reply_count_although_it_is_cancelled_twice() -> None:
    storage = HeldStorage()
    limiter = RateLimiter(tokens="10/day", storage=storage)
    admission = Admission(slots=1, queue=0, per_user=9, rate_limiter=limiter)

    async def reply() -> None:
        async with admission.ticket("ann") as ticket:
            ticket.usage = Usage(10)
            await asyncio.Event().wait()

    replying = asyncio.create_task(reply())
    await asyncio.sleep(0)
    replying.cancel()
    await storage.asked.wait()
    replying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await replying
    storage.may_count.set()
    await asyncio.wait_for(storage.counted.wait(), PATIENCE)
    with pytest.raises(RateLimitExceededError, match="tokens"):
        await admission.enter("ann")
