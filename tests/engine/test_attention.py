from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config
from transformers.masking_utils import create_masks_for_generate

from models.engine.attention import ATTENTION, STEP, AttentionMetadata, CausalMask, Span, slot_attention
from models.engine.kv_cache import KVCache
from models.errors import UnsupportedModelError
from tests.support.attention import LENGTH, QKV, SMALL, CachedAttention, Segment, Shape, defined_attention
from tests.support.faulty import both_attentions

SMALL_TYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]

all_shapes = pytest.mark.parametrize(
    "shape",
    [
        Shape(4, 4, 16, 16),
        Shape(9, 3, 64, 64),
        Shape(6, 2, 12, 20),  # neither size a multiple of 16
        Shape(7, 1, 5, 72),  # all queries share one key; values need a wide and a narrow column
        Shape(4, 2, 48, 16),
    ],
    ids=str,
)


def sinks_of(shape: Shape) -> Tensor:
    return torch.linspace(-3, 4, shape.heads)


@both_attentions
@all_shapes
@pytest.mark.parametrize("window", [None, 1, 7, 16, 40, 1000], ids=lambda window: f"window {window}")
def test_grouped_queries_and_windows_follow_the_definition(shape: Shape, window: int | None, native: bool) -> None:
    qkv = QKV.random(shape, 1)
    expected = defined_attention(qkv, window)
    for ends in ([LENGTH], [1, 17, 48, 69, LENGTH]):
        result = CachedAttention().prefill(qkv, native, ends, window=window)
        torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-4)


@both_attentions
@all_shapes
@pytest.mark.parametrize("window", [None, 9], ids=lambda window: f"window {window}")
@pytest.mark.parametrize(
    ("softcap", "sinks"), [(3.0, False), (None, True), (50.0, True)], ids=["soft cap", "sinks", "soft cap and sinks"]
)
def test_soft_caps_and_sinks_follow_the_definition(
    shape: Shape, window: int | None, softcap: float | None, sinks: bool, native: bool
) -> None:
    qkv, some_sinks = QKV.random(shape, 2), sinks_of(shape) if sinks else None
    options: dict[str, Any] = {"window": window, "softcap": softcap, "s_aux": some_sinks, "scaling": 0.3}
    result = CachedAttention().prefill(qkv, native, [20, 33, LENGTH], **options)
    expected = defined_attention(qkv, window, softcap, some_sinks, scale=0.3)
    torch.testing.assert_close(result, expected, atol=5e-5, rtol=1e-4)


@both_attentions
def test_the_window_of_the_mask_counts_whatever_the_layer_says(native: bool) -> None:
    attention, qkv = CachedAttention(), QKV.random(SMALL, 3)
    attention.module.sliding_window = 9  # type: ignore[assignment]
    result = attention.prefill(qkv, native, [LENGTH], window=5, sliding_window=7)
    torch.testing.assert_close(result, defined_attention(qkv, 5), atol=2e-5, rtol=1e-4)


@both_attentions
def test_a_module_that_runs_twice_in_a_step_attends_to_the_keys_of_each_time(native: bool) -> None:
    module, cache, inputs = nn.Module(), KVCache(1, LENGTH), [QKV.random(SMALL, seed) for seed in (90, 91)]
    results: list[list[Tensor]] = [[], []]
    for start, end in ((0, 31), (31, 32), (32, LENGTH)):
        positions, span = torch.arange(start, end), Span(0, 1, 0, end - start, end)
        attach_to = None if start else cache
        step = STEP.set(AttentionMetadata(torch.zeros_like(positions), positions, (span,), native, attach_to))
        for result, qkv in zip(results, inputs, strict=True):
            query, key, value = (tensor[None, :, start:end] for tensor in (qkv.query, qkv.key, qkv.value))
            result.append(slot_attention(module, query, key, value, CausalMask())[0][0])
        STEP.reset(step)
    assert len(cache.tensors) == 2
    for result, qkv in zip(results, inputs, strict=True):
        torch.testing.assert_close(torch.cat(result), defined_attention(qkv), atol=2e-5, rtol=1e-4)


@both_attentions
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2, 1e4])
def test_scores_near_zero_and_in_the_thousands_are_precise(size: float, native: bool) -> None:
    qkv = QKV.random(SMALL, 4)
    # Doubles hold these scores only if the highest one is subtracted first.
    query = qkv.query.double() * size
    scores = torch.einsum("hqs,hks->hqk", query, qkv.key.double().repeat_interleave(2, 0)) * SMALL.size**-0.5
    masked = scores.masked_fill(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), -torch.inf)
    expected = masked.softmax(-1) @ qkv.value.double().repeat_interleave(2, 0)
    result = CachedAttention().prefill(QKV(qkv.query * size, qkv.key, qkv.value), native, [LENGTH])
    torch.testing.assert_close(result, expected.transpose(0, 1).float(), atol=1e-5 * max(size, 10), rtol=1e-4)


@both_attentions
@pytest.mark.parametrize("size", [20.0, 44.4, 45.0, 60.0, 1000.0])
def test_scores_far_above_the_soft_cap_are_capped(native: bool, size: float) -> None:
    qkv = QKV(torch.full((1, 2, 1), size), torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[1.0], [0.0]]]))
    result = CachedAttention().prefill(qkv, native, [2], softcap=1.0, scaling=1.0)
    # The scores of the second token are `size` and 0, and 1 and 0 after the cap.
    torch.testing.assert_close(result[:, 0, 0], torch.tensor([1.0, 1 / (1 + math.exp(-1))]))


@both_attentions
@all_shapes
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 5.0}], ids=["plain", "window", "soft cap"])
@pytest.mark.parametrize("dtype", SMALL_TYPES, ids=str)
def test_a_small_cache_only_rounds_keys_and_values(
    shape: Shape, options: dict[str, Any], dtype: torch.dtype, native: bool
) -> None:
    qkv, attention = QKV.random(shape, 5), CachedAttention(dtype=dtype)
    result = attention.prefill(qkv, native, [31, LENGTH], **options)
    rounded = qkv.to(dtype)
    cached = QKV(qkv.query, rounded.key, rounded.value)
    expected = defined_attention(cached, options.get("window"), options.get("softcap"))
    torch.testing.assert_close(result, expected, atol=5e-5, rtol=1e-4)
    assert attention.keys.dtype == attention.values.dtype == dtype


@both_attentions
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_a_small_cache_holds_every_number_of_its_type(dtype: torch.dtype, native: bool) -> None:
    bits = torch.arange(256, dtype=torch.int16) << (8 if dtype == torch.float16 else 0)
    numbers = bits.to(torch.int16 if dtype == torch.float16 else torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    # A token that attends to itself alone gets its own value.
    qkv = QKV(torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), numbers[None, None])
    attention = CachedAttention(dtype=dtype)
    assert torch.equal(attention.prefill(qkv, native, [1])[0, 0], numbers)
    # A score is the product of a query and a key: each key against 0, whose score is 0.
    for number in numbers[numbers.abs() < 10]:
        keys = torch.zeros(1, 2, 1)
        keys[0, 0] = number
        pair = QKV(torch.ones(1, 2, 1), keys, torch.tensor([[[1.0], [0.0]]]))
        result = CachedAttention(dtype=dtype).prefill(pair, native, [2], scaling=1.0)[1, 0, 0]
        torch.testing.assert_close(result, number.sigmoid())


@both_attentions
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_what_a_small_cache_cannot_hold_becomes_its_largest_number(dtype: torch.dtype, native: bool) -> None:
    values = torch.tensor([1e6, -1e6, 1e30, torch.finfo(dtype).max])
    qkv = QKV(torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), values[None, None])
    result = CachedAttention(dtype=dtype).prefill(qkv, native, [1])[0, 0]
    assert torch.equal(result, torch.finfo(dtype).max * torch.tensor([1.0, -1.0, 1.0, 1.0]))


@both_attentions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_model_gets_results_of_its_dtype(dtype: torch.dtype, native: bool) -> None:
    qkv = QKV.random(SMALL, 6).to(dtype)
    result = CachedAttention().prefill(qkv, native, [40, LENGTH])
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), defined_attention(qkv), atol=0.1, rtol=0.02)


@both_attentions
def test_each_slot_of_a_forward_attends_to_its_own_sequence(native: bool) -> None:
    attention, inputs = CachedAttention(4), {slot: QKV.random(SMALL, 10 + slot) for slot in range(4)}
    expected = {slot: defined_attention(qkv) for slot, qkv in inputs.items()}
    for slot, length in ((0, 20), (1, 3), (2, 50)):
        attention.forward([Segment(slot, (0,), length)], inputs, native)
    # Slots 0, 1 and 2 decode in one segment, slot 3 prefills in two of them.
    segments = [Segment(0, (20, 3, 50), 1), Segment(3, (0,), 30), Segment(3, (30,), 7)]
    *decoded, first, second = attention.forward(segments, inputs, native)
    for slot, position in enumerate((20, 3, 50)):
        torch.testing.assert_close(decoded[slot][0], expected[slot][position], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([first, second]), expected[3][:37], atol=2e-5, rtol=1e-4)


@both_attentions
@pytest.mark.parametrize("options", [{}, {"window": 6}, {"s_aux": sinks_of(SMALL)}], ids=["plain", "window", "sinks"])
def test_neighbouring_slots_with_several_tokens_equal_each_slot_alone(options: dict[str, Any], native: bool) -> None:
    attention, inputs = CachedAttention(3), {slot: QKV.random(SMALL, 20 + slot) for slot in range(3)}
    starts = (5, 0, 40)
    for slot, start in enumerate(starts):
        if start:
            attention.forward([Segment(slot, (0,), start)], inputs, native, **options)
    results = attention.forward([Segment(0, starts, 8)], inputs, native, **options)
    for slot, start in enumerate(starts):
        expected = defined_attention(inputs[slot], options.get("window"), sinks=options.get("s_aux"))
        torch.testing.assert_close(results[slot], expected[start : start + 8], atol=2e-5, rtol=1e-4)


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, *SMALL_TYPES], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 13}, {"softcap": 5.0, "s_aux": sinks_of(SMALL)}],
    ids=["plain", "window", "soft cap and sinks"],
)
@given(cuts=strategies.sets(strategies.integers(1, LENGTH - 1), max_size=12))
@settings(max_examples=15, deadline=None)
def test_kernel_results_are_equal_to_the_bit_in_any_chunks(
    options: dict[str, Any], dtype: torch.dtype, cuts: set[int]
) -> None:
    qkv = QKV.random(SMALL, 30)
    whole = CachedAttention(dtype=dtype).prefill(qkv, True, [LENGTH], **options)
    chunked = CachedAttention(dtype=dtype).prefill(qkv, True, [*sorted(cuts), LENGTH], **options)
    assert torch.equal(chunked, whole)


@pytest.mark.compiler
@pytest.mark.usefixtures("two_threads")
@all_shapes
@pytest.mark.parametrize("window", [None, 13], ids=lambda window: f"window {window}")
def test_kernel_results_are_equal_to_the_bit_in_any_batch(shape: Shape, window: int | None) -> None:
    attention, inputs = CachedAttention(5), {slot: QKV.random(shape, 40 + slot) for slot in range(5)}
    alone = {slot: CachedAttention(5).prefill(qkv, True, [LENGTH], slot, window=window) for slot, qkv in inputs.items()}
    starts = tuple(10 + 11 * slot for slot in range(4))
    for slot, start in enumerate(starts):
        attention.forward([Segment(slot, (0,), start)], inputs, True, window=window)
    segments = [Segment(0, starts, 1), Segment(4, (0,), 33)]
    *decoded, chunk = attention.forward(segments, inputs, True, window=window)
    for slot, start in enumerate(starts):
        assert torch.equal(decoded[slot][0], alone[slot][start])
    assert torch.equal(chunk, alone[4][:33])


@both_attentions
def test_each_token_is_cached_at_its_slot_and_position_only(native: bool) -> None:
    attention, inputs = CachedAttention(4, 40), {slot: QKV.random(SMALL, 50 + slot) for slot in (1, 2)}
    attention.forward([Segment(1, (0, 15), 3)], inputs, native)
    for stored, name in ((attention.keys, "key"), (attention.values[..., : SMALL.value_size], "value")):
        assert torch.equal(stored[1, :, 0:3], getattr(inputs[1], name)[:, 0:3])
        assert torch.equal(stored[2, :, 15:18], getattr(inputs[2], name)[:, 15:18])
    count = 2 * 3 * SMALL.key_heads * SMALL.size
    assert int(attention.keys.count_nonzero()) == int(attention.values.count_nonzero()) == count


@pytest.mark.compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "infinity"])
@pytest.mark.parametrize("start", [0, 20])
def test_the_kernel_never_reads_what_a_slot_held_before(start: int, bad: float) -> None:
    attention, qkv, broken = CachedAttention(), QKV.random(SMALL, 83), QKV.random(SMALL, 84)
    broken.key[:], broken.value[:] = bad, bad
    if start:
        attention.prefill(qkv, True, [start])
    attention.forward([Segment(0, (start,), LENGTH - start)], {0: broken}, True)
    (result,) = attention.forward([Segment(0, (start,), 9)], {0: qkv}, True)
    torch.testing.assert_close(result, defined_attention(qkv)[start : start + 9], atol=2e-5, rtol=1e-4)


def test_a_mask_is_causal_and_as_wide_as_the_window() -> None:
    span = Span(slot=0, rows=2, start=1, count=2, length=6)
    metadata = AttentionMetadata(torch.tensor([9, 0, 0, 1, 1]), torch.tensor([0, 3, 4, 0, 1]), (span,))
    like = torch.zeros(1, dtype=torch.bfloat16)
    mask = metadata.mask(span, None, like)
    assert mask.shape == (2, 1, 2, 6)
    assert mask.dtype == torch.bfloat16
    assert (mask[:, 0] == 0).int().tolist() == [
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
    ]
    assert (metadata.mask(span, 2, like)[:, 0] == 0).int().tolist() == [
        [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]],
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
    ]


def test_all_layers_of_a_step_share_a_mask() -> None:
    span = Span(slot=0, rows=1, start=0, count=2, length=2)
    metadata = AttentionMetadata(torch.tensor([0, 0]), torch.tensor([0, 1]), (span,))
    like = torch.zeros(1)
    assert metadata.mask(span, 2, like) is metadata.mask(span, 2, like)
    assert metadata.mask(span, 1, like) is not metadata.mask(span, 2, like)


def test_unsupported_attention_is_refused_with_its_reason() -> None:
    tokens, module = torch.ones(1, 2, 1, 4), nn.Module()
    for mask in (None, torch.zeros(1, 1, 1, 1)):
        with pytest.raises(UnsupportedModelError, match="mask"):
            slot_attention(module, tokens, tokens, tokens, mask)
    with pytest.raises(UnsupportedModelError, match="position bias"):
        slot_attention(module, tokens, tokens, tokens, CausalMask(), position_bias=tokens)


def masks(config: PreTrainedConfig, **options: Any) -> Any:
    """What transformers gives to the layers of a model that attends by our attention."""
    config._attn_implementation = ATTENTION
    positions = torch.tensor([[3, 9, 0, 1]])
    return create_masks_for_generate(config, torch.zeros(1, 4, 8), None, None, positions, **options)


def test_masks_of_transformers_say_which_window_they_have() -> None:
    assert masks(LlamaConfig()) == CausalMask()
    assert masks(MistralConfig(sliding_window=7)) == CausalMask(7)
    kinds = ["full_attention", "sliding_attention"]
    config = Qwen3Config(num_hidden_layers=2, layer_types=kinds, use_sliding_window=True, sliding_window=9)
    assert masks(config) == {"full_attention": CausalMask(), "sliding_attention": CausalMask(9)}


def test_masks_that_are_not_causal_are_refused() -> None:
    bidirectional = LlamaConfig()
    bidirectional.is_causal = False
    with pytest.raises(UnsupportedModelError, match="not causal"):
        masks(bidirectional)
    with pytest.raises(UnsupportedModelError, match="not causal"):
        masks(LlamaConfig(), or_mask_function=lambda batch, head, query, key: key >= 0)
