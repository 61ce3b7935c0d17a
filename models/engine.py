"""Continuous batching over token ids: sequences join and leave at any step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.kv_cache import ATTENTION, KVCache, Slots, UnsupportedModel
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
    cached: int = field(default=0, init=False)  # tokens whose keys and values are in the slot
    generated: int = field(default=0, init=False)
    last: int = field(default=-1, init=False)
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def prefilled(self) -> bool:
        return self.cached >= len(self.prompt)


class Token(NamedTuple):
    """One generated token; `finish` says why it is the last one, if it is."""

    sequence: Sequence
    id: int
    finish: Finish | None


class Engine:
    """Runs sequences over one model, each in a slot of the cache. Not thread-safe: one thread owns it.

    Row i of a decode is slot i, so a step reads the cache in place. `prefill_chunk` is how many prompt tokens
    a step takes at most: the longer, the sooner a reply starts and the longer the others wait for their next
    token. Raises UnsupportedModel where the model's attention cannot be replaced.
    """

    def __init__(self, model: PreTrainedModel, slots: int, context: int, prefill_chunk: int = 128) -> None:
        self.model = model
        self.device = model.device
        self.context = context
        self.prefill_chunk = prefill_chunk
        self.cache = KVCache(slots, context)
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

    def add(self, sequence: Sequence) -> None:
        """Give a sequence the lowest free slot. Asserts that there is one and that the prompt can be read."""
        assert self.free_slots
        assert 0 < len(sequence.prompt) < self.context
        assert max(sequence.prompt) < self.vocabulary
        assert sequence.max_tokens > 0
        sequence.slot = self.slots.index(None)
        self.slots[sequence.slot] = sequence
        self.sampler.place(sequence.slot, sequence.sampling, sequence.prompt)
        self.joining.append(sequence)

    @torch.inference_mode()
    def cancel(self, sequence: Sequence) -> None:
        """Free the sequence's slot at once; does nothing for one that has none."""
        if sequence.slot >= 0:
            self.cache.clear(sequence.slot, sequence.cached)
            self.slots[sequence.slot] = None
            sequence.slot = -1
        if sequence in self.joining:
            self.joining.remove(sequence)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Read one chunk of waiting prompts, then decode one token for each running sequence."""
        tokens = [token for sequence, logits in self._prefill() for token in self._next([sequence], logits)]
        running = [sequence for sequence in self.slots if sequence and sequence.prefilled]
        if running:
            tokens += self._next(running, self._decode(running))
        return tokens

    def _prefill(self) -> Iterator[tuple[Sequence, Tensor]]:
        """Run prompts through the model, oldest first; yield those that are complete with their logits."""
        budget = self.prefill_chunk
        while budget and self.joining:
            sequence = self.joining[0]
            start, end = sequence.cached, min(sequence.cached + budget, len(sequence.prompt))
            logits = self._forward(sequence.slot, [sequence.prompt[start:end]], [list(range(start, end))], end)
            sequence.cached = end
            budget -= end - start
            if sequence.prefilled:
                self.joining.pop(0)
                yield sequence, logits

    def _decode(self, running: list[Sequence]) -> Tensor:
        """Run the last token of each running sequence, all at once. Returns (running, vocabulary)."""
        rows = running[-1].slot + 1
        tokens, positions = [[0]] * rows, [[self.cache.scratch]] * rows
        for sequence in running:
            tokens[sequence.slot], positions[sequence.slot] = [sequence.last], [sequence.cached]
            sequence.cached += 1
        logits = self._forward(0, tokens, positions, max(sequence.cached for sequence in running))
        return logits if len(running) == rows else logits[[sequence.slot for sequence in running]]

    def _forward(self, first: int, tokens: list[list[int]], positions: list[list[int]], length: int) -> Tensor:
        """Logits after the last token of each row, (rows, vocabulary)."""
        position_ids = torch.tensor(positions, device=self.device)
        logits: Tensor = self.model(
            input_ids=torch.tensor(tokens, device=self.device),
            position_ids=position_ids % self.context,  # scratch is no position that a model knows
            slots=Slots(self.cache, first, position_ids, length),
            use_cache=False,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def _next(self, sequences: list[Sequence], logits: Tensor) -> list[Token]:
        """Choose the next token of each sequence and let go of those that are finished."""
        uniforms = [sequence.random.random() for sequence in sequences]
        ids = self.sampler.sample(logits, [sequence.slot for sequence in sequences], uniforms)
        tokens = []
        for sequence, token_id in zip(sequences, ids, strict=True):
            sequence.last = token_id
            sequence.generated += 1
            tokens.append(Token(sequence, token_id, self._finish(sequence)))
            if tokens[-1].finish:
                self.cancel(sequence)
        return tokens

    def _finish(self, sequence: Sequence) -> Finish | None:
        if sequence.last in sequence.stop_ids:
            return "stop"
        if sequence.generated == sequence.max_tokens:
            return "max_output_tokens"
        if len(sequence.prompt) + sequence.generated == self.context:
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
            for start, end in ((0, len(prompt) - 1), (len(prompt) - 1, len(prompt))):
                logits = self._forward(0, [prompt[start:end]], [list(range(start, end))], end)
        except (TypeError, AttributeError) as error:
            raise UnsupportedModel(f"its forward does not take what an attention function needs ({error})") from error
        difference = (logits - expected).abs().max() / expected.abs().max()
        if not self.cache.layers or not difference < 0.05:
            raise UnsupportedModel("its attention does not go through transformers' attention interface")
        return logits.shape[-1]
