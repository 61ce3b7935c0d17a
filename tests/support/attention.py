"""Attention over the slots of a cache, and the same attention by its definition."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.engine.attention import STEP, AttentionMetadata, CausalMask, Span, slot_attention
from models.engine.kv_cache import KVCache

LENGTH = 70  # several blocks of lanes, the last one not full


@dataclass(frozen=True)
class Shape:
    heads: int
    key_heads: int
    size: int
    value_size: int

    def __str__(self) -> str:
        return f"{self.heads} heads on {self.key_heads} of {self.size} and {self.value_size}"


SMALL = Shape(4, 2, 12, 12)


@dataclass(frozen=True)
class QKV:
    """Queries, keys and values of one sequence, (heads, length, size) each."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def random(cls, shape: Shape, seed: int, length: int = LENGTH) -> QKV:
        source = torch.Generator().manual_seed(seed)
        sizes = [(shape.heads, shape.size), (shape.key_heads, shape.size), (shape.key_heads, shape.value_size)]
        return cls(*(2 * torch.randn(heads, length, size, generator=source) for heads, size in sizes))

    def to(self, dtype: torch.dtype) -> QKV:
        return QKV(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype))


@dataclass(frozen=True)
class Segment:
    """Tokens of a forward: for neighbouring slots from `slot` on, `count` tokens each, from a start of their own."""

    slot: int
    starts: tuple[int, ...]
    count: int


class CachedAttention:
    """An attention module with a cache of its own."""

    def __init__(self, slots: int = 3, context: int = LENGTH, dtype: torch.dtype | None = None) -> None:
        self.module = nn.Module()
        self.cache = KVCache(slots, context, dtype)

    @property
    def keys(self) -> Tensor:
        """The cached keys, (slots + 1, heads, positions, size)."""
        return self.cache.tensors[0][0].transpose(-1, -2).flatten(2, 3)

    @property
    def values(self) -> Tensor:
        return self.cache.tensors[0][1]

    def forward(
        self,
        segments: list[Segment],
        inputs: dict[int, QKV],
        native: bool,
        window: int | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """One forward over `inputs`, by slot. A result for each slot of each segment, (count, heads, value size)."""
        slots: list[int] = []
        positions: list[int] = []
        spans = []
        for segment in segments:
            length = max(segment.starts) + segment.count
            spans.append(Span(segment.slot, len(segment.starts), len(slots), segment.count, length))
            for row, start in enumerate(segment.starts):
                slots += [segment.slot + row] * segment.count
                positions += range(start, start + segment.count)
        places = list(zip(slots, positions, strict=True))
        query = torch.stack([inputs[slot].query[:, position] for slot, position in places], 1)[None]
        key = torch.stack([inputs[slot].key[:, position] for slot, position in places], 1)[None]
        value = torch.stack([inputs[slot].value[:, position] for slot, position in places], 1)[None]
        attach_to = None if self.cache.tensors else self.cache
        metadata = AttentionMetadata(torch.tensor(slots), torch.tensor(positions), tuple(spans), native, attach_to)
        step = STEP.set(metadata)
        output, _ = slot_attention(self.module, query, key, value, CausalMask(window), **options)
        STEP.reset(step)
        assert output.shape == (1, len(places), query.shape[1], value.shape[3])
        return list(torch.split(output[0], [segment.count for segment in segments for _ in segment.starts]))

    def prefill(self, qkv: QKV, native: bool, ends: list[int], slot: int = 0, **options: Any) -> Tensor:
        """The results for a sequence in chunks that end at `ends`, (length, heads, value size)."""
        results = []
        for start, end in itertools.pairwise([0, *ends]):
            results += self.forward([Segment(slot, (start,), end - start)], {slot: qkv}, native, **options)
        return torch.cat(results)


def defined_attention(
    qkv: QKV,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention by its definition, one query at a time, (length, heads, value size)."""
    query, key, value = (tensor.double() for tensor in (qkv.query, qkv.key, qkv.value))
    heads, length, size = query.shape
    result = torch.zeros(length, heads, value.shape[2], dtype=torch.float64)
    for head in range(heads):
        key_head = head // (heads // len(key))
        for position in range(length):
            seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
            scores = key[key_head, seen] @ query[head, position] * (scale or size**-0.5)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
            result[position, head] = weights @ value[key_head, seen] / total
    return result.float()
