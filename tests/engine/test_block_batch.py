from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from models.engine.batch import Batch
from models.engine.block_attention import Group
from models.engine.block_batch import SEQUENCES, TOKENS, PaddedBatch
from models.engine.block_cache import BlockCache
from models.engine.fused_attention import FusedAttention

SLOTS = 40
PADDING = SLOTS


def new_cache(needs_groups: bool) -> BlockCache:
    """A cache for 40 sequences of 128 tokens, in blocks of 16."""
    cache = BlockCache(SLOTS, 128, 16, torch.device("cpu"), None, FusedAttention())
    cache.needs_groups = needs_groups
    return cache


def batch_of(*parts: tuple[int, int, int]) -> Batch:
    """A batch with so many tokens of some slots: (slot, start, count). Each sequence has logits."""
    batch = Batch()
    for slot, start, count in parts:
        batch.add(slot, list(range(100 * slot, 100 * slot + count)), start)
        batch.logits_at.append(len(batch.ids) - 1)
    return batch


def inputs(padded: PaddedBatch, context: int = 128) -> dict[str, list[int]]:
    """The inputs of a step, by their names."""
    numbers, sizes = padded.numbers(context), padded.sizes
    assert len(numbers) == sizes.numbers
    names = {"ids": sizes.tokens, "slots": sizes.tokens, "positions": sizes.tokens}
    names |= dict.fromkeys(("logits_at", "owners", "lengths"), sizes.sequences) | {"starts": sizes.sequences + 1}
    return {name: [numbers.pop(0) for _ in range(count)] for name, count in names.items()}


def test_sequences_that_decode_are_padded_to_a_size_that_comes_again() -> None:
    padded = PaddedBatch.of(batch_of((2, 30, 1), (5, 7, 1), (6, 100, 1)), new_cache(needs_groups=False))
    assert (padded.sizes.tokens, padded.sizes.sequences, padded.sizes.longest) == (4, 4, 1)
    assert inputs(padded) == {
        "ids": [200, 500, 600, 0],
        "slots": [2, 5, 6, PADDING],
        "positions": [30, 7, 100, 0],
        "logits_at": [0, 1, 2, 0],
        "owners": [2, 5, 6, PADDING],
        "lengths": [31, 8, 101, 1],
        "starts": [0, 1, 2, 3, 4],
    }


def test_prompts_are_padded_by_tokens_of_a_sequence_that_nobody_reads() -> None:
    padded = PaddedBatch.of(batch_of((2, 30, 1), (5, 0, 50)), new_cache(needs_groups=False))
    assert (padded.sizes.tokens, padded.sizes.sequences, padded.sizes.longest) == (64, 8, 64)
    found = inputs(padded)
    assert found["slots"] == [2] + [5] * 50 + [PADDING] * 13
    assert found["positions"] == [30, *range(50), *range(13)]
    assert found["owners"] == [2, 5, *[PADDING] * 6]
    assert found["lengths"] == [31, 50, 13, *[0] * 5]
    assert found["starts"] == [0, 1, 51, *[64] * 6]
    assert found["logits_at"] == [0, 50, *[0] * 6]


def test_padding_stays_within_the_context() -> None:
    padded = PaddedBatch.of(batch_of((1, 0, 70)), new_cache(needs_groups=False))
    found = inputs(padded, context=40)
    assert max(found["positions"][70:]) < 40
    assert max(found["lengths"][1:]) <= 40


def test_attention_that_gathers_blocks_reads_a_power_of_two_of_them_while_sequences_decode() -> None:
    cache, sizes = new_cache(needs_groups=True), []
    for start in (3, 15, 16, 40, 127):
        padded = PaddedBatch.of(batch_of((0, start, 1), (7, 2, 1)), cache)
        assert padded.sizes.comes_again
        sizes.append(padded.sizes.groups)
    assert sizes == [(Group(0, 2, 0, 1, blocks),) for blocks in (1, 1, 2, 4, 8)]


def test_attention_that_gathers_blocks_knows_each_prompt() -> None:
    padded = PaddedBatch.of(batch_of((3, 20, 1), (9, 40, 1), (1, 16, 20), (2, 0, 5)), new_cache(needs_groups=True))
    assert padded.sizes.groups == (Group(0, 2, 0, 1, 3), Group(2, 1, 2, 20, 3), Group(3, 1, 22, 5, 1))
    assert (padded.sizes.tokens, padded.sizes.sequences, padded.sizes.longest) == (27, 4, 20)
    assert not padded.sizes.comes_again


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 33, 39])
def test_neighbours_of_a_size_share_it(count: int) -> None:
    padded = PaddedBatch.of(batch_of(*((slot, 5, 1) for slot in range(count))), new_cache(needs_groups=False))
    assert padded.sizes.sequences == next(size for size in SEQUENCES if size >= count)
    assert padded.sizes.sequences < 2 * count


def test_the_sizes_are_in_order_and_waste_little() -> None:
    for sizes, least, waste in ((SEQUENCES, 8, 8), (TOKENS, 512, 128)):
        assert sorted(set(sizes)) == list(sizes)
        steps = [after - before for before, after in pairwise(sizes) if before >= least]
        assert min(steps) >= waste
