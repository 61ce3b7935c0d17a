"""Slots of keys and values, and the attention that reads them."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from models.settings import StartError

ATTENTION = "parley_slots"


class CacheTooLarge(StartError):
    """The device has no room for the slots; the message says what to lower."""


class UnsupportedModel(StartError):
    """The model's attention cannot run on this cache; `why` says what it does that is not known here."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the model cannot run on this engine: {why}; choose a decoder-only model with plain attention"
        )


class KVCache:
    """Keys and values of up to `slots` sequences, one row a slot.

    Each layer has two tensors of its own, (slots, context + 1, heads, size), made at its first forward from
    the shape, dtype and device it shows. The position after the context is scratch: rows without a token
    write there. On a CPU, what was never written takes no memory.
    """

    def __init__(self, slots: int, context: int) -> None:
        self.slots = slots
        self.context = context
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def scratch(self) -> int:
        """The position that no sequence ever reads."""
        return self.context

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The two tensors of one layer; `key` and `value`, (rows, heads, tokens, size), say how they look."""
        if index not in self.layers:
            self.layers[index] = (self._zeros(key), self._zeros(value))
        return self.layers[index]

    def clear(self, slot: int, length: int) -> None:
        """Forget a sequence: an infinity in what it left would reach the next one through the mask's sums."""
        for keys, values in self.layers.values():
            keys[slot, :length] = 0
            values[slot, :length] = 0

    def _zeros(self, like: Tensor) -> Tensor:
        _, heads, _, size = like.shape
        shape = (self.slots, self.context + 1, heads, size)
        try:
            if like.device.type != "cpu":
                return torch.zeros(shape, dtype=like.dtype, device=like.device)
            # Pages that the system fills in when they are written; torch.zeros writes them all, and numpy's ask for
            # huge ones, of which short sequences in many slots touch gigabytes (5.0 GB after 32 chats, 1.2 so).
            memory = mmap.mmap(-1, math.prod(shape) * like.itemsize)
            return torch.frombuffer(memory, dtype=like.dtype).view(shape)
        except (RuntimeError, OSError, OverflowError) as error:
            raise CacheTooLarge(
                f"{like.device} has no room for {self.slots} slots of {self.context} tokens: lower PARLEY_SLOTS "
                "or PARLEY_CONTEXT"
            ) from error


@dataclass(eq=False)
class Slots:
    """The consecutive slots that one forward writes to and reads from: row i is slot `first + i`.

    `positions`, (rows, tokens), says where in its slot each token belongs; `length` is one more than the
    highest of them that matters.
    """

    cache: KVCache
    first: int
    positions: Tensor
    length: int
    _masks: dict[tuple[int | None, torch.device], Tensor] = field(default_factory=dict)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write this forward's keys and values; return all that its rows may see, (rows, heads, length, size)."""
        keys, values = self.cache.layer(layer, key, value)
        rows = slice(self.first, self.first + len(self.positions))
        positions = self.positions.to(key.device)
        row = torch.arange(rows.start, rows.stop, device=key.device)[:, None]  # (rows, 1)
        keys[row, positions] = key.transpose(1, 2)  # (rows, tokens, heads, size)
        values[row, positions] = value.transpose(1, 2)
        return keys[rows, : self.length].transpose(1, 2), values[rows, : self.length].transpose(1, 2)

    def mask(self, window: int | None, like: Tensor) -> Tensor:
        """0 where a token may look, -inf elsewhere, (rows, 1, tokens, length): causal, `window` back at most."""
        if (window, like.device) not in self._masks:
            query = self.positions.to(like.device)[:, None, :, None]  # (rows, 1, tokens, 1)
            key = torch.arange(self.length, device=like.device)  # (length,)
            visible = key <= query
            if window is not None:
                visible &= key > query - window
            mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
            self._masks[window, like.device] = mask.masked_fill_(~visible, -torch.inf)
        return self._masks[window, like.device]


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    slots: Slots | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' `AttentionInterface` over the slots that the forward was given.

    `query` is (rows, heads, tokens, size), `key` and `value` have the key-value heads only; the result is
    (rows, tokens, heads, size). Honours grouped queries, sliding windows, soft-capping and attention sinks.
    Raises UnsupportedModel for what it cannot honour.
    """
    if slots is None:
        raise UnsupportedModel("its layers keep keyword arguments from their attention")
    if not getattr(module, "is_causal", True) or kwargs.get("position_bias") is not None:
        raise UnsupportedModel("its attention is not causal, or adds a position bias")
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    keys, values = slots.update(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    mask = slots.mask(window, query)

    rows, heads, tokens, size = query.shape
    groups = heads // keys.shape[1]
    # Queries that share a key head become rows of one product: no copy of the keys for each of them.
    query = query.reshape(rows, keys.shape[1], groups * tokens, size)
    mask = mask.repeat(1, 1, groups, 1)  # (rows, 1, groups * tokens, length)
    if softcap is None and s_aux is None:
        output = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    else:
        sinks = None if s_aux is None else s_aux.view(1, keys.shape[1], groups, 1)
        output = _written_out(query, keys, values, mask, scaling or size**-0.5, softcap, sinks)
    output = output.reshape(rows, heads, tokens, values.shape[-1])
    return output.transpose(1, 2).contiguous(), None


def _written_out(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention written out, for what the fused kernels lack: soft-capped scores (Gemma 2) and sinks (gpt-oss)."""
    scores = query @ keys.transpose(-1, -2) * scaling  # (rows, key heads, groups * tokens, length)
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
