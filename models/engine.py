"""Continuous batching over token ids: sequences join and leave at any step."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from models import kernels
from models.compilation import Program, compiled
from models.kv_cache import ATTENTION, KVCache, Part, Rows, UnsupportedModel
from models.prefix_cache import PrefixCache
from models.quantization import Int8Linear
from models.sampling import Sampler, Sampling

Finish = Literal["stop", "max_output_tokens", "context_length"]


@dataclass(eq=False)
class Sequence:
    """A prompt and what follows it, and how far the engine has come with it."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    slot: int = field(default=-1, init=False)
    tokens: list[int] = field(init=False)  # the prompt and what was generated
    cached: int = field(default=0, init=False)  # tokens whose keys and values are in the slot
    reused: int = field(default=0, init=False)  # those of them that were there when it began
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.tokens = list(self.prompt)

    @property
    def prefilled(self) -> bool:
        return self.cached >= len(self.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.prompt)


class Token(NamedTuple):
    """One generated token; `finish` says why it is the last one, if it is."""

    sequence: Sequence
    id: int
    finish: Finish | None


class Batch:
    """The tokens of one forward, of many sequences in a row: some decode one token, some read a chunk of prompt."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.slots: list[int] = []
        self.positions: list[int] = []
        self.parts: list[Part] = []
        self.read: list[tuple[Sequence, int]] = []  # how many tokens of each sequence
        self.last: list[int] = []  # which tokens give the next token of a sequence
        self.ending: list[Sequence] = []  # and of which

    def add(self, sequence: Sequence, count: int) -> None:
        """Read the next tokens of a sequence."""
        start, end = sequence.cached, sequence.cached + count
        self.add_part(sequence.slot, sequence.tokens[start:end], start)
        self.read.append((sequence, count))
        if end == len(sequence.tokens):
            self.last.append(len(self.ids) - 1)
            self.ending.append(sequence)

    def add_part(self, slot: int, ids: list[int], start: int) -> None:
        """Read tokens into a slot from a position on. Single tokens of neighbouring slots make one part."""
        before = self.parts[-1] if self.parts else None
        if before and len(ids) == before.count == 1 and before.slot + before.rows == slot:
            part = Part(before.slot, before.rows + 1, before.start, 1, max(before.length, start + 1))
            self.parts[-1] = part
        else:
            self.parts.append(Part(slot, 1, len(self.ids), len(ids), start + len(ids)))
        self.ids += ids
        self.slots += [slot] * len(ids)
        self.positions += range(start, start + len(ids))


class Forward(nn.Module):
    """A model's forward over tokens of many sequences in a row, as a function of tensors."""

    def __init__(self, model: PreTrainedModel, native: bool) -> None:
        super().__init__()
        self.model = model
        self.native = native

    def forward(
        self,
        ids: Tensor,
        slots: Tensor,
        positions: Tensor,
        last: Tensor,
        parts: tuple[Part, ...] = (),
        unattached: KVCache | None = None,
    ) -> Tensor:
        """Logits after the `last` of the tokens, (sequences, vocabulary); ids, slots and positions are (tokens,)."""
        logits: Tensor = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            rows=Rows(slots, positions, parts, self.native, unattached),
            use_cache=False,
            logits_to_keep=last,
        ).logits
        return logits[0]


class Engine:
    """Runs sequences over one model, each in a slot of the cache. Not thread-safe: one thread owns it.

    A step is one forward for all sequences: a token for each that decodes and `prefill_chunk` tokens of new
    prompts at most, sixteen times as many while none decodes. The longer the chunk, the sooner a reply starts and
    the longer the others wait for their next token. On a CPU our kernels compute the attention, unless
    `native` is False or they are not loaded. Raises UnsupportedModel where the model's attention cannot be
    replaced.
    """

    def __init__(
        self, model: PreTrainedModel, slots: int, context: int, prefill_chunk: int = 32, native: bool = True
    ) -> None:
        self.model = model
        self.program: Program | None = None  # does what `forward` does, once it is compiled
        self.device = model.device
        self.native = native and kernels.loaded() is not None and self.device.type == "cpu"
        self.forward = Forward(model, self.native)
        self.context = context
        self.prefill_chunk = prefill_chunk
        self.quantized = any(isinstance(module, Int8Linear) for module in model.modules())
        self.cache = KVCache(slots, context, self._cache_dtype())
        self.prefixes = PrefixCache(slots)
        self.slots: list[Sequence | None] = [None] * slots
        self.joining: list[Sequence] = []  # in a slot, prompt not yet read to its end; oldest first
        logits = self._plug_in()
        self.vocabulary = min(logits, len(cast(Tensor, model.get_input_embeddings().weight)))
        self.sampler = Sampler(slots, logits, self.device)

    @property
    def free_slots(self) -> int:
        return self.slots.count(None)

    @property
    def idle(self) -> bool:
        return self.free_slots == len(self.slots)

    @torch.inference_mode()
    def add(self, sequence: Sequence) -> None:
        """Give a sequence a free slot, and what another holds of its beginning. Asserts that it can be read."""
        assert self.free_slots
        assert 0 < len(sequence.prompt) < self.context
        assert max(sequence.prompt) < self.vocabulary
        assert sequence.max_tokens > 0
        for running in filter(None, self.slots):
            self.prefixes.hold(running.slot, running.tokens[: running.cached])
        source, length = self.prefixes.find(sequence.prompt)
        free = [slot for slot, other in enumerate(self.slots) if other is None]
        slot = self.prefixes.choose(free, source, length)
        if length and slot != source:
            self.cache.copy(source, slot, length)
        if not self.native:
            self.cache.clear(slot, length, len(self.prefixes.tokens[slot]))
        self.prefixes.hold(slot, sequence.prompt[:length])
        sequence.slot, sequence.cached, sequence.reused = slot, length, length
        self.slots[slot] = sequence
        self.sampler.place(slot, sequence.sampling, sequence.prompt)
        self.joining.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Free the sequence's slot at once; does nothing for one that has none."""
        if sequence.slot >= 0:
            self.prefixes.hold(sequence.slot, sequence.tokens[: sequence.cached])
            self.slots[sequence.slot] = None
            sequence.slot = -1
        if sequence in self.joining:
            self.joining.remove(sequence)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Decode one token for each running sequence and read one chunk of waiting prompts, all in one forward."""
        batch = self._schedule()
        if not batch.ids:
            return []
        logits = self._forward(batch)
        for sequence, count in batch.read:
            sequence.cached += count
        self.joining = [sequence for sequence in self.joining if not sequence.prefilled]
        return self._next(batch.ending, logits)

    def _cache_dtype(self) -> torch.dtype | None:
        """None is the model's own."""
        if self.quantized:
            return torch.bfloat16  # halves what attention reads, and costs less than the int8 of the linears
        return torch.float32 if self.native and self.model.dtype == torch.float16 else None  # the kernel knows no half

    def _schedule(self) -> Batch:
        """Running sequences first, by slot; then prompts, oldest first, as far as the budget goes."""
        batch = Batch()
        for sequence in self.slots:
            if sequence and sequence.prefilled:
                batch.add(sequence, 1)
        budget = self.prefill_chunk if batch.ids else 16 * self.prefill_chunk
        for sequence in self.joining:
            if count := min(budget, len(sequence.prompt) - sequence.cached):
                batch.add(sequence, count)
                budget -= count
        return batch

    def compile(self, cache: Path) -> None:
        """Go on with a compiled program of the model, once there is one; `cache` is where programs are kept.

        For another thread than the one that steps, which meanwhile goes on.
        """
        batch = Batch()
        batch.add_part(self.cache.scratch, [0] * 13, 0)
        batch.last = [3, 7, 12]
        inputs, tokens, sequences = self._inputs(batch), Dim("tokens", min=2), Dim("sequences", min=1)
        sizes = (tokens, tokens, tokens, sequences)
        self.program = compiled(self.forward, inputs, sizes, repr(self.model.config), cache)

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What `Forward` takes."""
        if len(batch.ids) == 1:  # one would be a program of its own
            batch.add_part(self.cache.scratch, [0], 0)
        numbers = (batch.ids, batch.slots, batch.positions, batch.last or [0])
        return tuple(torch.tensor(some, device=self.device) for some in numbers)

    def _forward(self, batch: Batch, unattached: KVCache | None = None) -> Tensor:
        """Logits after the batch's last tokens, (sequences, vocabulary)."""
        inputs = self._inputs(batch)
        if self.program:
            return self.program(*inputs)
        logits: Tensor = self.forward(*inputs, tuple(batch.parts), unattached)
        return logits

    def _next(self, sequences: list[Sequence], logits: Tensor) -> list[Token]:
        """Choose the next token of each sequence and let go of those that are finished."""
        if not sequences:
            return []
        uniforms = [sequence.random.random() for sequence in sequences]
        ids = self.sampler.sample(logits, [sequence.slot for sequence in sequences], uniforms)
        tokens = []
        for sequence, token_id in zip(sequences, ids, strict=True):
            sequence.tokens.append(token_id)
            tokens.append(Token(sequence, token_id, self._finish(sequence)))
            if tokens[-1].finish:
                self.cancel(sequence)
        return tokens

    def _finish(self, sequence: Sequence) -> Finish | None:
        if sequence.tokens[-1] in sequence.stop_ids:
            return "stop"
        if sequence.generated == sequence.max_tokens:
            return "max_output_tokens"
        if len(sequence.tokens) == self.context:
            return "context_length"
        return None

    @torch.inference_mode()
    def _plug_in(self) -> int:
        """Make the model's attention run on the slots and check it against its own; returns how many logits it has."""
        layer_types = set(getattr(self.model.config.get_text_config(), "layer_types", None) or ())
        if unknown := layer_types - {"full_attention", "sliding_attention"}:
            raise UnsupportedModel(f"it has {', '.join(sorted(unknown))}")
        prompt = [(7 * i + 1) % 97 for i in range(min(12, self.context))]
        self.model.set_attn_implementation("eager")
        expected = self.model(input_ids=torch.tensor([prompt], device=self.device), use_cache=False).logits[:, -1]
        self.model.set_attn_implementation(ATTENTION)
        try:
            sequence = Sequence(prompt, Sampling(), 1)
            sequence.slot = 0
            for count in (len(prompt) - 1, 1):
                batch = Batch()
                batch.add(sequence, count)
                logits = self._forward(batch, unattached=None if sequence.cached else self.cache)
                sequence.cached += count
        except (TypeError, AttributeError) as error:
            raise UnsupportedModel(f"its forward does not take what an attention function needs ({error})") from error
        difference = (logits[0] - expected).abs().max() / expected.abs().max()
        if not self.cache.modules or not difference < 0.05:
            raise UnsupportedModel("its attention does not go through transformers' attention interface")
        return logits.shape[-1]
