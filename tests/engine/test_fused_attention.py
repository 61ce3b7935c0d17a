from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.engine.attention import Scoring
from models.engine.fused_attention import PART, FusedAttention, SequenceLayout, attend_by_sequence
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence
from tests.engine.test_engine import generate, reference
from tests.support.blocks import PlainFused, block_engine, block_runner
from tests.support.tiny import prompts, tiny_gemma2, tiny_gpt_oss, tiny_llama

BLOCK = 16  # tokens
PLAIN = Scoring(0.25, None, None, None)

# Heads, key heads, sizes of keys and values.
SHAPES = [(4, 2, 16, 16), (14, 2, 64, 64), (3, 1, 48, 32), (2, 2, 192, 128), (40, 1, 16, 16)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Step:
    """Random queries of some sequences, and the cache that they attend to."""

    def __init__(
        self, counts: list[int], lengths: list[int], shape: tuple[int, int, int, int] = (4, 2, 16, 16)
    ) -> None:
        source = torch.Generator().manual_seed(sum(lengths))
        heads, key_heads, size, value_size = shape
        needed = [-(-length // BLOCK) for length in lengths]
        blocks = (1 + torch.randperm(sum(needed), generator=source)).int()
        self.tables = torch.zeros(len(counts), max(needed), dtype=torch.int32)
        for table, own in zip(self.tables, torch.split(blocks, needed), strict=True):
            table[: len(own)] = own
        self.query = torch.randn(heads, sum(counts), size, generator=source)
        self.keys = torch.randn(1 + sum(needed), BLOCK, key_heads, size, generator=source)
        self.values = torch.randn(1 + sum(needed), BLOCK, key_heads, value_size, generator=source)
        self.counts, self.lengths = counts, lengths

    @property
    def layout(self) -> SequenceLayout:
        starts, lengths = torch.tensor([0, *self.counts]).cumsum(0).int(), torch.tensor(self.lengths).int()
        return SequenceLayout(starts, lengths, self.tables, max(self.counts), max(self.lengths))

    def by_kernels(self, scoring: Scoring) -> Tensor:
        return FusedAttention().attend(self.query, self.keys, self.values, self.layout, scoring)

    def by_torch(self, scoring: Scoring) -> Tensor:
        return attend_by_sequence(self.query, self.keys, self.values, self.layout, scoring)


def assert_right(step: Step, scoring: Scoring) -> None:
    torch.testing.assert_close(step.by_kernels(scoring), step.by_torch(scoring), rtol=1e-5, atol=1e-5)


@shapes
@pytest.mark.parametrize("counts", [[1, 1, 1], [40, 1, 17]], ids=["decoding", "prompts"])
def test_the_kernels_compute_what_torch_computes(shape: tuple[int, int, int, int], counts: list[int]) -> None:
    assert_right(Step(counts, [61, 1, 33], shape), PLAIN)


@pytest.mark.parametrize("counts", [[1, 1], [30, 1]], ids=["decoding", "prompts"])
@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(0.25, 7, None, None),
        Scoring(0.25, None, 3.0, None),
        Scoring(0.25, None, None, torch.tensor([3.0, -2.0, 0.0, 5.0])),
        Scoring(0.5, 20, 2.0, torch.tensor([1.0, 1.5, 0.5, 0.0])),
    ],
    ids=["window", "softcap", "sinks", "all"],
)
def test_the_kernels_know_windows_soft_capping_and_sinks(counts: list[int], scoring: Scoring) -> None:
    assert_right(Step(counts, [90, 30], (4, 2, 16, 16)), scoring)


@pytest.mark.parametrize("window", [None, 100, 300])
@pytest.mark.parametrize("sinks", [None, torch.tensor([3.0, -2.0, 0.0, 5.0])], ids=["plain", "sinks"])
def test_long_sequences_that_decode_are_read_in_parts(window: int | None, sinks: Tensor | None) -> None:
    assert_right(Step([1, 1, 1], [3 * PART + 5, PART, 9]), Scoring(0.25, window, None, sinks))


def test_a_sequence_has_the_same_bits_in_any_company() -> None:
    together = Step([1, 1, 1], [200, 30, 77])
    alone = Step([1], [30])
    own = together.tables[1:2, :2].long()
    alone.query, alone.keys, alone.values = together.query[:, 1:2], together.keys, together.values
    alone.tables = own.int()
    assert torch.equal(together.by_kernels(PLAIN)[1:2], alone.by_kernels(PLAIN))


def test_sequences_without_tokens_at_the_end_change_nothing() -> None:
    step, padded = Step([20, 1], [50, 9]), Step([20, 1], [50, 9])
    padded.counts, padded.lengths = [20, 1, 0, 0], [50, 9, 0, 0]
    padded.tables = torch.cat([padded.tables, torch.zeros_like(padded.tables)])
    assert torch.equal(padded.by_kernels(PLAIN), step.by_kernels(PLAIN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keys_and_values_are_stored_in_their_cells(dtype: torch.dtype) -> None:
    # As the model gives them: heads are not the first dimension of their storage.
    key, value = torch.randn(3, 2, 48).transpose(0, 1), torch.randn(3, 2, 32).transpose(0, 1)
    keys, values = (torch.zeros(4, BLOCK, 2, size, dtype=dtype) for size in (48, 32))
    cells = torch.tensor([5, 40, 21])
    FusedAttention().store(key, value, keys, values, cells)
    for cache, new in ((keys, key), (values, value)):
        stored = cache.flatten(0, 1)
        torch.testing.assert_close(stored[cells].float(), new.transpose(0, 1), rtol=torch.finfo(dtype).eps, atol=0)
        stored[cells] = 0
        assert not stored.any()


def test_what_is_not_finite_is_stored_as_zero_and_what_is_too_large_as_the_largest_number() -> None:
    key = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 2.0]).expand(1, 1, 6)
    keys, values = torch.ones(2, BLOCK, 1, 6, dtype=torch.float16), torch.ones(2, BLOCK, 1, 6, dtype=torch.float16)
    FusedAttention().store(key, key, keys, values, torch.tensor([3]))
    for cache in (keys, values):
        assert cache[0, 3, 0].tolist() == [0, 0, 0, 65504, -65504, 2]


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2, tiny_gpt_oss])
def test_greedy_replies_by_the_kernels_equal_those_of_transformers(make: Callable[[], PreTrainedModel]) -> None:
    model, asked = make(), prompts(20, 35)
    expected = [reference(model, prompt, 6) for prompt in asked]
    engine = block_engine(model, 2, 64, fused=FusedAttention())
    assert not block_runner(engine).cache.needs_groups
    assert generate(engine, [Sequence(prompt, SamplingParams(), 6) for prompt in asked]) == expected


class ShortSighted(PlainFused):
    """Gives nearly right results, as kernels with another idea of the last key would."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, layout: SequenceLayout, scoring: Scoring) -> Tensor:
        return super().attend(query, keys, values, replace(layout, lengths=layout.lengths - 1), scoring)


class Forgetful(PlainFused):
    """Stores no values."""

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, cells: Tensor) -> None:
        super().store(key, values.flatten(0, 1)[cells].transpose(0, 1), keys, values, cells)


class Missing(FusedAttention):
    """Does not run, as where there is no Triton."""

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, cells: Tensor) -> None:
        raise ImportError("No module named 'triton'")


@pytest.mark.parametrize(
    ("kind", "level", "line"),
    [
        (ShortSighted, logging.WARNING, "our attention kernels give wrong results here: slower ones are used"),
        (Forgetful, logging.WARNING, "our attention kernels give wrong results here: slower ones are used"),
        (Missing, logging.INFO, "our attention kernels do not run here: ImportError: No module named 'triton'"),
    ],
)
def test_the_kernels_are_used_only_where_they_run_and_are_right(
    kind: type[FusedAttention], level: int, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "parley")
    engine = block_engine(tiny_llama(), 2, 64, fused=kind())
    assert block_runner(engine).cache.needs_groups
    assert ("parley", level, line) in caplog.record_tuples
