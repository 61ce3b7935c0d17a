"""One forward of the model: tokens of many sequences in a row, and the logits after some of them."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from models.kv_cache import KVCache, Part, Rows
from models.sequence import Sequence


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
