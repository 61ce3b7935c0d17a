"""The keys and values of all sequences, in slots."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor, nn

from models.engine.native.build import LANES
from models.errors import CacheTooLargeError

DTYPES = {  # by their names in the settings; for auto there is none
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
}


def name_of(dtype: torch.dtype) -> str:
    """A dtype, as the settings name it."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


class KVCache:
    """Keys and values of up to `slots` sequences, one row for each slot, and one more row for padding.

    Each attention module gets its own two tensors at its first forward: `cached_keys_0`, (slots + 1, heads, blocks,
    size, lanes), and `cached_values_0`, (slots + 1, heads, blocks * lanes, size rounded up to lanes). They are on the
    device of the module and have `dtype`, or the module's dtype if it is None. A module that runs several times in a
    forward gets two more for each time: `cached_keys_1` and so on. So a model has one cache at a time. On a CPU, a slot
    takes memory only for the positions that are written.
    """

    def __init__(self, slots: int, context: int, dtype: torch.dtype | None = None) -> None:
        self.slots = slots
        self.context = context
        self.dtype = dtype
        self.tensors: list[tuple[Tensor, Tensor]] = []  # the keys and values of each module and call
        self.size = 0  # bytes of all tensors for slots, when they are full

    @property
    def dtype_name(self) -> str:
        """The dtype of keys and values, as the settings name it."""
        return name_of(self.tensors[0][0].dtype)

    @property
    def padding_slot(self) -> int:
        """The slot for padding tokens, which no sequence ever reads."""
        return self.slots

    def attach(self, module: nn.Module, call: int, key: Tensor, value: Tensor) -> None:
        """Give an attention module the tensors of a call, shaped like its `key` and `value`, (1, heads, tokens, size).

        Raises CacheTooLargeError.
        """
        # On a CPU, keys of LANES positions are next to each other, so that the kernel can score them together.
        lanes = LANES if key.device.type == "cpu" else 1
        blocks = -(-self.context // lanes)
        heads, width = value.shape[1], -(-value.shape[3] // lanes) * lanes
        keys = self.zeros((self.slots + 1, heads, blocks, key.shape[3], lanes), self.dtype or key.dtype, key.device)
        values = self.zeros((self.slots + 1, heads, blocks * lanes, width), self.dtype or value.dtype, value.device)
        module.register_buffer(f"cached_keys_{call}", keys, persistent=False)
        module.register_buffer(f"cached_values_{call}", values, persistent=False)
        self.tensors.append((keys, values))

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        for keys, values in self.tensors:
            blocks = -(-length // keys.shape[-1])
            keys[target, :, :blocks] = keys[source, :, :blocks]
            values[target, :, :length] = values[source, :, :length]

    def clear(self, slot: int, start: int, end: int) -> None:
        """Set some positions to zero: an infinity or NaN there would spread through masked sums."""
        for keys, values in self.tensors:
            block, lane = divmod(start, keys.shape[-1])
            if lane:
                keys[slot, :, block, :, lane:] = 0
            keys[slot, :, -(-start // keys.shape[-1]) : -(-end // keys.shape[-1])] = 0
            values[slot, :, start:end] = 0

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor for all slots. Raises CacheTooLargeError."""
        size = math.prod(shape) * dtype.itemsize
        self.size += size
        try:
            if device.type != "cpu":
                return torch.zeros(shape, dtype=dtype, device=device)
            # The system adds each page when it is first written. torch.zeros writes all pages. numpy.zeros asks for
            # huge pages: then short sequences in many slots use gigabytes (5.0 GB after 32 chats, not 1.2).
            memory = mmap.mmap(-1, size)
            with torch.inference_mode(False):  # the compiler accepts no inference tensors
                return torch.frombuffer(memory, dtype=dtype).view(shape)
        except (RuntimeError, OSError, OverflowError) as error:
            raise CacheTooLargeError(
                f"{device} has no room for {self.slots} slots of {self.context} tokens: lower PARLEY_SLOTS "
                "or PARLEY_CONTEXT"
            ) from error
