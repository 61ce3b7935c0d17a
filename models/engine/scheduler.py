"""Decides which slot a sequence gets, and which tokens the next step computes."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from models.engine.block_pool import BlockPool
from models.engine.prefix_cache import PrefixCache
from models.engine.sequence import Sequence

UNKNOWN = -1  # stands for the id of a token in flight


@dataclass(frozen=True)
class PrefillLimits:
    """How many tokens of prompts a step computes. More start a reply sooner, but the others wait longer for a token."""

    beside: int  # while sequences decode
    alone: int  # while none does
    depth: int = 2048  # a token that attends to this many others takes twice as long as the first one


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
        """The ids of the tokens; UNKNOWN for the one in flight."""
        known = self.sequence.tokens[self.start : self.start + self.count]
        return known + [UNKNOWN] * (self.count - len(known))

    @property
    def gives_token(self) -> bool:
        """Whether the chunk reaches the end of the sequence, so that its last logits give the next token."""
        return self.start + self.count == self.sequence.length


class Placement(NamedTuple):
    """The slot that a prompt gets. The first `length` tokens of the prompt are in the slot `source` already."""

    slot: int
    source: int
    length: int
    stale: int  # how many tokens the slot held before


class Scheduler:
    """Places sequences in slots and shares each step among them. Pure bookkeeping: no tensor is touched here.

    A step computes one token for each sequence that decodes, and tokens of new prompts within limits. Late in a long
    prompt, a chunk is smaller.

    If the cache is in blocks, a sequence takes them as it grows. When none is free, idle slots lose theirs, the least
    recently used first; then the newest sequence loses its own, and computes its tokens again later.
    """

    def __init__(
        self, slots: int, prefill: PrefillLimits, whole_prefixes: bool = False, blocks: BlockPool | None = None
    ) -> None:
        self.slots: list[Sequence | None] = [None] * slots
        self.running: list[Sequence] = []  # the sequences in the slots, oldest first
        self.limit = slots  # how many sequences take part in a step
        self.prefill = prefill
        self.prefixes = PrefixCache(slots, whole_prefixes)
        self.blocks = blocks

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
        if self.blocks and length:
            length = self._sharable(self.blocks, source, slot, length)
        return Placement(slot, source, length, stale=len(self.prefixes.cached[slot].tokens))

    def reserve(self, placement: Placement) -> None:
        """Forget the tokens of the slot after the prefix, so that they are not reused if preparing the slot fails."""
        cached = self.prefixes.cached[placement.slot]
        slot, source, length, _ = placement
        copies = slot != source or (self.blocks and self.blocks.needs_copy(source, slot, length))
        kept = [] if copies else cached.tokens[:length]
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
            known = sequence.owned(sequence.cached)
            self.prefixes.record(sequence.slot, known)
            if self.blocks:
                self.blocks.shrink(sequence.slot, len(known.tokens))
            self.slots[sequence.slot] = None
            self.running.remove(sequence)
            sequence.slot = -1

    def schedule(self, sequences: list[Sequence]) -> list[Chunk]:
        """The chunks of a step: first sequences that decode, by slot, then prompts, in order, within the limits.

        Sequences without a slot take no part, nor do those whose last token is in flight.
        """
        going = [each for each in sequences if each.slot >= 0 and each.length < each.final_length]
        decoding = [each for each in going if each.decodes and self._grow(each, 1)]
        # Who came later may have lost its blocks meanwhile.
        chunks = [Chunk(each, 1) for each in sorted(decoding, key=attrgetter("slot")) if each.decodes]
        budget = self.prefill.beside if chunks else self.prefill.alone
        for sequence in going:
            if sequence.decodes:
                continue
            if budget <= 0:
                break
            cost = 1 + sequence.cached / self.prefill.depth  # of one token; late in a prompt, more than the budget
            count = min(max(1, int(budget / cost)), sequence.length - sequence.cached)
            if not self._grow(sequence, count, preempt=not chunks):
                break
            chunks.append(Chunk(sequence, count))
            budget -= round(count * cost)
        return chunks

    def _grow(self, sequence: Sequence, count: int, preempt: bool = True) -> bool:
        """Give a sequence blocks for its next tokens; False if there are none. The oldest sequence always gets some."""
        if self.blocks is None:
            return True
        while not self.blocks.grow(sequence.slot, sequence.cached + count):
            if not self._forget_idle_slot() and not (preempt and self._preempt_newest(sequence)):
                return False
        return True

    def _sharable(self, blocks: BlockPool, source: int, slot: int, length: int) -> int:
        """How many of the first tokens of a slot another one can have: whole blocks only if no block is free."""
        while blocks.needs_copy(source, slot, length) and not blocks.free:
            if not self._forget_idle_slot({source, slot}):
                length -= length % blocks.size
        return length

    def _forget_idle_slot(self, keep: Set[int] = frozenset()) -> bool:
        """Free the blocks of the least recently used slot in which no sequence runs; False if there is none."""
        assert self.blocks
        idle = [
            slot for slot, table in enumerate(self.blocks.tables) if table and not self.slots[slot] and slot not in keep
        ]
        if not idle:
            return False
        slot = self.prefixes.least_recently_used(idle)
        self.prefixes.forget(slot)
        self.blocks.shrink(slot, 0)
        return True

    def _preempt_newest(self, older: Sequence) -> bool:
        """Free the blocks of the newest sequence that has some, if it came after another one."""
        assert self.blocks
        newest = next(sequence for sequence in reversed(self.running) if self.blocks.tables[sequence.slot])
        if self.running.index(newest) <= self.running.index(older):
            return False
        self.blocks.shrink(newest.slot, 0)
        newest.cached = 0
        return True
