from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models.engine.kv_cache import KVCache
from models.errors import CacheTooLargeError
from tests.support.attention import LENGTH, QKV, SMALL, CachedAttention, Segment, defined_attention
from tests.support.faulty import both_attentions


@both_attentions
def test_the_scratch_slot_is_no_slot_of_a_sequence(native: bool) -> None:
    attention, qkv = CachedAttention(4, 40), QKV.random(SMALL, 60)
    scratch = attention.cache.padding_slot
    assert scratch == 4
    attention.forward([Segment(scratch, (0,), 13)], {scratch: qkv}, native)
    assert not attention.keys[:4].any()
    assert not attention.values[:4].any()
    assert torch.equal(attention.keys[4, :, :13], qkv.key[:, :13])


def test_each_call_of_a_module_gets_tensors_of_its_own() -> None:
    cache, modules = KVCache(2, 8), [nn.Module(), nn.Module()]
    tokens = torch.ones(1, 2, 1, 4)
    calls = [(module, call) for module in modules for call in (0, 1)]
    for module, call in calls:
        cache.attach(module, call, tokens, tokens)
    assert len({tensor.data_ptr() for pair in cache.tensors for tensor in pair}) == 8
    for (module, call), (keys, values) in zip(calls, cache.tensors, strict=True):
        assert keys is getattr(module, f"cached_keys_{call}")
        assert values is getattr(module, f"cached_values_{call}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", [None, torch.bfloat16], ids=["dtype of the model", "own dtype"])
def test_a_cache_has_the_models_dtype_or_its_own_and_starts_at_zero(
    dtype: torch.dtype, own: torch.dtype | None
) -> None:
    tokens, cache, module = torch.ones(1, 2, 1, 4, dtype=dtype), KVCache(2, 8, own), nn.Module()
    cache.attach(module, 0, tokens, tokens)
    for tensor in cache.tensors[0]:
        assert tensor.dtype == (own or dtype)
        assert not tensor.any()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc has the memory of a process")
def test_slots_that_were_never_written_take_no_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    cache, before, tokens = KVCache(31, 2**16), resident(), torch.ones(1, 1, 1, 64)
    cache.attach(nn.Module(), 0, tokens, tokens)
    assert sum(tensor.nbytes for pair in cache.tensors for tensor in pair) == 2**30
    assert resident() - before < 2**26


@both_attentions
@pytest.mark.parametrize("length", [16, 21, 48])
def test_a_copied_prefix_is_independent_of_its_source(length: int, native: bool) -> None:
    attention, qkv, other = CachedAttention(), QKV.random(SMALL, 70), QKV.random(SMALL, 71)
    pairs = ((qkv.query, other.query), (qkv.key, other.key), (qkv.value, other.value))
    mixed = QKV(*(torch.cat([first[:, :length], second[:, length:]], 1) for first, second in pairs))
    attention.prefill(qkv, native, [60])
    attention.cache.copy(0, 2, length)
    (copied,) = attention.forward([Segment(2, (length,), LENGTH - length)], {2: mixed}, native)
    torch.testing.assert_close(copied, defined_attention(mixed)[length:], atol=2e-5, rtol=1e-4)
    (source,) = attention.forward([Segment(0, (60,), 1)], {0: qkv}, native)
    torch.testing.assert_close(source, defined_attention(qkv)[60:61], atol=2e-5, rtol=1e-4)
    assert not attention.keys[1].any()


@pytest.mark.compiler
def test_a_copied_prefix_gives_the_same_bits_as_a_computed_one() -> None:
    attention, qkv = CachedAttention(), QKV.random(SMALL, 72)
    whole = attention.prefill(qkv, True, [LENGTH])
    attention.cache.copy(0, 1, 37)
    (copied,) = attention.forward([Segment(1, (37,), LENGTH - 37)], {1: qkv}, True)
    assert torch.equal(copied, whole[37:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "infinity"])
@pytest.mark.parametrize("start", [0, 20, 32])
def test_a_cleared_slot_does_not_spread_nan_or_infinity(start: int, bad: float) -> None:
    """By torch, whose products read what the mask hides. Slot 1 makes the span reach far beyond slot 0."""
    attention, inputs = CachedAttention(2), {0: QKV.random(SMALL, 80), 1: QKV.random(SMALL, 81)}
    broken = QKV.random(SMALL, 82)
    for tensor, good in ((broken.key, inputs[0].key), (broken.value, inputs[0].value)):
        tensor[:] = bad
        tensor[:, :start] = good[:, :start]  # the prefix that the next sequence reuses
    attention.forward([Segment(0, (0,), 60), Segment(1, (0,), 65)], {0: broken, 1: inputs[1]}, False)
    attention.cache.clear(0, start, 60)
    first, second = attention.forward([Segment(0, (start, 65), 1)], inputs, False)
    torch.testing.assert_close(first[0], defined_attention(inputs[0])[start], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(second[0], defined_attention(inputs[1])[65], atol=2e-5, rtol=1e-4)


def test_clear_leaves_earlier_positions_and_other_slots() -> None:
    attention, inputs = CachedAttention(2), {0: QKV.random(SMALL, 85), 1: QKV.random(SMALL, 86)}
    attention.forward([Segment(0, (0, 0), LENGTH)], inputs, False)
    attention.cache.clear(0, 37, 60)
    for stored, name in ((attention.keys, "key"), (attention.values[..., : SMALL.value_size], "value")):
        assert torch.equal(stored[0, :, :37], getattr(inputs[0], name)[:, :37])
        assert not stored[0, :, 37:60].any()
        assert torch.equal(stored[1, :, :LENGTH], getattr(inputs[1], name))


def test_a_cache_without_room_names_the_settings_to_lower() -> None:
    tokens = torch.ones(1, 2, 1, 4)
    message = "2097152 slots of 16777216 tokens: lower PARLEY_SLOTS or PARLEY_CONTEXT"
    with pytest.raises(CacheTooLargeError, match=message):
        KVCache(2**21, 2**24).attach(nn.Module(), 0, tokens, tokens)
