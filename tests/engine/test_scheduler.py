from __future__ import annotations

import pytest

from models.engine.sampling_params import SamplingParams
from models.engine.scheduler import Chunk, Placement, PrefillLimits, Scheduler
from models.engine.sequence import Sequence
from tests.support.faulty import limits

DEPTH = PrefillLimits.depth


def new_sequence(length: int, first: int = 0) -> Sequence:
    """A sequence whose prompt counts up from `first`."""
    return with_prompt(list(range(first, first + length)))


def with_prompt(prompt: list[int]) -> Sequence:
    return Sequence(prompt, SamplingParams(), 9)


def start(scheduler: Scheduler, sequence: Sequence) -> Placement:
    """Let a sequence run in the slot that the scheduler chooses."""
    placement = scheduler.find_slot(sequence)
    scheduler.reserve(placement)
    scheduler.start(sequence, placement)
    return placement


def decode(sequence: Sequence, tokens: int = 1) -> None:
    """Let a sequence have generated some tokens, all but the last one of them cached."""
    for token_id in range(tokens):
        sequence.expect()
        sequence.append(token_id)
    sequence.cached = len(sequence.tokens) - 1


def running(scheduler: Scheduler, *lengths: int) -> list[Sequence]:
    """Sequences that run, each with a prompt that no other one begins with."""
    sequences = [new_sequence(length, 10_000 * number) for number, length in enumerate(lengths)]
    for sequence in sequences:
        start(scheduler, sequence)
    return sequences


def counts(chunks: list[Chunk]) -> list[tuple[Sequence, int]]:
    return [(chunk.sequence, chunk.count) for chunk in chunks]


def test_a_chunk_knows_its_tokens_and_whether_it_gives_one() -> None:
    sequence = new_sequence(10, first=50)
    sequence.cached = 4
    partial, last = Chunk(sequence, 3), Chunk(sequence, 6)
    assert (partial.start, partial.ids, partial.gives_token) == (4, [54, 55, 56], False)
    assert (last.start, last.ids, last.gives_token) == (4, [54, 55, 56, 57, 58, 59], True)
    decode(sequence, tokens=2)
    next_token = Chunk(sequence, 1)
    assert (next_token.start, next_token.ids, next_token.gives_token) == (11, [1], True)


def test_a_new_scheduler_has_only_free_slots() -> None:
    scheduler = Scheduler(3, limits(8))
    assert scheduler.free_slots == 3
    assert scheduler.active == []
    assert scheduler.schedule([]) == []


def test_each_sequence_gets_a_slot_of_its_own() -> None:
    scheduler = Scheduler(3, limits(8))
    sequences = running(scheduler, 5, 5, 5)
    assert sorted(sequence.slot for sequence in sequences) == [0, 1, 2]
    assert [scheduler.slots[sequence.slot] for sequence in sequences] == sequences
    assert scheduler.running == sequences
    assert scheduler.free_slots == 0
    with pytest.raises(AssertionError):
        scheduler.find_slot(new_sequence(3))


def test_a_released_slot_is_free_at_once_and_only_once() -> None:
    scheduler = Scheduler(2, limits(8))
    first, second = running(scheduler, 5, 5)
    slot = first.slot
    for _ in range(2):
        scheduler.release(first)
        assert scheduler.free_slots == 1
    assert first.slot == -1
    assert scheduler.slots[slot] is None
    assert scheduler.running == [second]
    assert start(scheduler, new_sequence(5)).slot == slot


def test_a_sequence_without_a_slot_can_be_released() -> None:
    scheduler = Scheduler(2, limits(8))
    sequences = running(scheduler, 5)
    scheduler.release(new_sequence(5))
    assert scheduler.running == sequences


def test_a_prompt_starts_after_the_prefix_that_a_running_sequence_has_cached() -> None:
    scheduler = Scheduler(2, limits(8))
    (first,) = running(scheduler, 100)
    first.cached = 60
    second = new_sequence(80)
    assert start(scheduler, second) == Placement(slot=1, source=0, length=60, stale=0)
    assert (second.cached, second.reused) == (60, 60)


def test_a_prompt_continues_in_the_slot_of_an_ended_sequence() -> None:
    scheduler = Scheduler(2, limits(8))
    (first,) = running(scheduler, 50)
    decode(first, 10)
    scheduler.release(first)
    turn = with_prompt([*first.tokens, 7, 8])
    assert start(scheduler, turn) == Placement(slot=0, source=0, length=59, stale=59)
    assert turn.reused == 59


def test_a_slot_that_another_owner_reused_stays_secret_after_its_public_beginning() -> None:
    scheduler = Scheduler(1, limits(8))
    owners = [Sequence(list(range(50)), SamplingParams(), 9, owner=owner, public=30) for owner in ("ann", "bob", "ann")]
    for owner in owners[:2]:
        assert start(scheduler, owner).length == (30 if owner.owner == "bob" else 0)
        owner.cached = 50
        scheduler.release(owner)
    assert start(scheduler, owners[2]).length == 30


def test_a_placement_counts_what_the_slot_held_before() -> None:
    scheduler = Scheduler(1, limits(8))
    (first,) = running(scheduler, 50)
    first.cached = 30
    scheduler.release(first)
    assert scheduler.find_slot(new_sequence(40, first=9_000)) == Placement(slot=0, source=0, length=0, stale=30)


def test_a_reserved_slot_keeps_only_the_prefix_that_it_holds_itself() -> None:
    scheduler = Scheduler(1, limits(8))
    (first,) = running(scheduler, 50)
    first.cached = 50
    scheduler.release(first)
    scheduler.reserve(scheduler.find_slot(with_prompt([*first.prompt[:40], 9_999])))
    assert scheduler.find_slot(with_prompt(first.prompt)) == Placement(slot=0, source=0, length=40, stale=40)


def test_a_reserved_slot_does_not_hold_a_copy_before_it_is_filled() -> None:
    scheduler = Scheduler(2, limits(8))
    first, second = running(scheduler, 50, 40)
    first.cached, second.cached = 50, 40
    scheduler.release(second)
    scheduler.reserve(scheduler.find_slot(with_prompt([*first.prompt, 9_999])))
    assert [cached.tokens for cached in scheduler.prefixes.cached] == [first.prompt, []]


def test_all_sequences_are_active_up_to_the_limit_oldest_first() -> None:
    scheduler = Scheduler(4, limits(8))
    first, second, third = running(scheduler, 5, 5, 5)
    scheduler.limit = 2
    assert scheduler.active == [first, second]
    assert scheduler.free_slots == 0
    scheduler.release(first)
    assert scheduler.active == [second, third]
    scheduler.release(second)
    assert scheduler.free_slots == 1


def test_decoding_sequences_come_first_ordered_by_slot() -> None:
    scheduler = Scheduler(3, limits(8))
    prefilling, second, third = running(scheduler, 5, 5, 5)
    decode(second)
    decode(third)
    assert counts(scheduler.schedule([third, prefilling, second])) == [(second, 1), (third, 1), (prefilling, 5)]


def test_a_prefill_beside_decoding_sequences_gets_one_chunk() -> None:
    scheduler = Scheduler(2, limits(8))
    decoding, prefilling = running(scheduler, 5, 500)
    decode(decoding)
    assert counts(scheduler.schedule(scheduler.active)) == [(decoding, 1), (prefilling, 8)]


def test_a_prefill_alone_gets_a_larger_chunk() -> None:
    scheduler = Scheduler(2, limits(8))
    (prefilling,) = running(scheduler, 500)
    assert counts(scheduler.schedule(scheduler.active)) == [(prefilling, 8 * 16)]


def test_prompts_share_the_chunk_in_their_order() -> None:
    scheduler = Scheduler(5, limits(8))
    decoding, *prefilling = running(scheduler, 5, 3, 4, 9, 9)
    decode(decoding)
    first, second, third, fourth = prefilling
    assert counts(scheduler.schedule(scheduler.active)) == [(decoding, 1), (first, 3), (second, 4), (third, 1)]
    assert counts(scheduler.schedule([fourth, decoding, third])) == [(decoding, 1), (fourth, 8)]


def test_tokens_far_into_a_prompt_cost_more_of_the_chunk() -> None:
    scheduler = Scheduler(3, limits(32))
    decoding, deep, late = running(scheduler, 5, 3 * DEPTH, 100)
    decode(decoding)
    chunks = []
    for deep.cached in (0, DEPTH // 2, DEPTH, 2 * DEPTH):
        chunks.append(scheduler.schedule(scheduler.active)[1].count)
    assert chunks == [32, 21, 16, 10]
    deep.cached = len(deep.prompt) - 5  # five tokens that cost four each, nearly
    assert counts(scheduler.schedule(scheduler.active)) == [(decoding, 1), (deep, 5), (late, 12)]


def test_a_prompt_comes_to_its_end_beside_decoding_sequences_however_long_it_is() -> None:
    scheduler = Scheduler(2, limits(8))
    decoding, prefilling = running(scheduler, 5, 12 * DEPTH)
    decode(decoding)
    prefilling.cached = 8 * DEPTH  # one token costs more than the whole chunk
    assert counts(scheduler.schedule(scheduler.active)) == [(decoding, 1), (prefilling, 1)]


def test_scheduling_changes_no_sequence() -> None:
    scheduler = Scheduler(2, limits(8))
    decoding, prefilling = running(scheduler, 5, 500)
    decode(decoding)
    assert scheduler.schedule(scheduler.active) == scheduler.schedule(scheduler.active)
    assert (decoding.cached, prefilling.cached) == (5, 0)
