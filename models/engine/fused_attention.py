"""Attention over blocks by our Triton kernels, where they run and are right."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from models.engine.attention import Scoring, attend, causal_mask
from models.errors import one_line

PART = 256  # keys; longer sequences that decode are split into parts, for which the device has room
PARTS = 32  # at most, which may be longer then
NO_WINDOW = 2**31 - 1

logger = logging.getLogger("parley")


@dataclass(frozen=True)
class SequenceLayout:
    """Where the sequences of a step are: their tokens in the row of all tokens, and their blocks."""

    starts: Tensor  # (sequences + 1,), int32: the first token of each sequence, and the end
    lengths: Tensor  # (sequences,), int32: the tokens of each sequence after this step, of which the last are in it
    tables: Tensor  # (sequences, blocks), int32: the blocks of each sequence
    longest: int  # the most tokens of a sequence in this step
    reach: int  # at least the most tokens of a sequence in all


class FusedAttention:
    """Our kernels for attention over blocks, for kinds of attention in which they were tried.

    They read the blocks where they are, and each token reads what it attends to and nothing more. Not each machine has
    Triton, and not each GPU takes each size and dtype. If `allowed` is False, none is tried.
    """

    def __init__(self, allowed: bool = True) -> None:
        self._allowed = allowed
        self._right: dict[tuple[object, ...], bool] = {}

    def fits(self, query: Tensor, key: Tensor, value: Tensor, cached: torch.dtype, scoring: Scoring) -> bool:
        """Whether attention of (1, heads, tokens, size) over a cache of a dtype can be computed so."""
        return self._right.get(_kind(query, key, value, cached, scoring), False)

    def try_kind(self, query: Tensor, key: Tensor, value: Tensor, cached: torch.dtype, scoring: Scoring) -> None:
        """Find out whether the kernels are right for a kind of attention."""
        kind = _kind(query, key, value, cached, scoring)
        if not self._allowed or kind in self._right:
            return
        try:
            self._right[kind] = _is_right(self, query, key, value, cached, scoring)
            if not self._right[kind]:
                logger.warning("our attention kernels give wrong results here: slower ones are used")
        except Exception as error:  # of Triton, of its compilers or of the device; none of them has a common class
            logger.info("our attention kernels do not run here: %s", one_line(error))
            self._right[kind] = False

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, cells: Tensor) -> None:
        """Store keys and values, (heads, tokens, size), in cells of the blocks, (blocks, block size, heads, size)."""
        from models.engine.block_kernels import store_kernel  # not each machine has Triton

        heads, tokens, size = key.shape
        value_size = value.shape[2]
        key, value = _with_plain_rows(key), _with_plain_rows(value)
        store_kernel[(tokens,)](
            *(key, value, keys, values, cells, key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
            *(torch.finfo(keys.dtype).max, heads, _lanes(heads, 1), size, _lanes(size), value_size, _lanes(value_size)),
        )

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, layout: SequenceLayout, scoring: Scoring) -> Tensor:
        """Attention of queries, (heads, tokens, size), over blocks, as (tokens, heads, value size)."""
        from models.engine.block_kernels import attend_kernel, combine_kernel

        heads, tokens, size = query.shape
        _, block, key_heads, value_size = values.shape
        group, query = heads // key_heads, _with_plain_rows(query)
        sequences, decodes = len(layout.lengths), layout.longest == 1
        # A tile of a prompt has two tokens at least: one token tells the kernel that all sequences decode.
        rows = _lanes(group, 16) if decodes else _lanes(2 * group, 64)
        tile_tokens = 1 if decodes else rows // group
        tiles = sequences if decodes else tokens // tile_tokens + sequences
        parts = min(-(-layout.reach // PART), PARTS) if decodes else 1
        output = query.new_empty(tokens, heads, value_size)
        mixed, peaks, totals = output, output, output
        if parts > 1:
            mixed = query.new_empty(tokens, heads, parts, value_size, dtype=torch.float32)
            peaks, totals = query.new_empty(2, tokens, heads, parts, dtype=torch.float32)
        attend_kernel[(tiles, key_heads, parts)](
            *(query, keys, values, output if scoring.sinks is None else scoring.sinks),
            *(mixed, peaks, totals, layout.tables, layout.starts, layout.lengths),
            *(sequences, -(-layout.reach // parts), query.stride(0), query.stride(1), layout.tables.stride(0)),
            *(scoring.scale, scoring.softcap or 0.0, scoring.window or NO_WINDOW),
            *(key_heads, group, size, _lanes(size), value_size, _lanes(value_size), block),
            *(tile_tokens, rows, 64 if size <= 128 else 32, parts > 1),
            *(scoring.sinks is not None, scoring.softcap is not None),
            "ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=2 if decodes else 4,  # for one token of each sequence, 6 to 12% faster than four
        )
        if parts > 1:
            combine_kernel[(tokens * heads,)](
                *(mixed, peaks, totals, output, parts, PARTS, value_size, _lanes(value_size))
            )
        return output


# What the kernels are tried with: tokens in a step and in all, of two sequences, and their blocks. Of a sequence that
# decodes, both the keys that one program reads and more.
TRIALS = (((1, 1), (100, 7)), ((1, 1), (PART + 94, 70)), ((70, 1), (120, 90)))
TABLES = ((5, 3, 1, 9, 7, 11), (2, 4, 0, 0, 0, 0))
TRIAL_BLOCK = 64  # tokens


def _is_right(
    fused: FusedAttention, query: Tensor, key: Tensor, value: Tensor, cached: torch.dtype, scoring: Scoring
) -> bool:
    """Whether the kernels compute what torch computes, for a kind of attention."""
    source = torch.Generator(query.device).manual_seed(0)
    (_, heads, _, size), (_, key_heads, _, value_size) = query.shape, value.shape

    def random(*sizes: int, dtype: torch.dtype = query.dtype) -> Tensor:
        return torch.randn(*sizes, generator=source, device=query.device).to(dtype)

    def integers(*numbers: int) -> Tensor:
        return torch.tensor(numbers, device=query.device, dtype=torch.int32)

    keys, values = (random(12, TRIAL_BLOCK, key_heads, each, dtype=cached) for each in (size, value_size))
    tables = torch.stack([integers(*table) for table in TABLES])
    for counts, lengths in TRIALS:
        tokens, cells = sum(counts), integers(*_last_cells(counts, lengths)).long()
        new = random(key_heads, tokens, size), random(key_heads, tokens, value_size)
        fused.store(*new, keys, values, cells)
        for cache, each in zip((keys, values), new, strict=True):
            if not _close(cache.flatten(0, 1)[cells], each.transpose(0, 1), torch.finfo(cached).eps):
                return False
        starts, ends = integers(0, counts[0], tokens), integers(*lengths)
        layout = SequenceLayout(starts, ends, tables, max(counts), max(lengths))
        arguments = random(heads, tokens, size), keys, values, layout
        for window in {scoring.window, 5}:
            windowed = replace(scoring, window=window)
            output = fused.attend(*arguments, windowed)
            if not _close(output, attend_by_sequence(*arguments, windowed), 0.02):
                return False
    return True


def _last_cells(counts: tuple[int, ...], lengths: tuple[int, ...]) -> list[int]:
    """The cells of the last tokens of some sequences."""
    return [
        table[at // TRIAL_BLOCK] * TRIAL_BLOCK + at % TRIAL_BLOCK
        for count, length, table in zip(counts, lengths, TABLES, strict=True)
        for at in range(length - count, length)
    ]


def _close(result: Tensor, expected: Tensor, precision: float) -> bool:
    return torch.allclose(result.float(), expected.float(), rtol=precision, atol=precision)


def attend_by_sequence(query: Tensor, keys: Tensor, values: Tensor, layout: SequenceLayout, scoring: Scoring) -> Tensor:
    """What `FusedAttention.attend` has to give, (tokens, heads, value size), computed sequence by sequence."""
    outputs, spans = [], pairwise(layout.starts.tolist())
    for (start, end), length, table in zip(spans, layout.lengths.tolist(), layout.tables, strict=True):
        near_keys, near_values = (
            cached[table].flatten(0, 1)[:length].transpose(0, 1)[None].to(query.dtype) for cached in (keys, values)
        )
        positions = torch.arange(length - (end - start), length, device=query.device)[None]
        mask = causal_mask(positions, length, scoring.window, query.dtype)
        output = attend(query[None, :, start:end], near_keys, near_values, mask, scoring)
        outputs.append(output[0].transpose(0, 1))  # (count, heads, value size)
    return torch.cat(outputs)


def _kind(query: Tensor, key: Tensor, value: Tensor, cached: torch.dtype, scoring: Scoring) -> tuple[object, ...]:
    sizes = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
    return *sizes, query.dtype, cached, scoring.softcap is None, scoring.sinks is None


def _with_plain_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _lanes(number: int, least: int = 16) -> int:
    """The power of two for a number; products of Triton's need 16 at least."""
    return max(least, 1 << (number - 1).bit_length())
