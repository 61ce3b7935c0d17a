"""The attention of all sequences of a step, over the blocks of the key-value cache."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from models.engine.attention import CausalMask, Scoring, attend, causal_mask, rounded, scoring_of, slot_mask
from models.engine.block_cache import BlockCache
from models.engine.fused_attention import SequenceLayout

ATTENTION = "parley_blocks"  # the name in transformers' registry


@dataclass(frozen=True)
class Group:
    """Sequences of a step, from number `first` on, with `count` tokens each, from token `start` on.

    They attend to `blocks` blocks at most.
    """

    first: int
    rows: int
    start: int
    count: int
    blocks: int


@dataclass(eq=False)
class BlockMetadata:
    """Where the tokens of one step, (1, tokens), stand in their sequences and in the cache."""

    cells: Tensor  # (tokens,), the place of each in the cache: block * size + offset
    positions: Tensor  # (tokens,)
    layout: SequenceLayout
    groups: tuple[Group, ...]  # all sequences, for attention that our kernels cannot compute
    cache: BlockCache
    attaches: bool = False  # whether this is the first step, in which attention modules get their tensors
    _masks: dict[tuple[Group, int | None], Tensor] = field(default_factory=dict)
    _calls: dict[nn.Module, int] = field(default_factory=dict)

    def next_call(self, module: nn.Module) -> int:
        """How often a module was called in this step before. Each call has keys and values of its own."""
        call = self._calls.get(module, 0)
        self._calls[module] = call + 1
        return call

    def mask(self, group: Group, window: int | None, dtype: torch.dtype) -> Tensor:
        """The causal mask of a group, (rows, 1, count, tokens of its blocks)."""
        if (group, window) not in self._masks:
            positions = self.positions[group.start : group.start + group.rows * group.count]
            length = group.blocks * self.cache.pool.size
            self._masks[group, window] = causal_mask(positions.view(group.rows, group.count), length, window, dtype)
        return self._masks[group, window]


# The metadata of the step that runs.
STEP: ContextVar[BlockMetadata] = ContextVar("parley_block_step")


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CausalMask | Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' `AttentionInterface`, like `slot_attention`, over blocks."""
    scoring = scoring_of(query, attention_mask, **options)
    call = 0
    # A module that is compiled runs once in a step. (is_compiling() is true in all threads while one compiles.)
    if not torch.compiler.is_dynamo_compiling():
        metadata = STEP.get()
        call = metadata.next_call(module)
        if metadata.attaches:
            metadata.cache.attach(module, call, query, key, value, scoring)
    output = torch.ops.parley.block_attention(
        *(query, key, value, getattr(module, f"cached_keys_{call}"), getattr(module, f"cached_values_{call}")),
        *(scoring.sinks, scoring.scale, scoring.window or 0, scoring.softcap or 0.0),
    )
    return output, None


# One operator, so that the compiler does not look into it: it would copy the whole cache in each layer.
@torch.library.custom_op("parley::block_attention", mutates_args=("cached_keys", "cached_values"))
def attend_to_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Store keys and values, and attend to all before them: (1, tokens, heads, size of a value)."""
    metadata = STEP.get()
    scoring = Scoring(scale, window or None, softcap or None, sinks)
    if metadata.cache.fused.fits(query, key, value, cached_keys.dtype, scoring):
        return _fused_attention(query, key, value, cached_keys, cached_values, metadata, scoring)[None]
    return _gathered_attention(query, key, value, cached_keys, cached_values, metadata, scoring)[None]


@attend_to_blocks.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    metadata: BlockMetadata,
    scoring: Scoring,
) -> Tensor:
    """Attention by our kernels, which read the blocks where they are: (tokens, heads, size)."""
    fused = metadata.cache.fused
    fused.store(key[0], value[0], cached_keys, cached_values, metadata.cells)
    return fused.attend(query[0], cached_keys, cached_values, metadata.layout, scoring)


def _gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    metadata: BlockMetadata,
    scoring: Scoring,
) -> Tensor:
    """Attention by torch over copies of the blocks, for all that the kernels cannot do: (tokens, heads, size)."""
    for cached, new in ((cached_keys, key), (cached_values, value)):
        # A NaN or infinity would spread, through masked sums, to the next sequence that gets the block.
        new = torch.nan_to_num(new[0].transpose(0, 1), 0.0, 0.0, 0.0)  # (tokens, heads, size)
        cached.flatten(0, 1)[metadata.cells] = rounded(new, cached.dtype)
    outputs = []
    for group in metadata.groups:
        tables = metadata.layout.tables[group.first : group.first + group.rows, : group.blocks]
        # (rows, blocks, block size, heads, size) -> (rows, heads, length, size)
        near_keys, near_values = (
            cached[tables].flatten(1, 2).transpose(1, 2).to(query.dtype) for cached in (cached_keys, cached_values)
        )
        queries = query[0, :, group.start : group.start + group.rows * group.count].contiguous()
        queries = queries.view(len(queries), group.rows, group.count, -1).transpose(0, 1)  # (rows, heads, count, size)
        mask = metadata.mask(group, scoring.window, query.dtype)
        output = attend(queries, near_keys, near_values, mask, scoring)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (rows * count, heads, size)
    return torch.cat(outputs)


AttentionInterface.register(ATTENTION, block_attention)
AttentionMaskInterface.register(ATTENTION, slot_mask)
