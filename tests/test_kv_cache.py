from __future__ import annotations

import itertools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor, nn

from models.kv_cache import CacheTooLarge, KVCache, Part, Rows, UnsupportedModel, slot_attention

BOTH = pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
LENGTH = 70  # several blocks of lanes, the last one not full


@dataclass(frozen=True)
class Shape:
    heads: int
    key_heads: int
    size: int
    value_size: int


SMALL = Shape(4, 2, 12, 12)
SHAPES = [
    Shape(4, 4, 16, 16),
    Shape(9, 3, 64, 64),
    Shape(6, 2, 12, 20),  # neither size a multiple of 16
    Shape(7, 1, 5, 72),  # all queries share one key; values need a wide and a narrow column
    Shape(4, 2, 48, 16),
]


@dataclass(frozen=True)
class Text:
    """Queries, keys and values of one sequence: (heads, length, size) each."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def random(cls, shape: Shape, seed: int, length: int = LENGTH) -> Text:
        source = torch.Generator().manual_seed(seed)
        sizes = [(shape.heads, shape.size), (shape.key_heads, shape.size), (shape.key_heads, shape.value_size)]
        return cls(*(2 * torch.randn(heads, length, size, generator=source) for heads, size in sizes))

    def to(self, dtype: torch.dtype) -> Text:
        return Text(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype))


@dataclass(frozen=True)
class Span:
    """Tokens of neighbouring slots from `slot` on: `count` each, from a position of its own each."""

    slot: int
    starts: tuple[int, ...]
    count: int


class Slots:
    """An attention module with a cache, fed in forwards of any make."""

    def __init__(self, slots: int = 3, context: int = LENGTH, dtype: torch.dtype | None = None) -> None:
        self.module = nn.Module()
        self.cache = KVCache(slots, context, dtype)

    @property
    def keys(self) -> Tensor:
        """What is stored, (slots + 1, heads, positions, size)."""
        return self.cache.modules[self.module][0].transpose(-1, -2).flatten(2, 3)

    @property
    def values(self) -> Tensor:
        return self.cache.modules[self.module][1]

    def forward(self, spans: list[Span], texts: dict[int, Text], native: bool, **options: Any) -> list[Tensor]:
        """One forward; the results of each slot of each span, (count, heads, value size)."""
        slots: list[int] = []
        positions: list[int] = []
        parts = []
        for span in spans:
            length = max(span.starts) + span.count
            parts.append(Part(span.slot, len(span.starts), len(slots), span.count, length))
            for row, start in enumerate(span.starts):
                slots += [span.slot + row] * span.count
                positions += range(start, start + span.count)
        places = list(zip(slots, positions, strict=True))
        query = torch.stack([texts[slot].query[:, position] for slot, position in places], 1)[None]
        key = torch.stack([texts[slot].key[:, position] for slot, position in places], 1)[None]
        value = torch.stack([texts[slot].value[:, position] for slot, position in places], 1)[None]
        unattached = None if self.cache.modules else self.cache
        rows = Rows(torch.tensor(slots), torch.tensor(positions), tuple(parts), native, unattached)
        output, _ = slot_attention(self.module, query, key, value, None, rows=rows, **options)
        assert output.shape == (1, len(places), query.shape[1], value.shape[3])
        counts = [span.count for span in spans for _ in span.starts]
        return list(torch.split(output[0], counts))

    def read(self, text: Text, native: bool, ends: list[int], slot: int = 0, **options: Any) -> Tensor:
        """All results of a text that is read in chunks which end at `ends`, (length, heads, value size)."""
        results = []
        for start, end in itertools.pairwise([0, *ends]):
            results += self.forward([Span(slot, (start,), end - start)], {slot: text}, native, **options)
        return torch.cat(results)


def written_out(
    text: Text,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention as its definition says, a query at a time: (length, heads, value size)."""
    query, key, value = (tensor.double() for tensor in (text.query, text.key, text.value))
    heads, length, size = query.shape
    result = torch.zeros(length, heads, value.shape[2], dtype=torch.float64)
    for head in range(heads):
        key_head = head // (heads // len(key))
        for position in range(length):
            seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
            scores = key[key_head, seen] @ query[head, position] * (scale or size**-0.5)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
            result[position, head] = weights @ value[key_head, seen] / total
    return result.float()


def sinks_of(shape: Shape) -> Tensor:
    return torch.linspace(-3, 4, shape.heads)


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 7, 16, 40, 1000])
def test_grouped_queries_and_windows_of_every_size_equal_attention_written_out(
    shape: Shape, window: int | None, native: bool
) -> None:
    text = Text.random(shape, 1)
    expected = written_out(text, window)
    for ends in ([LENGTH], [1, 17, 48, 69, LENGTH]):
        torch.testing.assert_close(
            Slots().read(text, native, ends, sliding_window=window), expected, atol=2e-5, rtol=1e-4
        )


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("softcap", "sinks"), [(3.0, False), (None, True), (50.0, True)])
def test_soft_caps_and_sinks_equal_attention_written_out(
    shape: Shape, window: int | None, softcap: float | None, sinks: bool, native: bool
) -> None:
    text = Text.random(shape, 2)
    options = {"softcap": softcap, "scale": 0.3}
    expected = written_out(text, window, sinks=sinks_of(shape) if sinks else None, **options)
    result = Slots().read(
        text,
        native,
        [20, 33, LENGTH],
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks_of(shape) if sinks else None,
        scaling=0.3,
    )
    torch.testing.assert_close(result, expected, atol=5e-5, rtol=1e-4)


@BOTH
def test_the_window_of_the_module_holds_where_the_call_names_none(native: bool) -> None:
    slots, text = Slots(), Text.random(SMALL, 3)
    slots.module.sliding_window = 5  # type: ignore[assignment]
    torch.testing.assert_close(slots.read(text, native, [LENGTH]), written_out(text, 5), atol=2e-5, rtol=1e-4)


@BOTH
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2, 1e4])
def test_scores_near_zero_and_in_the_thousands_come_out_right(size: float, native: bool) -> None:
    text = Text.random(SMALL, 4)
    # Doubles hold these scores only if the highest is taken away first.
    query = text.query.double() * size
    scores = torch.einsum("hqs,hks->hqk", query, text.key.double().repeat_interleave(2, 0)) * SMALL.size**-0.5
    masked = scores.masked_fill(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), -torch.inf)
    expected = masked.softmax(-1) @ text.value.double().repeat_interleave(2, 0)
    result = Slots().read(Text(text.query * size, text.key, text.value), native, [LENGTH])
    torch.testing.assert_close(result, expected.transpose(0, 1).float(), atol=1e-5 * max(size, 10), rtol=1e-4)


@BOTH
@pytest.mark.parametrize("size", [20.0, 44.4, 45.0, 60.0, 1000.0])
def test_scores_far_above_the_soft_cap_are_capped(native: bool, size: float) -> None:
    text = Text(torch.full((1, 2, 1), size), torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[1.0], [0.0]]]))
    result = Slots().read(text, native, [2], softcap=1.0, scaling=1.0)
    # The second token's scores are `size` and 0, and 1 and 0 when they are capped.
    torch.testing.assert_close(result[:, 0, 0], torch.tensor([1.0, 1 / (1 + math.exp(-1))]))


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"softcap": 5.0}], ids=str)
def test_a_bfloat16_cache_costs_the_rounding_of_keys_and_values_and_nothing_else(
    shape: Shape, options: dict[str, Any], native: bool
) -> None:
    text = Text.random(shape, 5)
    rounded = text.to(torch.bfloat16)
    expected = written_out(
        Text(text.query, rounded.key, rounded.value), options.get("sliding_window"), options.get("softcap")
    )
    slots = Slots(dtype=torch.bfloat16)
    torch.testing.assert_close(slots.read(text, native, [31, LENGTH], **options), expected, atol=5e-5, rtol=1e-4)
    assert slots.keys.dtype == slots.values.dtype == torch.bfloat16


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_gets_results_of_its_own_dtype(dtype: torch.dtype, native: bool) -> None:
    text = Text.random(SMALL, 6).to(dtype)
    # A float16 cache is not the kernel's: float16 models are for accelerators.
    result = Slots(dtype=torch.bfloat16 if native else None).read(text, native, [40, LENGTH])
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), written_out(text), atol=0.1, rtol=0.02)


@BOTH
def test_several_slots_in_one_forward_see_each_its_own_sequence(native: bool) -> None:
    slots, texts = Slots(4), {slot: Text.random(SMALL, 10 + slot) for slot in range(4)}
    expected = {slot: written_out(text) for slot, text in texts.items()}
    # Slot 3 reads its prompt in two spans of one forward; 0, 1 and 2 decode beside it, in one part.
    for slot, length in ((0, 20), (1, 3), (2, 50)):
        slots.forward([Span(slot, (0,), length)], texts, native)
    spans = [Span(0, (20, 3, 50), 1), Span(3, (0,), 30), Span(3, (30,), 7)]
    *decoded, first, second = slots.forward(spans, texts, native)
    for slot, position in enumerate((20, 3, 50)):
        torch.testing.assert_close(decoded[slot][0], expected[slot][position], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([first, second]), expected[3][:37], atol=2e-5, rtol=1e-4)


@BOTH
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 6}, {"s_aux": sinks_of(SMALL)}], ids=["", "window", "sinks"]
)
def test_a_part_of_neighbouring_slots_with_several_tokens_each_equals_each_slot_alone(
    options: dict[str, Any], native: bool
) -> None:
    slots, texts = Slots(3), {slot: Text.random(SMALL, 20 + slot) for slot in range(3)}
    starts = (5, 0, 40)
    for slot, start in enumerate(starts):
        if start:
            slots.forward([Span(slot, (0,), start)], texts, native, **options)
    results = slots.forward([Span(0, starts, 8)], texts, native, **options)
    for slot, start in enumerate(starts):
        expected = written_out(texts[slot], options.get("sliding_window"), sinks=options.get("s_aux"))
        torch.testing.assert_close(results[slot], expected[start : start + 8], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 13}, {"softcap": 5.0, "s_aux": sinks_of(SMALL)}],
    ids=["", "window", "softcap and sinks"],
)
@given(cuts=strategies.sets(strategies.integers(1, LENGTH - 1), max_size=12))
@settings(max_examples=15, deadline=None)
def test_no_chunking_of_a_prompt_changes_a_bit(options: dict[str, Any], dtype: torch.dtype, cuts: set[int]) -> None:
    text = Text.random(SMALL, 30)
    whole = Slots(dtype=dtype).read(text, True, [LENGTH], **options)
    assert torch.equal(Slots(dtype=dtype).read(text, True, [*sorted(cuts), LENGTH], **options), whole)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 13])
def test_no_company_in_a_forward_changes_a_bit_of_a_row(shape: Shape, window: int | None) -> None:
    slots, texts = Slots(5), {slot: Text.random(shape, 40 + slot) for slot in range(5)}
    alone = {slot: Slots(5).read(text, True, [LENGTH], slot, sliding_window=window) for slot, text in texts.items()}
    for slot in range(4):
        slots.forward([Span(slot, (0,), 10 + 11 * slot)], texts, True, sliding_window=window)
    starts = tuple(10 + 11 * slot for slot in range(4))
    *decoded, chunk = slots.forward([Span(0, starts, 1), Span(4, (0,), 33)], texts, True, sliding_window=window)
    for slot, start in enumerate(starts):
        assert torch.equal(decoded[slot][0], alone[slot][start])
    assert torch.equal(chunk, alone[4][:33])


@BOTH
def test_each_token_is_written_to_its_own_slot_and_position_and_to_nothing_else(native: bool) -> None:
    slots, texts = Slots(4, 40), {slot: Text.random(SMALL, 50 + slot) for slot in (1, 2)}
    slots.forward([Span(1, (0, 15), 3)], texts, native)
    for stored, name in ((slots.keys, "key"), (slots.values[..., : SMALL.value_size], "value")):
        assert torch.equal(stored[1, :, 0:3], getattr(texts[1], name)[:, 0:3])
        assert torch.equal(stored[2, :, 15:18], getattr(texts[2], name)[:, 15:18])
    assert int(slots.keys.count_nonzero()) == int(slots.values.count_nonzero()) == 2 * 3 * 2 * SMALL.size


def test_what_the_scratch_slot_holds_is_no_slots_of_a_sequence() -> None:
    assert KVCache(4, 40).scratch == 4
    slots, text = Slots(4, 40), Text.random(SMALL, 60)
    slots.forward([Span(slots.cache.scratch, (0,), 13)], {slots.cache.scratch: text}, True)
    assert not slots.keys[:4].any()
    assert torch.equal(slots.keys[4, :, :13], text.key[:, :13])


def test_modules_have_tensors_of_their_own() -> None:
    cache, modules = KVCache(2, 8), [nn.Module(), nn.Module()]
    tokens = torch.ones(1, 2, 1, 4)
    for module in modules:
        cache.attach(module, tokens, tokens)
    assert len({tensor.data_ptr() for pair in cache.modules.values() for tensor in pair}) == 4
    assert [cache.modules[module][0] is module.cached_keys for module in modules] == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cache_takes_the_dtype_that_the_model_shows_or_its_own_and_starts_at_zero(dtype: torch.dtype) -> None:
    tokens = torch.ones(1, 2, 1, 4, dtype=dtype)
    for cache, expected in ((KVCache(2, 8), dtype), (KVCache(2, 8, torch.bfloat16), torch.bfloat16)):
        module = nn.Module()
        cache.attach(module, tokens, tokens)
        for tensor in cache.modules[module]:
            assert tensor.dtype == expected
            assert not tensor.any()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory a process has")
def test_slots_that_were_never_written_take_no_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    cache, before, tokens = KVCache(31, 2**16), resident(), torch.ones(1, 1, 1, 64)
    cache.attach(nn.Module(), tokens, tokens)
    assert sum(tensor.nbytes for pair in cache.modules.values() for tensor in pair) == 2**30
    assert resident() - before < 2**26


def test_a_mask_is_causal_and_as_wide_as_the_window() -> None:
    part = Part(slot=0, rows=2, start=1, count=2, length=6)
    rows = Rows(torch.tensor([9, 0, 0, 1, 1]), torch.tensor([0, 3, 4, 0, 1]), (part,))
    like = torch.zeros(1, dtype=torch.bfloat16)
    mask = rows.mask(part, None, like)
    assert mask.shape == (2, 1, 2, 6)
    assert mask.dtype == torch.bfloat16
    assert (mask[:, 0] == 0).int().tolist() == [
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
    ]
    assert (rows.mask(part, 2, like)[:, 0] == 0).int().tolist() == [
        [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]],
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
    ]


@BOTH
@pytest.mark.parametrize("length", [16, 21, 48])
def test_a_copy_lets_a_slot_continue_as_the_other_and_on_its_own(length: int, native: bool) -> None:
    slots, text, other = Slots(), Text.random(SMALL, 70), Text.random(SMALL, 71)
    pairs = ((text.query, other.query), (text.key, other.key), (text.value, other.value))
    mixed = Text(*(torch.cat([first[:, :length], second[:, length:]], 1) for first, second in pairs))
    slots.read(text, native, [60])
    slots.cache.copy(0, 2, length)
    expected, count = written_out(mixed), LENGTH - length
    (continued,) = slots.forward([Span(2, (length,), count)], {2: mixed}, native)
    torch.testing.assert_close(continued, expected[length:], atol=2e-5, rtol=1e-4)
    (source,) = slots.forward([Span(0, (60,), 1)], {0: text}, native)
    torch.testing.assert_close(source, written_out(text)[60:61], atol=2e-5, rtol=1e-4)
    assert not slots.keys[1].any()


def test_a_copied_prefix_gives_the_same_bits_as_reading_it() -> None:
    slots, text = Slots(), Text.random(SMALL, 72)
    whole = slots.read(text, True, [LENGTH])
    slots.cache.copy(0, 1, 37)
    (continued,) = slots.forward([Span(1, (37,), LENGTH - 37)], {1: text}, True)
    assert torch.equal(continued, whole[37:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("start", [0, 20, 32])
def test_what_went_wrong_in_a_slot_does_not_reach_the_next_sequence_once_cleared(start: int, bad: float) -> None:
    """On torch's path, whose products take in what the mask hides; slot 1 makes the part reach far beyond slot 0."""
    slots, texts = Slots(2), {0: Text.random(SMALL, 80), 1: Text.random(SMALL, 81)}
    broken = Text.random(SMALL, 82)
    for tensor, good in zip((broken.key, broken.value), (texts[0].key, texts[0].value), strict=True):
        tensor[:] = bad
        tensor[:, :start] = good[:, :start]  # what the next sequence has in common with it
    slots.forward([Span(0, (0,), 60), Span(1, (0,), 65)], {0: broken, 1: texts[1]}, False)
    slots.cache.clear(0, start, 60)
    first, second = slots.forward([Span(0, (start, 65), 1)], texts, False)
    torch.testing.assert_close(first[0], written_out(texts[0])[start], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(second[0], written_out(texts[1])[65], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("start", [0, 20])
def test_what_went_wrong_in_a_slot_never_reaches_the_next_sequence_in_the_kernel(start: int, bad: float) -> None:
    slots, text, broken = Slots(), Text.random(SMALL, 83), Text.random(SMALL, 84)
    broken.key[:], broken.value[:] = bad, bad
    if start:
        slots.read(text, True, [start])
    slots.forward([Span(0, (start,), LENGTH - start)], {0: broken}, True)
    (result,) = slots.forward([Span(0, (start,), 9)], {0: text}, True)
    torch.testing.assert_close(result, written_out(text)[start : start + 9], atol=2e-5, rtol=1e-4)


def test_clear_forgets_no_more_than_it_was_told() -> None:
    slots, texts = Slots(2), {0: Text.random(SMALL, 85), 1: Text.random(SMALL, 86)}
    slots.forward([Span(0, (0, 0), LENGTH)], texts, False)
    slots.cache.clear(0, 37, 60)
    for stored, name in ((slots.keys, "key"), (slots.values[..., : SMALL.value_size], "value")):
        assert torch.equal(stored[0, :, :37], getattr(texts[0], name)[:, :37])
        assert torch.equal(stored[1, :, :LENGTH], getattr(texts[1], name))


@BOTH
def test_what_it_cannot_honour_is_refused(native: bool) -> None:
    tokens = torch.ones(1, 2, 1, 4)
    module = nn.Module()
    with pytest.raises(UnsupportedModel, match="keyword arguments"):
        slot_attention(module, tokens, tokens, tokens, None)
    rows = Rows(torch.tensor([0]), torch.tensor([0]), (Part(0, 1, 0, 1, 1),), native, KVCache(1, 8))
    with pytest.raises(UnsupportedModel, match="position bias"):
        slot_attention(module, tokens, tokens, tokens, None, rows=rows, position_bias=tokens)
    module.is_causal = False  # type: ignore[assignment]
    with pytest.raises(UnsupportedModel, match="not causal"):
        slot_attention(module, tokens, tokens, tokens, None, rows=rows)


def test_a_cache_that_no_memory_can_hold_says_what_to_lower() -> None:
    tokens = torch.ones(1, 2, 1, 4)
    with pytest.raises(CacheTooLarge, match=r"2097152 slots of 16777216 tokens: lower PARLEY_SLOTS or PARLEY_CONTEXT"):
        KVCache(2**21, 2**24).attach(nn.Module(), tokens, tokens)
