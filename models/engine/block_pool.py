"""Keeps track of which blocks of the key-value cache hold the tokens of each slot."""

from __future__ import annotations

PADDING_BLOCK = 0  # where tokens go that belong to no sequence


class BlockPool:
    """Gives blocks of `size` tokens to slots as they grow. Pure bookkeeping: no tensor is touched here.

    A slot's table has its blocks in the order of its tokens. Slots may share whole blocks, which then no one writes.
    """

    def __init__(self, slots: int, blocks: int, size: int) -> None:
        self.size = size
        self.tables: list[list[int]] = [[] for _ in range(slots)]
        self.changed: set[int] = set()  # slots whose tables the device does not know yet
        self._free = list(range(blocks - 1, PADDING_BLOCK, -1))
        self._users = [0] * blocks  # in how many tables each block is

    @property
    def capacity(self) -> int:
        """The tokens of all blocks."""
        return (len(self._users) - 1) * self.size

    @property
    def free(self) -> int:
        """How many blocks no slot has."""
        return len(self._free)

    def share_of(self, slots: list[int]) -> float:
        """The share of all blocks that some slots have, from 0 to 1. A block that several have counts once."""
        return len({block for slot in slots for block in self.tables[slot]}) * self.size / self.capacity

    def grow(self, slot: int, length: int) -> bool:
        """Let a slot have blocks for its first `length` tokens. False, and nothing changes, if too few are free."""
        table = self.tables[slot]
        more = -(-length // self.size) - len(table)
        if more > self.free:
            return False
        if more > 0:
            table += [self._take() for _ in range(more)]
            self.changed.add(slot)
        return True

    def shrink(self, slot: int, length: int) -> None:
        """Take from a slot the blocks that its first `length` tokens do not need."""
        table = self.tables[slot]
        while len(table) > -(-length // self.size):
            self._give_back(table.pop())
            self.changed.add(slot)

    def needs_copy(self, source: int, target: int, length: int) -> bool:
        """Whether `share` has to copy a block: the last one, which the target goes on to write."""
        if length % self.size == 0:
            return False
        return source != target or self._users[self.tables[source][length // self.size]] > 1

    def share(self, source: int, target: int, length: int) -> tuple[int, int] | None:
        """Let a slot begin with the first `length` tokens of a slot, in place of all that it had.

        Returns the block that has to be copied, and the one that it is copied to, or None. Asserts that one is free.
        """
        whole = self.tables[source][: length // self.size]
        if not self.needs_copy(source, target, length):
            if source == target:
                self.shrink(target, length)
                return None
            copy, table = None, whole
        else:
            copy = self.tables[source][length // self.size], self._take()
            table = [*whole, copy[1]]
        for block in whole:
            self._users[block] += 1
        before, self.tables[target] = self.tables[target], table
        self.changed.add(target)
        for block in before:
            self._give_back(block)
        return copy

    def _take(self) -> int:
        block = self._free.pop()
        self._users[block] = 1
        return block

    def _give_back(self, block: int) -> None:
        self._users[block] -= 1
        if not self._users[block]:
            self._free.append(block)
