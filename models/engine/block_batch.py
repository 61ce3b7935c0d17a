"""The tokens of a step as numbers for one copy to the device, padded to sizes that come again."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from models.engine.batch import Batch
from models.engine.block_attention import Group
from models.engine.block_cache import BlockCache
from models.engine.fused_attention import PART

# What inputs are padded to. Few sizes need few graphs, and in steps of many tokens padding is less than a tenth.
SEQUENCES = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1025, 64))
SEQUENCES_WITH_PROMPTS = (8, 32, 128, 512)  # these cost little beside the tokens of prompts
REACHES = tuple(PART * 4**power for power in range(10))  # each is read in more or longer parts
TOKENS = (*range(64, 512, 64), *range(512, 4097, 128))


@dataclass(frozen=True)
class Part:
    """The next `count` tokens of the sequence in a slot, from position `start` on."""

    slot: int
    start: int
    count: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of a step's inputs. Steps of the same sizes launch the same kernels."""

    tokens: int
    sequences: int
    logits: int
    longest: int  # the most tokens that a sequence has in the step
    reach: int  # at least the most tokens that a sequence has in all
    groups: tuple[Group, ...] = ()  # for attention that has to know each sequence; empty if it has not
    comes_again: bool = True  # whether a graph pays

    @property
    def numbers(self) -> int:
        """How many numbers the inputs have in all."""
        return 3 * self.tokens + self.logits + 3 * self.sequences + 1


@dataclass(frozen=True)
class PaddedBatch:
    """A batch with padding at its end: tokens and sequences in the padding slot."""

    batch: Batch
    parts: list[Part]
    sizes: Sizes

    @classmethod
    def of(cls, batch: Batch, cache: BlockCache) -> PaddedBatch:
        """Pad a batch, as the attention over a cache needs it."""
        parts, tokens, padding = _parts(batch), len(batch.ids), cache.padding_slot
        if len(batch.logits_at) > len(parts):  # as only a check of a model needs them
            return cls.exact(batch, cache)
        if tokens == len(parts):  # one of each sequence
            sequences = _round_up(len(parts), SEQUENCES)
            reach, groups = _round_up(_reach(parts), REACHES), tuple[Group, ...]()
            if cache.needs_groups:  # which reads all blocks
                blocks = _round_up(cache.blocks_of(_reach(parts)), _powers(cache.longest_table))
                reach, groups = blocks * cache.pool.size, (Group(0, sequences, 0, 1, blocks),)
            more = [Part(padding, 0, 1)] * (sequences - len(parts))
            return cls(batch, parts + more, Sizes(sequences, sequences, sequences, 1, reach, groups))
        if not cache.needs_groups:
            padded, sequences = _round_up(tokens, TOKENS), _round_up(len(parts) + 1, SEQUENCES_WITH_PROMPTS)
            more = [Part(padding, 0, 0)] * (sequences - len(parts) - 1)
            sizes = Sizes(padded, sequences, sequences, padded, cache.context)
            return cls(batch, [*parts, Part(padding, 0, padded - tokens), *more], sizes)
        return cls.exact(batch, cache)

    @classmethod
    def exact(cls, batch: Batch, cache: BlockCache) -> PaddedBatch:
        """A batch without padding, for any attention."""
        parts = _parts(batch)
        sizes = len(batch.ids), len(parts), len(batch.logits_at), max(part.count for part in parts), _reach(parts)
        return cls(batch, parts, Sizes(*sizes, tuple(_groups(parts, cache)), comes_again=False))

    def numbers(self, context: int) -> list[int]:
        """The inputs in a row.

        For each token its id, its slot and its position; for each sequence a token with logits, its slot and its
        length after the step; then where each sequence starts, and the end.
        """
        batch, sizes, padding = self.batch, self.sizes, self.parts[-1].slot
        positions = ((part.start + index) % context for part in self.parts for index in range(part.count))
        return [
            *_padded(batch.ids, sizes.tokens, 0),
            *_padded(batch.slots, sizes.tokens, padding),
            *positions,
            *_padded(batch.logits_at, sizes.logits, 0),
            *(part.slot for part in self.parts),
            *(min(part.start + part.count, context) for part in self.parts),
            *accumulate((part.count for part in self.parts), initial=0),
        ]


def most_sequences(slots: int) -> int:
    """The most sequences of a padded step, for so many slots."""
    return max(_round_up(slots + 1, sizes) for sizes in (SEQUENCES, SEQUENCES_WITH_PROMPTS))


def _parts(batch: Batch) -> list[Part]:
    """The sequences of a batch, in order."""
    return [
        Part(span.slot + row, batch.positions[span.start + row * span.count], span.count)
        for span in batch.spans
        for row in range(span.rows)
    ]


def _reach(parts: Sequence[Part]) -> int:
    """The most tokens of a sequence after the step."""
    return max(part.start + part.count for part in parts)


def _groups(parts: Sequence[Part], cache: BlockCache) -> list[Group]:
    """The sequences of a step in groups: neighbours with one token each, and each other one alone."""
    groups: list[Group] = []
    start = 0
    for number, part in enumerate(parts):
        blocks = cache.blocks_of(part.start + part.count)
        if groups and groups[-1].count == part.count == 1:
            last = groups.pop()
            groups.append(Group(last.first, last.rows + 1, last.start, 1, max(last.blocks, blocks)))
        else:
            groups.append(Group(number, 1, start, part.count, blocks))
        start += part.count
    return groups


def _padded(numbers: list[int], length: int, padding: int) -> list[int]:
    return numbers + [padding] * (length - len(numbers))


def _round_up(number: int, sizes: Sequence[int]) -> int:
    """The first of some sizes, in order, that is not less; the number itself if all are less."""
    place = bisect_left(sizes, number)
    return sizes[place] if place < len(sizes) else number


def _powers(most: int) -> list[int]:
    """The powers of two below a number, and the number."""
    return [*(1 << bits for bits in range(most.bit_length()) if 1 << bits < most), most]
