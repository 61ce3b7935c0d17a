"""Continuous batching over token ids: sequences join and leave at any step."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.export import Dim
from transformers import PreTrainedModel

from models import kernels
from models.compilation import Program, compiled
from models.forward import Batch, Forward
from models.kv_cache import ATTENTION, KVCache, UnsupportedModel
from models.prefix_cache import PrefixCache
from models.quantization import Int8Linear
from models.sampling import Sampler, Sampling
from models.sequence import Finish, Sequence, Token

DEPTH = 2048  # a prompt's token that looks back on so many takes twice as long as its first


class Engine:
    """Runs sequences over one model, each in a slot of the cache. Not thread-safe: one thread owns it.

    A step is one forward for all sequences: a token for each that decodes and `prefill_chunk` tokens of new
    prompts at most, fewer far into a prompt, sixteen times as many while none decodes. The longer the chunk, the
    sooner a reply starts and the longer the others wait for their next token. On a CPU our kernels compute the
    attention, unless `native` is False or they are not loaded. Raises UnsupportedModel where the model's attention
    cannot be replaced.
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
        self.running: list[Sequence] = []  # those in the slots, oldest first
        self.limit = slots  # how many of them take part in a step
        logits = self._plug_in()
        self.vocabulary = min(logits, len(cast(Tensor, model.get_input_embeddings().weight)))
        self.sampler = Sampler(slots, logits, self.device)

    @property
    def free_slots(self) -> int:
        return max(0, self.limit - len(self.running))

    @property
    def idle(self) -> bool:
        return not self.running

    @property
    def active(self) -> list[Sequence]:
        """Those that the next step is for; who came when the limit was higher may have to wait."""
        return self.running[: self.limit]

    @torch.inference_mode()
    def add(self, sequence: Sequence) -> None:
        """Give a sequence a free slot, and what another holds of its beginning. Asserts that it can be read."""
        assert None in self.slots
        assert 0 < len(sequence.prompt) < self.context
        assert max(sequence.prompt) < self.vocabulary
        assert sequence.max_tokens > 0
        for running in self.running:
            self.prefixes.hold(running.slot, running.tokens[: running.cached])
        source, length = self.prefixes.find(sequence.prompt)
        free = [slot for slot, other in enumerate(self.slots) if other is None]
        slot = self.prefixes.choose(free, source, length)
        self.sampler.place(slot, sequence.sampling, sequence.prompt)  # first, since it may want memory
        held = len(self.prefixes.tokens[slot])
        self.prefixes.hold(slot, sequence.prompt[:length] if slot == source else [])  # what follows may fail
        if length and slot != source:
            self.cache.copy(source, slot, length)
        if not self.native:
            self.cache.clear(slot, length, held)
        self.prefixes.hold(slot, sequence.prompt[:length])
        sequence.slot, sequence.cached, sequence.reused = slot, length, length
        self.slots[slot] = sequence
        self.running.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Free the sequence's slot at once; does nothing for one that has none."""
        if sequence.slot >= 0:
            self.prefixes.hold(sequence.slot, sequence.tokens[: sequence.cached])
            self.slots[sequence.slot] = None
            self.running.remove(sequence)
            sequence.slot = -1

    @torch.inference_mode()
    def step(self, among: list[Sequence] | None = None) -> list[Token]:
        """Decode one token for each active sequence and read one chunk of waiting prompts, all in one forward.

        `among` has only some of them take part. A step that raises has done nothing: it may be tried again, and
        comes to the same tokens.
        """
        batch = self._schedule(self.active if among is None else among)
        if not batch.ids:
            return []
        try:
            ids = self._choose(batch.ending, self._forward(batch))
        except Exception:
            self._forget(batch)
            raise
        for sequence, count in batch.read:
            sequence.cached += count
        return [self._take(sequence, token_id) for sequence, token_id in zip(batch.ending, ids, strict=True)]

    @torch.inference_mode()
    def probe(self) -> None:
        """Run a forward that belongs to no sequence. Raises what it raises, where the engine is broken."""
        self._forward(self._rehearsal()).sum().item()  # for which the device has to be done

    def _cache_dtype(self) -> torch.dtype | None:
        """None is the model's own."""
        if self.quantized:
            return torch.bfloat16  # halves what attention reads, and costs less than the int8 of the linears
        return torch.float32 if self.native and self.model.dtype == torch.float16 else None  # the kernel knows no half

    def _schedule(self, among: list[Sequence]) -> Batch:
        """Those that decode first, by slot; then prompts, in their order, as far as the budget goes."""
        batch = Batch()
        for sequence in sorted(among, key=attrgetter("slot")):
            if sequence.prefilled:
                batch.add(sequence, 1)
        budget = self.prefill_chunk if batch.ids else 16 * self.prefill_chunk
        for sequence in [sequence for sequence in among if not sequence.prefilled]:
            depth = 1 + sequence.cached / DEPTH
            if count := min(int(budget / depth), len(sequence.prompt) - sequence.cached):
                batch.add(sequence, count)
                budget -= round(count * depth)
        return batch

    def compile(self, cache: Path) -> None:
        """Go on with a compiled program of the model, once there is one; `cache` is where programs are kept.

        For another thread than the one that steps, which meanwhile goes on.
        """
        inputs, tokens, sequences = self._inputs(self._rehearsal()), Dim("tokens", min=2), Dim("sequences", min=1)
        sizes = (tokens, tokens, tokens, sequences)
        self.program = compiled(self.forward, inputs, sizes, repr(self.model.config), cache)

    def _rehearsal(self) -> Batch:
        """A batch that no sequence sees anything of."""
        batch = Batch()
        batch.add_part(self.cache.scratch, [0] * 13, 0)
        batch.last = [3, 7, 12]
        return batch

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

    def _forget(self, batch: Batch) -> None:
        """Clear what a forward that failed may have written, of which nobody knows."""
        if not self.native:
            for sequence, count in batch.read:
                self.cache.clear(sequence.slot, sequence.cached, sequence.cached + count)

    def _choose(self, sequences: list[Sequence], logits: Tensor) -> list[int]:
        """The next token of each sequence."""
        if not sequences:
            return []
        slots = [sequence.slot for sequence in sequences]
        return self.sampler.sample(logits, slots, [sequence.uniform for sequence in sequences])

    def _take(self, sequence: Sequence, token_id: int) -> Token:
        """Go on with the next token of a sequence, or let go of it where it is finished."""
        sequence.append(token_id)
        token = Token(sequence, token_id, self._finish(sequence))
        if token.finish:
            self.cancel(sequence)
        return token

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
