from __future__ import annotations

import asyncio
from collections import Counter
from itertools import chain, zip_longest

import pytest
from hypothesis import given, settings, strategies

from models.admission import Admission, QueueFull, ServerStopping, Ticket, TooManyResponses
from models.rates import RateLimitExceeded, Rates
from models.reply import Usage

pytestmark = pytest.mark.anyio


async def test_whoever_comes_while_a_slot_is_free_has_one() -> None:
    admission = Admission(slots=2, queue=0, per_user=2)
    assert [admission.enter("ann").position, admission.enter("bob").position] == [0, 0]
    assert admission.free == 0


async def test_turn_ends_at_once_for_whoever_has_a_slot() -> None:
    ticket = Admission(slots=1, queue=0, per_user=1).enter("ann")
    assert [position async for position in ticket.turn()] == []


async def test_turn_tells_each_new_position_once_and_ends_with_the_slot() -> None:
    admission = Admission(slots=1, queue=3, per_user=9)
    first, second, third, last = (admission.enter("ann") for _ in range(4))
    turn = aiter(last.turn())
    assert await anext(turn) == 3
    waiting = asyncio.ensure_future(anext(turn))
    admission.leave(first)
    assert await waiting == 2
    admission.leave(second)
    admission.leave(third)  # two moves before anyone looks: there is nothing to say about the first
    with pytest.raises(StopAsyncIteration):
        await anext(turn)
    assert last.position == 0


async def test_turn_says_nothing_when_one_behind_leaves() -> None:
    admission = Admission(slots=1, queue=3, per_user=9)
    _, next_one, last = (admission.enter("ann") for _ in range(3))
    turn = aiter(next_one.turn())
    assert await anext(turn) == 1
    admission.leave(last)
    waiting = asyncio.ensure_future(anext(turn))
    await asyncio.sleep(0)  # it looks
    assert not waiting.done()
    waiting.cancel()


async def test_one_that_gives_up_waiting_lets_those_behind_move_up_and_takes_no_slot() -> None:
    admission = Admission(slots=1, queue=3, per_user=9)
    running, _, leaver, last = (admission.enter("ann") for _ in range(4))
    admission.leave(leaver)
    assert (running.position, last.position, admission.free) == (0, 2, 0)


async def test_a_slot_given_to_one_that_left_before_it_looked_goes_to_the_next() -> None:
    admission = Admission(slots=1, queue=2, per_user=9)
    first, second, third = (admission.enter("ann") for _ in range(3))
    admission.leave(first)
    admission.leave(second)
    assert third.position == 0


async def test_a_full_queue_refuses_and_is_not_counted() -> None:
    admission = Admission(slots=1, queue=1, per_user=2)
    admission.enter("ann")
    admission.enter("ann")
    with pytest.raises(QueueFull, match="1 replies wait already") as raised:
        admission.enter("bob")
    assert raised.value.code == "queue_full"
    assert admission.in_flight["bob"] == 0


async def test_replies_that_wait_count_for_their_user_and_for_nobody_else() -> None:
    admission = Admission(slots=1, queue=9, per_user=2)
    first, _ = admission.enter("ann"), admission.enter("ann")
    with pytest.raises(TooManyResponses, match="2 replies are in flight") as raised:
        admission.enter("ann")
    assert raised.value.code == "too_many_responses"
    assert admission.enter("bob").position == 2
    admission.leave(first)
    assert admission.enter("ann").position == 2


async def test_a_place_is_given_back_at_its_end_to_whoever_is_next() -> None:
    admission = Admission(slots=1, queue=1, per_user=1)
    with admission.place("ann") as first:
        waiting = admission.enter("bob")
        assert (first.user, first.position, waiting.position) == ("ann", 0, 1)
        assert dict(admission.in_flight) == {"ann": 1, "bob": 1}
    assert (waiting.position, admission.free) == (0, 0)
    assert dict(admission.in_flight) == {"bob": 1}


@pytest.mark.parametrize("failure", [ValueError, asyncio.CancelledError])
async def test_a_place_is_given_back_whatever_happens_in_it(failure: type[BaseException]) -> None:
    admission = Admission(slots=1, queue=0, per_user=1)
    with pytest.raises(failure):
        with admission.place("ann"):
            raise failure
    assert (admission.free, dict(admission.in_flight)) == (1, {})


@pytest.mark.parametrize(("user", "refusal"), [("ann", TooManyResponses), ("bob", QueueFull)])
async def test_a_place_that_is_refused_is_not_given_back(user: str, refusal: type[Exception]) -> None:
    admission = Admission(slots=1, queue=0, per_user=1)
    with admission.place("ann"):
        with pytest.raises(refusal):
            with admission.place(user):
                raise AssertionError("there is no place")
        assert (admission.free, dict(admission.in_flight)) == (0, {"ann": 1})
    assert admission.free == 1


steps = strategies.lists(
    strategies.tuples(strategies.sampled_from(["ann", "bob", "carla", "leave"]), strategies.integers(0, 9))
)


@settings(max_examples=300, deadline=None)
@given(steps, strategies.integers(1, 3), strategies.integers(0, 5), strategies.integers(1, 4))
def test_slots_go_round_the_users_who_wait_and_none_is_lost(
    steps: list[tuple[str, int]], slots: int, queue: int, per_user: int
) -> None:
    admission = Admission(slots, queue, per_user)
    running: list[Ticket] = []
    waiting: list[list[Ticket]] = []  # a list for each user, whose turn is next first
    for user, index in steps:
        if user != "leave":
            mine = [ticket for ticket in chain(running, *waiting) if ticket.user == user]
            try:
                ticket = admission.enter(user)
            except TooManyResponses:
                assert len(mine) == per_user
            except QueueFull:
                assert (len(running), sum(map(len, waiting))) == (slots, queue)
            else:
                line = next((line for line in waiting if line[0].user == user), [])
                if len(running) < slots:
                    running.append(ticket)
                elif not line:
                    waiting.append([ticket])
                else:
                    line.append(ticket)
        elif everybody := [*running, *chain.from_iterable(waiting)]:
            leaver = everybody[index % len(everybody)]
            admission.leave(leaver)
            if leaver in running:
                running.remove(leaver)
                if waiting:
                    line = waiting.pop(0)
                    running.append(line.pop(0))
                    waiting.append(line)
            for line in waiting:
                line[:] = [ticket for ticket in line if ticket is not leaver]
            waiting = [line for line in waiting if line]
        turns = [ticket for turn in zip_longest(*waiting) for ticket in turn if ticket]
        assert [ticket.position for ticket in running] == [0] * len(running)
        assert [ticket.position for ticket in turns] == list(range(1, len(turns) + 1))
        assert admission.waiting == turns
        assert admission.free == slots - len(running)
        assert dict(admission.in_flight) == Counter(ticket.user for ticket in [*running, *turns])


@pytest.mark.parametrize("slots", [1, 3])
async def test_a_single_request_waits_for_one_of_a_hundred_of_somebody_elses_at_most(slots: int) -> None:
    admission = Admission(slots, queue=200, per_user=200)
    anns = [admission.enter("ann") for _ in range(100)]
    bobs = admission.enter("bob")
    assert bobs.position == 2
    running = anns[:slots]
    admission.leave(running.pop(0))
    assert (sum(not ticket.position for ticket in anns), bobs.position) == (slots + 1, 1)
    admission.leave(running.pop(0) if running else next(ticket for ticket in anns[1:] if not ticket.position))
    assert bobs.position == 0


async def test_who_is_overtaken_is_told_of_the_new_position() -> None:
    admission = Admission(slots=1, queue=9, per_user=9)
    _, _, second = (admission.enter("ann") for _ in range(3))
    turn = aiter(second.turn())
    assert await anext(turn) == 2
    admission.enter("bob")
    assert await anext(turn) == 3


async def test_where_slots_have_gone_nobody_is_admitted_until_enough_replies_have_ended() -> None:
    admission = Admission(slots=4, queue=9, per_user=9)
    running = [admission.enter("ann") for _ in range(4)]
    waiting = admission.enter("bob")
    admission.shrink(2)
    for left in (3, 2):
        admission.leave(running.pop())
        assert (len(running), waiting.position) == (left, 1)
    admission.leave(running.pop())
    assert waiting.position == 0
    admission.leave(waiting)
    admission.leave(running.pop())
    assert admission.free == 2


async def test_a_closed_admission_refuses_all_and_lets_go_on_who_is_there() -> None:
    admission = Admission(slots=1, queue=1, per_user=9)
    running, waiting = admission.enter("ann"), admission.enter("bob")
    admission.close()
    with pytest.raises(ServerStopping) as raised:
        admission.enter("ann")
    assert (raised.value.code, dict(admission.in_flight)) == ("server_shutdown", {"ann": 1, "bob": 1})
    admission.leave(running)
    assert waiting.position == 0


async def test_who_asks_too_often_is_refused_and_told_when_to_come_back() -> None:
    admission = Admission(slots=9, queue=0, per_user=9, rates=Rates(requests="2/hour"))
    admission.leave(admission.enter("ann"))
    admission.leave(admission.enter("ann"))
    with pytest.raises(RateLimitExceeded, match="2 requests per 1 hour") as raised:
        admission.enter("ann")
    assert raised.value.retry_after is not None
    assert 3500 < raised.value.retry_after <= 3600
    assert (admission.free, dict(admission.in_flight)) == (9, {})
    assert admission.enter("bob").position == 0


async def test_what_is_refused_for_want_of_room_does_not_count_as_asked() -> None:
    admission = Admission(slots=1, queue=0, per_user=1, rates=Rates(requests="2/hour"))
    running = admission.enter("ann")
    for _ in range(3):
        with pytest.raises(TooManyResponses):
            admission.enter("ann")
    admission.leave(running)
    admission.enter("ann")


async def test_who_has_had_the_tokens_of_the_day_is_refused() -> None:
    admission = Admission(slots=2, queue=1, per_user=9, rates=Rates(tokens="100/day"))
    for output in (20, 50):
        ticket = admission.enter("ann")
        ticket.usage = Usage(input_tokens=20, output_tokens=output)
        admission.leave(ticket)
    with pytest.raises(RateLimitExceeded, match="100 tokens per 1 day"):
        admission.enter("ann")
    assert admission.enter("bob").position == 0


async def test_a_reply_that_never_had_a_slot_costs_no_tokens() -> None:
    admission = Admission(slots=1, queue=1, per_user=9, rates=Rates(tokens="100/day"))
    admission.enter("ann")
    waiting = admission.enter("ann")
    waiting.usage = Usage(input_tokens=1000)
    admission.leave(waiting)
    admission.enter("ann")
