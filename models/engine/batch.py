"""The tokens of many sequences, in a row, for one forward of the model."""

from __future__ import annotations

from collections.abc import Iterable

from models.engine.attention import Span
from models.engine.scheduler import Chunk


class Batch:
    """The tokens of many sequences in a row: their ids, slots and positions."""

    def __init__(self, chunks: Iterable[Chunk] = ()) -> None:
        self.ids: list[int] = []
        self.slots: list[int] = []
        self.positions: list[int] = []
        self.spans: list[Span] = []
        self.logits_at: list[int] = []  # the indices of the tokens after which logits are needed
        for chunk in chunks:
            self.add(chunk.sequence.slot, chunk.ids, chunk.start)
            if chunk.gives_token:
                self.logits_at.append(len(self.ids) - 1)

    def add(self, slot: int, ids: list[int], start: int) -> None:
        """Add tokens of a slot, from position `start` on. Single tokens of neighbouring slots become one span."""
        last = self.spans[-1] if self.spans else None
        if last and len(ids) == last.count == 1 and last.slot + last.rows == slot:
            self.spans[-1] = Span(last.slot, last.rows + 1, last.start, 1, max(last.length, start + 1))
        else:
            self.spans.append(Span(slot, 1, len(self.ids), len(ids), start + len(ids)))
        self.ids += ids
        self.slots += [slot] * len(ids)
        self.positions += range(start, start + len(ids))
