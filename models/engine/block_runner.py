"""Runs the model on one GPU: chunks of sequences in, logits out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.engine.batch import Batch
from models.engine.block_attention import ATTENTION, STEP, BlockMetadata
from models.engine.block_batch import PaddedBatch, Sizes, most_sequences
from models.engine.block_cache import BlockCache
from models.engine.block_pool import BlockPool
from models.engine.compiled_layers import CompiledLayers, only_compiled
from models.engine.forward import Forward, replace_attention
from models.engine.fused_attention import FusedAttention, SequenceLayout
from models.engine.graphs import Graphs, Step
from models.engine.long_rope import choose_frequencies
from models.engine.scheduler import UNKNOWN, Chunk, Placement, PrefillLimits
from models.engine.subprocesses import Subprocesses
from models.engine.transfers import to_device, use_device
from models.errors import CompilationError, UnsupportedModelError

BLOCK = 64  # tokens; smaller ones would need longer tables, and larger ones share less
MOST = 64  # kinds of steps that are kept; each has a graph, with some memory


@dataclass(eq=False)
class StaticStep:
    """A step for inputs of fixed sizes, which are written to one tensor."""

    inputs: Tensor  # (numbers,)
    compute: Step
    replay: Step | None = None  # the same as a graph
    runs: int = 0


class BlockRunner:
    """A model with its key-value cache in blocks, on one device. It replaces its attention.

    Steps of the same sizes are captured as CUDA graphs when they come for the second time. The token of a sequence that
    the device has just computed is the next step's input: the host need not know it. `cache_dtype` is the dtype of
    keys and values; None is the model's own. `blocks` is how many the cache has; None are as many as are needed, or
    as fit. Raises UnsupportedModelError if the attention cannot be replaced, and CacheTooLargeError.
    """

    prefill = PrefillLimits(beside=512, alone=2048, depth=16384)
    whole_prefixes = False
    works_ahead = True

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int,
        context: int,
        cache_dtype: torch.dtype | None = None,
        block_size: int = BLOCK,
        blocks: int | None = None,
        fused: FusedAttention | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.model = model
        self.device = model.device
        self.slots = slots
        self.context = context
        use_device(self.device)
        self.cache = BlockCache(slots, context, block_size, self.device, cache_dtype, fused or FusedAttention())
        choose_frequencies(model, context)
        self.forward = Forward(model)
        self._layers: CompiledLayers | None = None
        self._new_layers: CompiledLayers | None = None  # compiled, and not used yet
        self._graphs = graphs or Graphs(self.device)
        self._steps: OrderedDict[Sizes, StaticStep] = OrderedDict()
        self._new_tokens = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)  # the last one of each slot
        self._logits = self._replace_attention(blocks)
        self.logits_size = self._logits.shape[-1]
        embeddings = cast(nn.Embedding, model.get_input_embeddings())
        self.vocabulary = min(self.logits_size, embeddings.num_embeddings)

    @property
    def blocks(self) -> BlockPool:
        return self.cache.pool

    @property
    def capacity(self) -> int:
        return self.cache.pool.capacity

    def run(self, chunks: Iterable[Chunk]) -> Tensor:
        """Compute chunks, and the logits after those that give a token, (sequences, vocabulary)."""
        return self.run_batch(Batch(chunks))

    @torch.inference_mode()
    def run_batch(self, batch: Batch) -> Tensor:
        """Like `run`, for a given batch. The slots have the blocks that it needs."""
        self._use_new_layers()
        padded = PaddedBatch.of(batch, self.cache)
        self.cache.send_tables()
        numbers = to_device(padded.numbers(self.context), self.device)
        if padded.sizes.comes_again:
            logits = self._run_again(padded.sizes, numbers)
        else:
            logits = self._compute(numbers, padded.sizes)
        return logits[: len(batch.logits_at)]

    @torch.inference_mode()
    def keep(self, slots: Tensor, tokens: Tensor) -> None:
        """Keep the new tokens of some slots, both (rows,), for the next step."""
        self._new_tokens.index_copy_(0, slots, tokens)

    @torch.inference_mode()
    def prepare_slot(self, placement: Placement) -> None:
        """Let a slot begin with the blocks of the prefix that another slot holds. The last one is copied."""
        if copy := self.cache.pool.share(placement.source, placement.slot, placement.length):
            self.cache.copy_block(*copy)

    def discard(self, chunks: Iterable[Chunk]) -> None:
        """Nothing has to be undone: what a failed run has written is finite, and is written again."""

    @torch.inference_mode()
    def probe(self) -> None:
        """Run a batch that belongs to no sequence. Raises the error of a broken device."""
        self._run_padding(13).sum().item()  # item() waits until the device is done

    @property
    def compiles(self) -> bool:
        """Whether `compile` makes it faster."""
        return self.device.type == "cuda"

    @property
    def compiled(self) -> bool:
        return self._layers is not None

    def compile(self, cache: Path, subprocesses: Subprocesses | None = None) -> None:
        """Compile the layers, and use them from the next step on; `cache` is the folder for programs.

        Call it in another thread than the one that steps, which goes on meanwhile, without new graphs. It ends between
        two layers once `subprocesses` is stopped. Raises CompilationError and the errors of `make_private_folder`.
        """
        if self.cache.repeats:
            raise CompilationError("its layers run several times, each time with keys and values of their own")
        layers = CompiledLayers(self.model)
        with self._graphs.no_capture():  # a capture fails if another thread uses the device
            layers.make(self._run_padding, cache / "layers", subprocesses or Subprocesses())
        self._new_layers = layers

    def _use_new_layers(self) -> None:
        if self._new_layers:
            self._layers, self._new_layers = self._new_layers, None
            self._layers.use()
            self._forget_steps()  # their graphs are of layers that were not compiled

    @torch.inference_mode()
    def _run_padding(self, tokens: int, attaches: bool = False) -> Tensor:
        """Compute tokens in the padding slot, which no sequence reads."""
        batch = Batch()
        batch.add(self.cache.padding_slot, [0] * tokens, 0)
        batch.logits_at = [tokens - 1]
        padded = PaddedBatch.exact(batch, self.cache)
        return self._compute(to_device(padded.numbers(self.context), self.device), padded.sizes, attaches)

    def _run_again(self, sizes: Sizes, numbers: Tensor) -> Tensor:
        """Run a step whose sizes may have come before."""
        step = self._steps.pop(sizes, None) or self._new_step(sizes)
        self._steps[sizes] = step  # the last one now
        if len(self._steps) > MOST:
            self._steps.popitem(last=False)
        step.inputs.copy_(numbers)
        step.runs += 1
        if step.runs == 1:
            return self._graphs.warm_up(step.compute)
        if not step.replay:
            try:
                step.replay = self._graphs.capture(step.compute)
            except torch.OutOfMemoryError:
                self._forget_steps()  # those that come often get their graphs again
        return step.replay() if step.replay else step.compute()

    def _new_step(self, sizes: Sizes) -> StaticStep:
        inputs = torch.zeros(sizes.numbers, dtype=torch.int64, device=self.device)
        logits = self._logits[: sizes.logits]  # of all steps: each graph would keep its own
        return StaticStep(inputs, lambda: logits.copy_(self._compute(inputs, sizes)))

    def _forget_steps(self) -> None:
        self._steps.clear()
        self._graphs.forget()

    def _compute(self, numbers: Tensor, sizes: Sizes, attaches: bool = False) -> Tensor:
        """Logits of a step from its inputs, (sequences, vocabulary); see `PaddedBatch.numbers`."""
        tokens, sequences = sizes.tokens, sizes.sequences
        lengths = [tokens, tokens, tokens, sizes.logits, sequences, sequences, sequences + 1]
        ids, slots, positions, logits_at, owners, ends, starts = torch.split(numbers, lengths)
        ids = torch.where(ids == UNKNOWN, self._new_tokens[slots], ids)
        size = self.cache.pool.size
        cells = self.cache.tables[slots, positions // size] * size + positions % size
        tables = self.cache.tables[owners]
        layout = SequenceLayout(starts.int(), ends.int(), tables, sizes.longest, sizes.reach)
        step = STEP.set(BlockMetadata(cells, positions, layout, sizes.groups, self.cache, attaches))
        try:
            with only_compiled() if self._layers else nullcontext():
                return self.forward.logits(ids, positions, logits_at)
        finally:
            STEP.reset(step)

    @torch.inference_mode()
    def _replace_attention(self, blocks: int | None) -> Tensor:
        """Make the model's attention use the blocks. Returns room for the logits of the largest step."""
        logits = replace_attention(self.model, ATTENTION, lambda: self._run_padding(13, attaches=True))
        if not self.cache.tensors:
            raise UnsupportedModelError("its attention does not go through transformers' attention interface")
        room = logits.new_empty(most_sequences(self.slots), logits.shape[-1])
        self.cache.allocate(blocks)  # last, since it takes what is free
        return room
