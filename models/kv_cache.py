"""Slots of keys and values, and the attention that reads them."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from models.settings import StartError

ATTENTION = "parley_slots"
LANES = 16  # on a CPU, keys of so many positions stand side by side, for the kernel to score together


class CacheTooLarge(StartError):
    """The device has no room for the slots; the message says what to lower."""


class UnsupportedModel(StartError):
    """The model's attention cannot run on this cache; `why` says what it does that is not known here."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the model cannot run on this engine: {why}; choose a decoder-only model with plain attention"
        )


class KVCache:
    """Keys and values of up to `slots` sequences, one row a slot, and one more row for scratch.

    Each attention module gets two tensors of its own at its first forward, `cached_keys` of (slots + 1, heads,
    blocks, size, lanes) and `cached_values` of (slots + 1, heads, blocks * lanes, size), on its device and in
    `dtype` or else its own. So a model has one cache at a time. On a CPU, what was never written takes no memory.
    """

    def __init__(self, slots: int, context: int, dtype: torch.dtype | None = None) -> None:
        self.slots = slots
        self.context = context
        self.dtype = dtype
        self.modules: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    @property
    def scratch(self) -> int:
        """The slot that no sequence ever reads: tokens that stand for nothing go there."""
        return self.slots

    def attach(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Give an attention module its tensors; `key` and `value`, (1, heads, tokens, size), say how they look."""
        lanes = LANES if key.device.type == "cpu" else 1
        blocks = -(-self.context // lanes)
        heads, width = value.shape[1], -(-value.shape[3] // lanes) * lanes
        keys = self._zeros((self.slots + 1, heads, blocks, key.shape[3], lanes), key)
        values = self._zeros((self.slots + 1, heads, blocks * lanes, width), value)
        module.register_buffer("cached_keys", keys, persistent=False)
        module.register_buffer("cached_values", values, persistent=False)
        self.modules[module] = keys, values

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot begin with the first `length` positions of another."""
        for keys, values in self.modules.values():
            blocks = -(-length // keys.shape[-1])
            keys[target, :, :blocks] = keys[source, :, :blocks]
            values[target, :, :length] = values[source, :, :length]

    def clear(self, slot: int, start: int, end: int) -> None:
        """Forget some positions: an infinity there would reach others through a mask's sums."""
        for keys, values in self.modules.values():
            block, lane = divmod(start, keys.shape[-1])
            if lane:
                keys[slot, :, block, :, lane:] = 0
            keys[slot, :, -(-start // keys.shape[-1]) : -(-end // keys.shape[-1])] = 0
            values[slot, :, start:end] = 0

    def _zeros(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        dtype = self.dtype or like.dtype
        try:
            if like.device.type != "cpu":
                return torch.zeros(shape, dtype=dtype, device=like.device)
            # Pages that the system fills in when they are written; torch.zeros writes them all, and numpy's ask for
            # huge ones, of which short sequences in many slots touch gigabytes (5.0 GB after 32 chats, 1.2 so).
            memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
            with torch.inference_mode(False):  # the compiler takes no others
                return torch.frombuffer(memory, dtype=dtype).view(shape)
        except (RuntimeError, OSError, OverflowError) as error:
            raise CacheTooLarge(
                f"{like.device} has no room for {self.slots} slots of {self.context} tokens: lower PARLEY_SLOTS "
                "or PARLEY_CONTEXT"
            ) from error


@dataclass(frozen=True)
class Part:
    """A rectangle of a forward's tokens: from token `start` on, `count` tokens for each of `rows` slots from `slot` on.

    `length` is one more than the highest position that matters to them.
    """

    slot: int
    rows: int
    start: int
    count: int
    length: int


@dataclass(eq=False)
class Rows:
    """Where the tokens of one forward, (1, tokens), belong: each one's slot and its position in it."""

    slots: Tensor  # (tokens,)
    positions: Tensor  # (tokens,)
    parts: tuple[Part, ...]
    native: bool = False  # whether our kernel is to compute
    unattached: KVCache | None = None  # for a first forward: whose tensors the attention modules are to get
    _masks: dict[tuple[Part, int | None, torch.device], Tensor] = field(default_factory=dict)

    def mask(self, part: Part, window: int | None, like: Tensor) -> Tensor:
        """0 where a token may look, -inf elsewhere, (rows, 1, count, length): causal, `window` back at most."""
        if (part, window, like.device) not in self._masks:
            positions = self.positions[part.start : part.start + part.rows * part.count].to(like.device)
            query = positions.view(part.rows, 1, part.count, 1)
            key = torch.arange(part.length, device=like.device)  # (length,)
            visible = key <= query
            if window is not None:
                visible &= key > query - window
            mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
            self._masks[part, window, like.device] = mask.masked_fill_(~visible, -torch.inf)
        return self._masks[part, window, like.device]


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    rows: Rows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' `AttentionInterface` over the slots that the forward's rows name.

    `query` is (1, heads, tokens, size), `key` and `value` have the key-value heads only; the result is
    (1, tokens, heads, size). Honours grouped queries, sliding windows, soft-capping and attention sinks.
    Raises UnsupportedModel for what it cannot honour.
    """
    if rows is None:
        raise UnsupportedModel("its layers keep keyword arguments from their attention")
    if not getattr(module, "is_causal", True) or kwargs.get("position_bias") is not None:
        raise UnsupportedModel("its attention is not causal, or adds a position bias")
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if rows.unattached is not None:
        rows.unattached.attach(module, key, value)
    keys: Tensor = module.cached_keys  # type: ignore[assignment]
    values: Tensor = module.cached_values  # type: ignore[assignment]
    if rows.native:
        # A step of 32 rows, 200 tokens each: 0.1 ms a layer, and the same bits in any batch.
        output = torch.ops.parley.attention(
            *(query.float(), key.float(), value.float(), keys, values),
            *(rows.slots, rows.positions, None if s_aux is None else s_aux.float()),
            *(scale, softcap or 0.0, window or 0),
        )
        return output.to(query.dtype), None
    slots, positions = rows.slots.to(key.device), rows.positions.to(key.device)
    block, lane = positions // keys.shape[-1], positions % keys.shape[-1]
    keys[slots, :, block, :, lane] = key[0].transpose(0, 1).to(keys.dtype)  # (tokens, heads, size)
    values[slots, :, positions, : value.shape[-1]] = value[0].transpose(0, 1).to(values.dtype)
    outputs = []
    for part in rows.parts:
        here = slice(part.slot, part.slot + part.rows)
        blocks = -(-part.length // keys.shape[-1])
        some_keys = keys[here, :, :blocks].transpose(-1, -2).flatten(2, 3)[:, :, : part.length].to(query.dtype)
        some_values = values[here, :, : part.length, : value.shape[-1]].to(query.dtype)
        some = query[0, :, part.start : part.start + part.rows * part.count].contiguous()  # (heads, rows * count, size)
        some = some.view(len(some), part.rows, part.count, -1).transpose(0, 1)  # (rows, heads, count, size)
        some = _attend(some, some_keys, some_values, rows.mask(part, window, query), scale, softcap, s_aux)
        outputs.append(some.transpose(0, 1).flatten(1, 2))  # (heads, rows * count, size)
    return torch.cat(outputs, 1).transpose(0, 1)[None].contiguous(), None


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of (rows, heads, count, size) over keys and values of (rows, key heads, length, size)."""
    rows, heads, count, size = query.shape
    groups = heads // keys.shape[1]
    # Queries that share a key head become rows of one product: no copy of the keys for each of them.
    query = query.reshape(rows, keys.shape[1], groups * count, size)
    mask = mask.repeat(1, 1, groups, 1)  # (rows, 1, groups * count, length)
    if softcap is None and sinks is None:
        output = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    else:
        sinks = None if sinks is None else sinks.view(1, keys.shape[1], groups, 1)
        output = _written_out(query, keys, values, mask, scale, softcap, sinks)
    return output.reshape(rows, heads, count, values.shape[-1])


def _written_out(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention written out, for what the fused kernels lack: soft-capped scores (Gemma 2) and sinks (gpt-oss)."""
    scores = query @ keys.transpose(-1, -2) * scale  # (rows, key heads, groups * count, length)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + mask).float()
    if sinks is not None:  # one more column that takes weight and gives nothing
        rows, key_heads, queries, _ = scores.shape
        groups = sinks.shape[2]
        column = sinks.expand(rows, -1, -1, queries // groups).reshape(rows, key_heads, queries, 1)
        return torch.cat([scores, column.to(scores)], dim=-1).softmax(-1)[..., :-1].to(values.dtype) @ values
    return scores.softmax(-1).to(values.dtype) @ values


AttentionInterface.register(ATTENTION, slot_attention)
# The slots know what each token may see, so the model need not build a mask.
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
