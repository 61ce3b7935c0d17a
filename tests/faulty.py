"""An engine whose forward fails when a test wants it to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from models.engine import Engine
from models.forward import Batch
from models.kv_cache import KVCache
from models.sequence import Sequence

Fault = Callable[[list[Sequence]], BaseException | None]


class FaultyEngine(Engine):
    """Raises after a forward what `fault` says of the sequences that took part; of a probe, of none."""

    def __init__(self, model: PreTrainedModel, fault: Fault, slots: int = 8, native: bool = True) -> None:
        self.fault: Fault = lambda sequences: None  # while the engine looks at the model
        super().__init__(model, slots, context=128, prefill_chunk=16, native=native)
        self.fault = fault

    def _forward(self, batch: Batch, unattached: KVCache | None = None) -> Tensor:
        logits = super()._forward(batch, unattached)
        if error := self.fault([sequence for sequence, _ in batch.read]):
            raise error
        return logits


class Broken:
    """A fault as of a CUDA device assert: from the third token of `poison` on, nothing works any more."""

    def __init__(self, poison: Sequence) -> None:
        self.poison = poison
        self.broken = False

    def __call__(self, sequences: list[Sequence]) -> BaseException | None:
        self.broken |= self.poison in sequences and self.poison.generated == 3
        return RuntimeError("CUDA error: device-side assert triggered\nCompile with...") if self.broken else None
