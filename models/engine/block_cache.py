"""The keys and values of all sequences, in blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.engine.attention import Scoring
from models.engine.block_pool import PADDING_BLOCK, BlockPool
from models.engine.fused_attention import FusedAttention
from models.engine.kv_cache import name_of
from models.engine.transfers import to_device
from models.errors import CacheTooLargeError

SHARE = 0.85  # of the free memory; the rest is for what a step computes


class BlockCache:
    """Keys and values of up to `slots` sequences of `context` tokens, in blocks that sequences take as they grow.

    Each attention module gets two tensors, `cached_keys_0` and `cached_values_0`, (blocks, block size, heads, size).
    A module that runs several times in a forward gets two more for each time. So a model has one cache at a time. The
    number of blocks follows from the free memory, once all modules are known.
    """

    def __init__(
        self,
        slots: int,
        context: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype | None,
        fused: FusedAttention,
    ) -> None:
        self.slots = slots
        self.context = context
        self.device = device
        self.dtype = dtype
        self.fused = fused
        self.needs_groups = False  # whether some attention cannot be computed by it
        self.repeats = False  # whether some module runs several times in a forward
        self.tensors: list[tuple[Tensor, Tensor]] = []  # the keys and values of each module and call
        self._modules: list[tuple[nn.Module, int]] = []  # whose they are
        self.longest_table = -(-context // block_size)  # blocks
        self.pool = BlockPool(slots, PADDING_BLOCK + 1, block_size)
        # The blocks of each slot on the device; the last row is that of padding.
        self.tables = torch.full((slots + 1, self.longest_table), PADDING_BLOCK, dtype=torch.int32, device=device)

    @property
    def padding_slot(self) -> int:
        """The slot for padding tokens, which no sequence ever reads."""
        return self.slots

    @property
    def size(self) -> int:
        """The bytes of all tensors."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.tensors)

    @property
    def dtype_name(self) -> str:
        """The dtype of keys and values, as the settings name it."""
        return name_of(self.tensors[0][0].dtype)

    def blocks_of(self, tokens: int) -> int:
        """How many blocks so many tokens of a sequence take."""
        return -(-tokens // self.pool.size)

    def attach(self, module: nn.Module, call: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> None:
        """Give an attention module the tensors of a call, shaped like its `key` and `value`, (1, heads, tokens, size).

        They have the padding block only, until `allocate`.
        """
        tensors = self._block_like(key), self._block_like(value)
        kind = query, key, value, tensors[0].dtype, scoring
        self.fused.try_kind(*kind)
        self.needs_groups |= not self.fused.fits(*kind)
        self.repeats |= call > 0
        self._modules.append((module, call))
        self.tensors.append(tensors)
        self._register(module, call, *tensors)

    def allocate(self, blocks: int | None = None) -> None:
        """Give all modules blocks: as many as given, or as all slots need, or as fit. Raises CacheTooLargeError."""
        blocks = self._most_blocks() if blocks is None else blocks
        try:
            if blocks < self.longest_table:
                raise RuntimeError("not even one sequence fits")
            for index, ((module, call), (keys, values)) in enumerate(zip(self._modules, self.tensors, strict=True)):
                tensors = tuple(each.new_zeros(blocks + 1, *each.shape[1:]) for each in (keys, values))
                self.tensors[index] = tensors[0], tensors[1]
                self._register(module, call, *tensors)
        except RuntimeError as error:
            raise CacheTooLargeError(
                f"{self.device} has no room for a sequence of {self.context} tokens: lower PARLEY_CONTEXT, or "
                "set PARLEY_KV_CACHE=float8"
            ) from error
        self.pool = BlockPool(self.slots, blocks + 1, self.pool.size)

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block to another one."""
        each = [tensor for pair in self.tensors for tensor in pair]
        torch._foreach_copy_([tensor[target] for tensor in each], [tensor[source] for tensor in each])

    def send_tables(self) -> None:
        """Send the tables that have changed to the device. The host does not wait."""
        slots = sorted(self.pool.changed)
        if not slots:
            return
        rows = [number for slot in slots for number in self._padded(self.pool.tables[slot])]
        where, tables = to_device(slots, self.device), to_device(rows, self.device)
        self.tables.index_copy_(0, where, tables.view(len(slots), -1).to(torch.int32))
        self.pool.changed.clear()

    def _padded(self, table: list[int]) -> list[int]:
        return table + [PADDING_BLOCK] * (self.longest_table - len(table))

    def _most_blocks(self) -> int:
        """As many blocks as all slots need, or as fit the free memory of a GPU."""
        needed = self.slots * self.longest_table
        if self.device.type == "cpu":
            return needed
        torch.accelerator.empty_cache()  # what torch keeps for its next tensors would not count as free
        free, _ = torch.accelerator.get_memory_info(self.device)
        return min(needed, int(SHARE * free) // self.size)  # the size is that of one block now

    def _block_like(self, like: Tensor) -> Tensor:
        """One block for keys or values like some, (1, heads, tokens, size)."""
        _, heads, _, size = like.shape
        return like.new_zeros(1, self.pool.size, heads, size, dtype=self.dtype)

    def _register(self, module: nn.Module, call: int, keys: Tensor, values: Tensor) -> None:
        module.register_buffer(f"cached_keys_{call}", keys, persistent=False)
        module.register_buffer(f"cached_values_{call}", values, persistent=False)
