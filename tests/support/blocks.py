"""Engines whose cache is in blocks, and stand-ins for what needs a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.engine.attention import Scoring, rounded
from models.engine.block_pool import BlockPool
from models.engine.block_runner import BlockRunner
from models.engine.engine import Engine
from models.engine.fused_attention import FusedAttention, SequenceLayout, attend_by_sequence
from models.engine.graphs import Graphs, Step
from tests.support.faulty import limits

BLOCK = 16  # tokens


class PlainFused(FusedAttention):
    """Computes what our kernels compute, with operators of torch: they take long without a GPU."""

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, cells: Tensor) -> None:
        for cached, new in ((keys, key), (values, value)):
            cached.flatten(0, 1)[cells] = rounded(torch.nan_to_num(new.transpose(0, 1), 0.0, 0.0, 0.0), cached.dtype)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, layout: SequenceLayout, scoring: Scoring) -> Tensor:
        assert int((layout.starts[1:] - layout.starts[:-1]).max()) <= layout.longest
        assert int(layout.lengths.max()) <= layout.reach
        return attend_by_sequence(query, keys, values, layout, scoring)


class CountingGraphs(Graphs):
    """Counts captures and replays; a captured step is the step itself."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.captured = 0
        self.replayed = 0

    def capture(self, step: Step) -> Step:
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            return step()

        return replay


def block_engine(
    model: PreTrainedModel,
    slots: int,
    context: int,
    prefill_chunk: int = 32,
    blocks: int | None = None,
    fused: FusedAttention | None = None,
    graphs: Graphs | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Engine:
    """An engine over a model, with blocks of 16 tokens."""
    runner = BlockRunner(model, slots, context, cache_dtype, BLOCK, blocks, fused or PlainFused(), graphs)
    return Engine(runner, limits(prefill_chunk))


def block_runner(engine: Engine) -> BlockRunner:
    """The runner of an engine whose cache is in blocks."""
    assert isinstance(engine.runner, BlockRunner)
    return engine.runner


def blocks_of(engine: Engine) -> BlockPool:
    """The blocks of an engine's cache."""
    return block_runner(engine).blocks
