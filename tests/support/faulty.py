"""Engines over a given model, and engines whose forward fails when a test wants it to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.engine.batch import Batch
from models.engine.engine import Engine
from models.engine.kv_cache import KVCache
from models.engine.model_runner import ModelRunner
from models.engine.scheduler import Chunk, PrefillLimits
from models.engine.sequence import Sequence

Fault = Callable[[list[Sequence]], BaseException | None]

both_attentions = pytest.mark.parametrize(
    "native", [pytest.param(True, marks=pytest.mark.compiler, id="kernel"), pytest.param(False, id="torch")]
)


def limits(chunk: int) -> PrefillLimits:
    """The limits of an engine, with a chunk of some tokens beside sequences that decode."""
    return PrefillLimits(chunk, alone=16 * chunk)


def make_engine(
    model: PreTrainedModel,
    slots: int,
    context: int,
    prefill_chunk: int = 32,
    native: bool = True,
    cache_dtype: torch.dtype | None = None,
) -> Engine:
    """An engine over a model."""
    return Engine(ModelRunner(model, slots, context, native, cache_dtype), limits(prefill_chunk))


def slots_of(engine: Engine) -> ModelRunner:
    """The runner of an engine whose cache is in slots."""
    assert isinstance(engine.runner, ModelRunner)
    return engine.runner


class FaultyRunner(ModelRunner):
    """Raises, after each forward, the error that `fault` returns for its sequences; a probe has no sequences."""

    def __init__(self, model: PreTrainedModel, fault: Fault, slots: int, context: int, native: bool) -> None:
        self.fault: Fault = lambda sequences: None  # while the runner checks the model
        self._sequences: list[Sequence] = []
        super().__init__(model, slots, context, native)
        self.fault = fault

    def run(self, chunks: Iterable[Chunk]) -> Tensor:
        chunks = list(chunks)
        self._sequences = [chunk.sequence for chunk in chunks]
        try:
            return super().run(chunks)
        finally:
            self._sequences = []

    def run_batch(self, batch: Batch, attach_to: KVCache | None = None) -> Tensor:
        logits = super().run_batch(batch, attach_to)
        if error := self.fault(self._sequences):
            raise error
        return logits


def faulty_engine(model: PreTrainedModel, fault: Fault, slots: int = 8, native: bool = True) -> Engine:
    """An engine over a `FaultyRunner`."""
    return Engine(FaultyRunner(model, fault, slots, 128, native), limits(16))


class Broken:
    """A fault like a CUDA device assert: once `poison` has three tokens, every forward fails."""

    def __init__(self, poison: Sequence) -> None:
        self.poison = poison
        self.broken = False

    def __call__(self, sequences: list[Sequence]) -> BaseException | None:
        self.broken |= self.poison in sequences and self.poison.generated == 3
        return RuntimeError("CUDA error: device-side assert triggered\nCompile with...") if self.broken else None
