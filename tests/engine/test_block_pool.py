from __future__ import annotations

from collections import Counter

from hypothesis import given, settings, strategies

from models.engine.block_pool import PADDING_BLOCK, BlockPool

SIZE = 4
SLOTS = 5
BLOCKS = 12


def filled(*lengths: int) -> BlockPool:
    """A pool whose first slots have blocks for some lengths."""
    pool = BlockPool(SLOTS, BLOCKS + 1, SIZE)
    for slot, length in enumerate(lengths):
        assert pool.grow(slot, length)
    return pool


def test_a_slot_grows_block_by_block() -> None:
    pool = filled()
    sizes = []
    for length in range(10):
        assert pool.grow(0, length)
        sizes.append(len(pool.tables[0]))
    assert sizes == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert PADDING_BLOCK not in pool.tables[0]
    assert pool.free == BLOCKS - 3


def test_a_slot_that_finds_too_few_blocks_gets_none() -> None:
    pool = filled(40, 4)
    before = list(pool.tables[1])
    assert not pool.grow(1, 13)
    assert pool.tables[1] == before
    assert pool.grow(1, 8)
    assert pool.free == 0


def test_a_slot_that_shrinks_keeps_the_blocks_of_its_first_tokens() -> None:
    pool = filled(20)
    before = list(pool.tables[0])
    pool.shrink(0, 9)
    assert pool.tables[0] == before[:3]
    pool.shrink(0, 0)
    assert pool.tables[0] == []
    assert pool.free == BLOCKS


def test_a_prefix_of_whole_blocks_is_shared_without_a_copy() -> None:
    pool = filled(12)
    assert not pool.needs_copy(0, 1, 8)
    assert pool.share(0, 1, 8) is None
    assert pool.tables[1] == pool.tables[0][:2]
    assert pool.free == BLOCKS - 3


def test_the_last_block_of_a_prefix_is_copied_if_it_is_not_full() -> None:
    pool = filled(12)
    assert pool.needs_copy(0, 1, 10)
    copy = pool.share(0, 1, 10)
    assert copy == (pool.tables[0][2], pool.tables[1][2])
    assert pool.tables[1][:2] == pool.tables[0][:2]
    assert pool.tables[1][2] not in pool.tables[0]


def test_a_slot_goes_on_in_its_own_last_block() -> None:
    pool = filled(12)
    before = list(pool.tables[0])
    assert not pool.needs_copy(0, 0, 6)
    assert pool.share(0, 0, 6) is None
    assert pool.tables[0] == before[:2]


def test_a_slot_does_not_write_into_a_block_that_another_one_has_too() -> None:
    pool = filled(12)
    pool.share(0, 1, 12)
    shared = list(pool.tables[0])
    assert pool.needs_copy(0, 0, 6)
    copy = pool.share(0, 0, 6)
    assert copy is not None
    assert copy[0] == shared[1]
    assert pool.tables[0] == [shared[0], copy[1]]
    assert pool.tables[1] == shared


def test_a_shared_block_is_free_once_its_last_slot_gives_it_back() -> None:
    pool = filled(8)
    pool.share(0, 1, 8)
    pool.shrink(0, 0)
    assert pool.free == BLOCKS - 2
    pool.shrink(1, 0)
    assert pool.free == BLOCKS


def test_a_block_that_several_slots_have_counts_once_in_their_share() -> None:
    pool = filled(12, 8)
    pool.share(0, 2, 12)
    assert pool.share_of([]) == 0
    assert pool.share_of([0, 2]) == 3 / BLOCKS
    assert pool.share_of([0, 1, 2]) == 5 / BLOCKS


def test_only_slots_whose_tables_change_are_sent() -> None:
    pool = filled(8, 8, 8)
    assert pool.changed == {0, 1, 2}
    pool.changed.clear()
    pool.grow(0, 8)
    pool.shrink(1, 5)
    assert pool.changed == set()
    pool.grow(2, 9)
    pool.share(0, 3, 8)
    assert pool.changed == {2, 3}


slot_numbers = strategies.integers(0, SLOTS - 1)
lengths = strategies.integers(0, 30)
acts = strategies.lists(
    strategies.tuples(strategies.sampled_from(["grow", "shrink", "share"]), slot_numbers, slot_numbers, lengths)
)


@settings(deadline=None)
@given(acts)
def test_whatever_happens_each_block_is_free_or_in_tables_and_none_is_lost(
    acts: list[tuple[str, int, int, int]],
) -> None:
    pool = filled()
    for act, slot, source, length in acts:
        if act == "grow":
            pool.grow(slot, length)
        elif act == "shrink":
            pool.shrink(slot, length)
        else:
            length = min(length, SIZE * len(pool.tables[source]))
            if pool.free or not pool.needs_copy(source, slot, length):
                pool.share(source, slot, length)
        used = Counter(block for table in pool.tables for block in set(table))
        assert all(len(set(table)) == len(table) for table in pool.tables)
        assert PADDING_BLOCK not in used
        assert len(used) + pool.free == BLOCKS
