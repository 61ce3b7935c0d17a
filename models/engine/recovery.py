"""Steps an engine, and recovers from steps that fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from models.engine.engine import Engine
from models.engine.sequence import Sequence, Token
from models.errors import one_line

logger = logging.getLogger("parley")

Outcome = tuple[Sequence, Token | None]  # None: the sequence has failed

TRIES = 3  # failed steps in a row, in which no sequence fails alone, before all sequences end
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED")  # CUDA, CPU, C++, cuBLAS


class StepRecovery:
    """Steps an engine. After a step that fails, each sequence runs alone: one that fails again ends, the others go on.

    If none fails alone, the batch is too large. After an out-of-memory error, the engine runs half as many sequences
    from then on, and the newest ones end. After any other error, all sequences end at the third such step in a row.
    """

    def __init__(
        self,
        engine: Engine,
        on_shrink: Callable[[int], None] | None = None,
        on_step: Callable[[float], None] | None = None,
    ) -> None:
        self.engine = engine
        self._on_shrink = on_shrink  # gets the new number of slots
        self._on_step = on_step  # gets the seconds of each step
        self._unexplained = 0  # failed steps in a row in which no sequence fails alone

    def step(self) -> list[Outcome]:
        """Run a step; returns an outcome for each sequence that gets a token or ends.

        Raises the error of a broken device.
        """
        outcomes = self._step()
        return [*outcomes, *((sequence, None) for sequence in self.engine.take_failed())]

    def _step(self) -> list[Outcome]:
        began = time.perf_counter()
        try:
            tokens = self.engine.step()
        except Exception as error:
            logger.exception("an engine step of %d sequences failed", len(self.engine.scheduler.active))
            out_of_memory = _is_out_of_memory(error)
        else:
            if self._on_step:
                self._on_step(time.perf_counter() - began)
            self._unexplained = 0
            return [(token.sequence, token) for token in tokens]
        # Outside of the except clause: the traceback of the error keeps all memory that the step used.
        return self._recover(out_of_memory)

    def _recover(self, out_of_memory: bool) -> list[Outcome]:
        if out_of_memory:
            torch.cuda.empty_cache()  # does nothing without CUDA
        active = self.engine.scheduler.active
        outcomes = [outcome for sequence in active for outcome in self._step_alone(sequence)]
        failed = [sequence for sequence, token in outcomes if not token]
        if not failed:
            outcomes += [self._fail(sequence) for sequence in self._sequences_to_end(out_of_memory)]
        elif len(failed) == len(active):
            self.engine.runner.probe()
        return outcomes

    def _step_alone(self, sequence: Sequence) -> list[Outcome]:
        try:
            return [(token.sequence, token) for token in self.engine.step([sequence])]
        except Exception as error:
            logger.error("a sequence of %d tokens fails alone too: %s", len(sequence.tokens), one_line(error))
            return [self._fail(sequence)]

    def _fail(self, sequence: Sequence) -> Outcome:
        self.engine.cancel(sequence)
        return sequence, None

    def _sequences_to_end(self, out_of_memory: bool) -> list[Sequence]:
        """The sequences that have to end so that the others can go on."""
        if out_of_memory and self.engine.scheduler.limit > 1:
            return self._shrink()
        self._unexplained += 1
        if self._unexplained < TRIES:
            return []
        logger.error("%d engine steps in a row failed, but no sequence failed alone: all sequences end", TRIES)
        self._unexplained = 0
        return self.engine.scheduler.active

    def _shrink(self) -> list[Sequence]:
        active, before = self.engine.scheduler.active, self.engine.scheduler.limit
        slots = self.engine.scheduler.limit = before // 2
        logger.warning("out of memory: from %d slots to %d; lower PARLEY_SLOTS or PARLEY_CONTEXT", before, slots)
        if self._on_shrink:
            self._on_shrink(slots)
        return active[slots:]


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in OUT_OF_MEMORY)
