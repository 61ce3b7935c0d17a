"""Decides which slot a sequence gets, and which tokens the next step computes."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from models.engine.prefix_cache import PrefixCache
from models.engine.sequence import Sequence

DEPTH = 2048  # a prompt token that attends to this many others takes twice as long as the first one
PREFILL_ALONE = 16  # how many times larger a prefill chunk is while nothing decodes


@dataclass(frozen=True)
class Chunk:
    """The next `count` tokens of a sequence, to be computed in one step."""

    sequence: Sequence
    count: int

    @property
    def start(self) -> int:
        """The position of the first token."""
        return self.sequence.cached

    @property
    def ids(self) -> list[int]:
        return self.sequence.tokens[self.start : self.start + self.count]

    @property
    def gives_token(self) -> bool:
        """Whether the chunk reaches the end of the sequence, so that its last logits give the next token."""
        return self.start + self.count == len(self.sequence.tokens)


class Placement(NamedTuple):
    """The slot that a prompt gets. The first `length` tokens of the prompt are in the slot `source` already."""

    slot: int
    source: int
    length: int
    stale: int  # how many tokens the slot held before


class Scheduler:
    """Places sequences in slots and shares each step among them. Pure bookkeeping: no tensor is touched here.

    A step computes one token for each sequence that decodes, and up to `prefill_chunk` tokens of new prompts. Late in a
    long prompt, a chunk is smaller; while nothing decodes, it is sixteen times larger. A longer chunk starts a reply
    sooner, but the others wait longer for their next token.
    """

    def __init__(self, slots: int, prefill_chunk: int, whole_prefixes: bool = False) -> None:
        self.slots: list[Sequence | None] = [None] * slots
        self.running: list[Sequence] = []  # the sequences in the slots, oldest first
        self.limit = slots  # how many sequences take part in a step
        self.prefill_chunk = prefill_chunk
        self.prefixes = PrefixCache(slots, whole_prefixes)

    @property
    def free_slots(self) -> int:
        return max(0, self.limit - len(self.running))

    @property
    def active(self) -> list[Sequence]:
        """The sequences that take part in the next step; others wait if the limit was lowered."""
        return self.running[: self.limit]

    def find_slot(self, sequence: Sequence) -> Placement:
        """The slot for a sequence, and the longest prefix of its prompt that it may reuse. A slot must be free."""
        free = [slot for slot, running in enumerate(self.slots) if running is None]
        assert free
        for running in self.running:
            self.prefixes.record(running.slot, running.owned(running.cached))
        source, length = self.prefixes.find(sequence.owned(len(sequence.prompt)))
        slot = self.prefixes.choose(free, source, length, sequence.owner)
        return Placement(slot, source, length, stale=len(self.prefixes.cached[slot].tokens))

    def reserve(self, placement: Placement) -> None:
        """Forget the tokens of the slot after the prefix, so that they are not reused if preparing the slot fails."""
        cached = self.prefixes.cached[placement.slot]
        kept = cached.tokens[: placement.length] if placement.slot == placement.source else []
        self.prefixes.record(placement.slot, cached._replace(tokens=kept))

    def start(self, sequence: Sequence, placement: Placement) -> None:
        """Let a sequence run in its slot, which holds the prefix by now."""
        sequence.slot, sequence.cached, sequence.reused = placement.slot, placement.length, placement.length
        self.prefixes.record(placement.slot, sequence.owned(sequence.cached))
        self.slots[placement.slot] = sequence
        self.running.append(sequence)

    def release(self, sequence: Sequence) -> None:
        """Free the slot of a sequence; does nothing if it has no slot."""
        if sequence.slot >= 0:
            self.prefixes.record(sequence.slot, sequence.owned(sequence.cached))
            self.slots[sequence.slot] = None
            self.running.remove(sequence)
            sequence.slot = -1

    def schedule(self, sequences: list[Sequence]) -> list[Chunk]:
        """The chunks of a step: first sequences that decode, by slot, then prompts, in order, within the budget."""
        decoding = [sequence for sequence in sequences if sequence.prefilled]
        chunks = [Chunk(sequence, 1) for sequence in sorted(decoding, key=attrgetter("slot"))]
        budget = self.prefill_chunk if chunks else PREFILL_ALONE * self.prefill_chunk
        for sequence in sequences:
            if sequence.prefilled:
                continue
            if budget <= 0:
                break
            cost = 1 + sequence.cached / DEPTH  # of one token; late in a very long prompt it is more than the budget
            count = min(max(1, int(budget / cost)), len(sequence.prompt) - sequence.cached)
            chunks.append(Chunk(sequence, count))
            budget -= round(count * cost)
        return chunks
