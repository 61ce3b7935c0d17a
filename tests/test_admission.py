from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings, strategies

from models.admission import Admission, QueueFull, TooManyResponses

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


steps = strategies.lists(strategies.tuples(strategies.sampled_from(["ann", "bob", "leave"]), strategies.integers(0, 9)))


@settings(max_examples=200, deadline=None)
@given(steps, strategies.integers(1, 3), strategies.integers(0, 3), strategies.integers(1, 4))
def test_slots_go_to_the_longest_waiting_and_none_is_lost(
    steps: list[tuple[str, int]], slots: int, queue: int, per_user: int
) -> None:
    admission = Admission(slots, queue, per_user)
    tickets = []  # in the order they came; those with a slot may have left out of order
    for user, index in steps:
        if user != "leave":
            try:
                tickets.append(admission.enter(user))
            except TooManyResponses:
                assert sum(ticket.user == user for ticket in tickets) == per_user
            except QueueFull:
                assert len(tickets) == slots + queue
        elif tickets:
            admission.leave(tickets.pop(index % len(tickets)))
        waiting = max(0, len(tickets) - slots)
        running = len(tickets) - waiting
        assert [ticket.position for ticket in tickets] == [0] * running + list(range(1, waiting + 1))
        assert admission.free == slots - running
        assert dict(admission.in_flight) == Counter(ticket.user for ticket in tickets)
