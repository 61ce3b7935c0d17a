"""What the engine asks of whatever runs a model."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.engine.block_pool import BlockPool
from models.engine.block_runner import BlockRunner
from models.engine.model_runner import ModelRunner
from models.engine.recurrent_layer import has_recurrent_layers
from models.engine.scheduler import Chunk, Placement, PrefillLimits
from models.engine.subprocesses import Subprocesses


class Cache(Protocol):
    """The keys and values of all sequences."""

    @property
    def size(self) -> int:
        """The bytes of all tensors."""

    @property
    def dtype_name(self) -> str:
        """The dtype of keys and values, as the settings name it."""


class Runner(Protocol):
    """Runs a model over the slots of its cache: chunks of sequences in, logits out.

    `ModelRunner` keeps the cache in slots, for a CPU and for models over several devices. `BlockRunner` keeps it in
    blocks, for one GPU.
    """

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def cache(self) -> Cache: ...

    @property
    def slots(self) -> int: ...

    @property
    def context(self) -> int:
        """The most tokens of a sequence."""

    @property
    def vocabulary(self) -> int:
        """Ids below it are known."""

    @property
    def logits_size(self) -> int: ...

    @property
    def capacity(self) -> int:
        """The tokens of the whole cache."""

    @property
    def prefill(self) -> PrefillLimits: ...

    @property
    def blocks(self) -> BlockPool | None:
        """The blocks of the cache, if it is in blocks."""

    @property
    def whole_prefixes(self) -> bool:
        """Whether a prompt reuses all tokens of a slot or none."""

    @property
    def works_ahead(self) -> bool:
        """Whether the next step is launched before the tokens of this one are read."""

    @property
    def compiles(self) -> bool:
        """Whether `compile` makes it faster."""

    @property
    def compiled(self) -> bool: ...

    def prepare_slot(self, placement: Placement) -> None:
        """Prepare a slot for a prompt, of which another slot may hold the beginning."""

    def run(self, chunks: list[Chunk]) -> Tensor:
        """Compute chunks, and the logits after those that give a token, (sequences, vocabulary)."""

    def keep(self, slots: Tensor, tokens: Tensor) -> None:
        """Keep the new tokens of some slots, both (rows,), if the next step has to find them on the device."""

    def discard(self, chunks: list[Chunk]) -> None:
        """Undo what a failed run of some chunks may have written."""

    def probe(self) -> None:
        """Run a batch that belongs to no sequence. Raises the error of a broken device."""

    def compile(self, cache: Path, subprocesses: Subprocesses | None = None) -> None:
        """Make it faster, in another thread than the one that steps, which goes on meanwhile."""


def uses_blocks(model: PreTrainedModel) -> bool:
    """Whether a model's cache is kept in blocks: on one GPU, if all that a layer keeps is keys and values."""
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda" and not has_recurrent_layers(model)


def make_runner(model: PreTrainedModel, slots: int, context: int, cache_dtype: torch.dtype | None = None) -> Runner:
    """The runner for a model. Raises UnsupportedModelError and CacheTooLargeError."""
    if uses_blocks(model):
        return BlockRunner(model, slots, context, cache_dtype)
    return ModelRunner(model, slots, context, cache_dtype=cache_dtype)
