"""The states of recurrent layers, in the slots of the key-value cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from models.engine.batch import Batch
from models.engine.kv_cache import KVCache

States = dict[tuple[str, int], Tensor]  # by kind, "conv" or "recurrent", and number: a layer may have several of a kind


@dataclass(frozen=True, eq=False)
class Run:
    """Neighbouring tokens of a step, from token `start` on: the next `count` tokens of each of `rows` sequences.

    A recurrent layer computes them in one call. `read` and `write` are the places of the states before and after these
    tokens, (rows,); `read` is None at the beginning of a sequence.
    """

    start: int
    rows: int
    count: int
    read: Tensor | None
    write: Tensor


class StateCache:
    """The states of all recurrent layers of a model.

    A state has a fixed size and stands for all tokens that its layer has read. A slot has two places for it: a step
    reads one and writes the other, so a step that failed can be tried again. A place is known by its number of tokens.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.layers: list[States] = []  # of each layer, (2 * (slots + 1), ...)
        self.lengths = [[-1, -1] for _ in range(cache.slots + 1)]  # the tokens of each place; -1: it has no state
        self.runs: list[Run] = []  # of the step that is computed now

    def __bool__(self) -> bool:
        """Whether the model has recurrent layers."""
        return bool(self.layers)

    def add(self, states: States, name: tuple[str, int], example: Tensor) -> None:
        """Add places for a state like the example, (rows, ...), to those of a layer. Raises CacheTooLargeError."""
        shape = (2 * (self.cache.slots + 1), *example.shape[1:])
        states[name] = self.cache.zeros(shape, example.dtype, example.device)

    @contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """Let recurrent layers find the states of a batch's sequences while the model computes it."""
        written = self._plan(batch) if self else []
        try:
            yield
        finally:
            self.runs = []
        for slot, place, length in written:
            self.lengths[slot][place] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the state of a slot after `length` tokens to another slot."""
        if not self:
            return
        place = self.lengths[source].index(length)
        self.lengths[target] = [-1, -1]
        for states in self.layers:
            for state in states.values():
                state[2 * target] = state[2 * source + place]
        self.lengths[target][0] = length

    def _plan(self, batch: Batch) -> list[tuple[int, int, int]]:
        """Plan the runs of a step. Returns the slots and places that it writes, with their numbers of tokens."""
        written: list[tuple[int, int, int]] = []
        runs: list[tuple[int, int, list[int], list[int]]] = []  # start, count, places to read, places to write
        for span in batch.spans:
            for row in range(span.rows):
                start = span.start + row * span.count
                slot, position = span.slot + row, batch.positions[start]
                read, place = self._places(slot, position)
                written.append((slot, place, position + span.count))
                if read and runs and runs[-1][1] == span.count == 1 and runs[-1][2]:  # single tokens share a run
                    runs[-1][2].extend(read)
                    runs[-1][3].append(2 * slot + place)
                else:
                    runs.append((start, span.count, read, [2 * slot + place]))
        self.runs = [
            Run(start, len(write), count, torch.tensor(read) if read else None, torch.tensor(write))
            for start, count, read, write in runs
        ]
        return written

    def _places(self, slot: int, position: int) -> tuple[list[int], int]:
        """Where the state of a slot before a position is, and which of the slot's places is to be written.

        Asserts that the slot has such a state.
        """
        lengths = self.lengths[slot]
        if position == 0:
            lengths[:] = [-1, -1]
            return [], 0
        assert position in lengths
        place = lengths.index(position)
        lengths[1 - place] = -1
        return [2 * slot + place], 1 - place
