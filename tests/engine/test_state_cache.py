from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor

from models.engine.batch import Batch
from models.engine.kv_cache import KVCache
from models.engine.state_cache import StateCache
from models.errors import CacheTooLargeError

NAME = ("recurrent", 0)


def new_cache(slots: int = 3) -> StateCache:
    """A cache of one layer, whose state is one number."""
    cache = StateCache(KVCache(slots, 64))
    cache.layers.append({})
    cache.add(cache.layers[0], NAME, torch.zeros(1, 1))
    return cache


def batch_of(*chunks: tuple[int, int, int]) -> Batch:
    """A batch of chunks: slot, first position, number of tokens."""
    batch = Batch()
    for slot, start, count in chunks:
        batch.add(slot, [1] * count, start)
    return batch


def read(cache: StateCache, *chunks: tuple[int, int, int]) -> list[list[float] | None]:
    """Run a step that adds the number of tokens to each state. Returns the states that its runs began with."""
    began: list[list[float] | None] = []
    states = cache.layers[0][NAME]
    with cache.step(batch_of(*chunks)):
        for run in cache.runs:
            before: Tensor = torch.zeros(1, 1) if run.read is None else states[run.read]
            began.append(None if run.read is None else before.flatten().tolist())
            states[run.write] = before + run.count
    return began


def fail(cache: StateCache, *chunks: tuple[int, int, int]) -> None:
    """Run a step that fails after it has written NaN to each state."""
    with suppress(RuntimeError), cache.step(batch_of(*chunks)):
        for run in cache.runs:
            cache.layers[0][NAME][run.write] = torch.nan
        raise RuntimeError


def test_a_sequence_finds_the_state_that_its_last_step_left() -> None:
    cache = new_cache()
    assert read(cache, (0, 0, 5), (2, 0, 3)) == [None, None]
    assert read(cache, (0, 5, 1), (2, 3, 4)) == [[5], [3]]
    assert read(cache, (0, 6, 1)) == [[6]]
    assert read(cache, (2, 7, 2)) == [[7]]


def test_single_tokens_share_a_run_and_others_do_not() -> None:
    cache = new_cache(slots=4)
    read(cache, *((slot, 0, slot + 2) for slot in range(4)))
    assert read(cache, (0, 2, 1), (2, 4, 1), (3, 5, 1), (1, 3, 2)) == [[2, 4, 5], [3]]
    assert read(cache, (0, 3, 1), (1, 0, 1), (2, 5, 1)) == [[3], None, [5]]  # a sequence of one token begins


def test_a_step_that_failed_can_be_tried_again() -> None:
    cache = new_cache()
    read(cache, (0, 0, 5))
    for _ in range(2):
        fail(cache, (0, 5, 2))
        assert not cache.runs
    assert read(cache, (0, 5, 1)) == [[5]]
    assert read(cache, (0, 5, 3)) == [[5]]  # the step before worked, but what came after it failed
    assert read(cache, (0, 8, 1)) == [[8]]


def test_a_state_of_a_failed_step_is_never_read() -> None:
    cache = new_cache()
    read(cache, (0, 0, 5))
    read(cache, (0, 5, 1))
    fail(cache, (0, 6, 2))  # in the place of the first state
    for length in (5, 8):
        with pytest.raises(AssertionError), cache.step(batch_of((0, length, 1))):
            pass
    assert read(cache, (0, 6, 1)) == [[6]]


def test_a_new_sequence_leaves_no_state_of_the_one_before() -> None:
    cache = new_cache()
    read(cache, (0, 0, 5))
    read(cache, (0, 5, 1))
    assert read(cache, (0, 0, 1)) == [None]
    for length in (5, 6):
        with pytest.raises(AssertionError), cache.step(batch_of((0, length, 1))):
            pass


def test_a_copied_state_is_independent_of_its_source() -> None:
    cache = new_cache()
    read(cache, (0, 0, 5), (1, 0, 9))
    read(cache, (0, 5, 1), (1, 9, 1))
    cache.copy(0, 1, 6)
    assert read(cache, (0, 6, 2), (1, 6, 3)) == [[6], [6]]
    assert read(cache, (0, 8, 1), (1, 9, 1)) == [[8, 9]]


def test_without_layers_there_are_no_runs() -> None:
    cache = StateCache(KVCache(2, 64))
    assert not cache
    with cache.step(batch_of((0, 7, 1))):
        assert not cache.runs
    cache.copy(0, 1, 7)


def test_a_state_has_two_places_a_slot_and_its_own_dtype_and_counts_as_memory() -> None:
    cache = new_cache(slots=3)
    cache.add(cache.layers[0], ("conv", 1), torch.zeros(4, 6, 2, dtype=torch.bfloat16))
    assert cache.layers[0]["conv", 1].shape == (8, 6, 2)
    assert cache.layers[0]["conv", 1].dtype == torch.bfloat16
    with pytest.raises(CacheTooLargeError, match="lower PARLEY_SLOTS"):
        cache.add(cache.layers[0], NAME, torch.zeros(1, 1).expand(1, 2**50))
