"""Runs the model: chunks of sequences in, logits out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from models.engine.attention import ATTENTION, STEP, AttentionMetadata, Span
from models.engine.batch import Batch
from models.engine.compilation import Program, compile_program
from models.engine.forward import Forward, replace_attention
from models.engine.kv_cache import KVCache
from models.engine.long_rope import choose_frequencies
from models.engine.native import build
from models.engine.quantization import QuantizedLinear
from models.engine.recurrent_layer import replace_recurrent_layers
from models.engine.scheduler import Chunk, Placement, PrefillLimits
from models.engine.state_cache import StateCache
from models.engine.subprocesses import Subprocesses
from models.errors import CompilationError, UnsupportedModelError


class SlotForward(Forward):
    """The forward of a model whose sequences are in slots."""

    def __init__(self, model: PreTrainedModel, native: bool) -> None:
        super().__init__(model)
        self.native = native

    def forward(
        self,
        ids: Tensor,
        slots: Tensor,
        positions: Tensor,
        logits_at: Tensor,
        spans: tuple[Span, ...] = (),
        attach_to: KVCache | None = None,
    ) -> Tensor:
        """Logits after the tokens `logits_at`, (sequences, vocabulary); ids, slots and positions are (tokens,)."""
        step = STEP.set(AttentionMetadata(slots, positions, spans, self.native, attach_to))
        try:
            return self.logits(ids, positions, logits_at)
        finally:
            STEP.reset(step)


class ModelRunner:
    """A model with its key-value cache and the states of its recurrent layers. It replaces its attention and these.

    On a CPU our kernels compute the attention, unless `native` is False or they are not loaded. `cache_dtype` is the
    dtype of keys and values; None is a good one. Raises UnsupportedModelError if the attention cannot be replaced, and
    CacheTooLargeError. Whether the results are right is for `check_architecture` to say.
    """

    prefill = PrefillLimits(beside=32, alone=512)
    blocks = None  # a slot has room for the whole context
    works_ahead = False

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int,
        context: int,
        native: bool = True,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.device = model.device
        self.context = context
        self.native = native and build.loaded_library() is not None and self.device.type == "cpu"
        self.quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
        self.cache = KVCache(slots, context, cache_dtype or self._cache_dtype())
        self.states = StateCache(self.cache)
        replace_recurrent_layers(model, self.states)
        self.program: Program | None = None  # computes what `forward` computes, once it is compiled
        choose_frequencies(model, context)
        self.forward = SlotForward(model, self.native)
        self.logits_size = self._replace_attention()
        embeddings = cast(nn.Embedding, model.get_input_embeddings())
        self.vocabulary = min(self.logits_size, embeddings.num_embeddings)

    @property
    def slots(self) -> int:
        return self.cache.slots

    @property
    def compiles(self) -> bool:
        """Whether `compile` makes it faster."""
        return self.native

    @property
    def compiled(self) -> bool:
        return self.program is not None

    @property
    def capacity(self) -> int:
        return self.slots * self.context

    @property
    def whole_prefixes(self) -> bool:
        return bool(self.states)

    def keep(self, slots: Tensor, tokens: Tensor) -> None:
        """Nothing is kept: the next step gets new tokens from the host."""

    def run(self, chunks: Iterable[Chunk]) -> Tensor:
        """Compute chunks, and the logits after those that give a token, (sequences, vocabulary)."""
        return self.run_batch(Batch(chunks))

    @torch.inference_mode()
    def run_batch(self, batch: Batch, attach_to: KVCache | None = None) -> Tensor:
        """Like `run`, for a given batch."""
        if len(batch.ids) == 1 and not self.states:  # a single token would need its own program
            batch.add(self.cache.padding_slot, [0], 0)
        inputs = self._inputs(batch)
        if self.program:
            return self.program(*inputs)
        with self.states.step(batch):
            logits: Tensor = self.forward(*inputs, tuple(batch.spans), attach_to)
        return logits

    @torch.inference_mode()
    def prepare_slot(self, placement: Placement) -> None:
        """Prepare a slot for a prompt: copy the prefix that another slot holds; for torch, clear stale positions."""
        if placement.length and placement.slot != placement.source:
            self.cache.copy(placement.source, placement.slot, placement.length)
            self.states.copy(placement.source, placement.slot, placement.length)
        if not self.native:
            self.cache.clear(placement.slot, placement.length, placement.stale)

    @torch.inference_mode()
    def discard(self, chunks: Iterable[Chunk]) -> None:
        """Clear the positions that a failed run may have written."""
        if not self.native:
            for chunk in chunks:
                self.cache.clear(chunk.sequence.slot, chunk.start, chunk.start + chunk.count)

    @torch.inference_mode()
    def probe(self) -> None:
        """Run a batch that belongs to no sequence. Raises the error of a broken device."""
        self.run_batch(self._probe_batch()).sum().item()  # item() waits until the device is done

    def compile(self, cache: Path, subprocesses: Subprocesses | None = None) -> None:
        """Compile the model and use the program from then on; `cache` is the folder for programs.

        Call it in another thread than the one that steps, which goes on meanwhile. Raises the errors of
        `compile_program`; CompilationError too if the model has recurrent layers.
        """
        if self.states:
            raise CompilationError("it has recurrent layers, which compute one sequence after another")
        inputs, tokens, sequences = self._inputs(self._probe_batch()), Dim("tokens", min=2), Dim("sequences", min=1)
        sizes = (tokens, tokens, tokens, sequences)
        self.program = compile_program(self.forward, inputs, sizes, repr(self.model.config), cache, subprocesses)

    def _cache_dtype(self) -> torch.dtype | None:
        """The dtype of keys and values; None is the model's own."""
        # bfloat16 is half the bytes to read, at a smaller error than that of int8 linears.
        return torch.bfloat16 if self.quantized else None

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The tensors that `Forward` takes."""
        numbers = (batch.ids, batch.slots, batch.positions, batch.logits_at or [0])
        return tuple(torch.tensor(some, device=self.device) for some in numbers)

    def _probe_batch(self) -> Batch:
        """A batch in the padding slot, which no sequence reads."""
        batch = Batch()
        batch.add(self.cache.padding_slot, [0] * 13, 0)
        batch.logits_at = [3, 7, 12]
        return batch

    @torch.inference_mode()
    def _replace_attention(self) -> int:
        """Make the model's attention use the slots. Returns the logits' size."""
        logits = replace_attention(
            self.model, ATTENTION, lambda: self.run_batch(self._probe_batch(), attach_to=self.cache)
        )
        if not self.cache.tensors and not self.states:
            raise UnsupportedModelError("its attention does not go through transformers' attention interface")
        return logits.shape[-1]
