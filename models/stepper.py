"""Steps of an engine, and how it goes on after one that fails."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable

import torch

from models.engine import Engine
from models.sequence import Sequence, Token

logger = logging.getLogger("parley")

Outcome = tuple[Sequence, Token | None]  # None: the sequence has failed

TRIES = 3  # steps in a row may fail although each of their sequences gets on alone
NO_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED")  # CUDA, the CPU, C++, cuBLAS


class Stepper:
    """Steps an engine. After a step that fails each sequence takes it alone: who fails again ends, the others go on.

    Where none fails alone, they are too many at once. If it was memory that they lacked, half as many run from then
    on, and those of them that joined last end; if not, all end in the third such step in a row.
    """

    def __init__(
        self,
        engine: Engine,
        on_shrink: Callable[[int], None] | None = None,
        observe_step: Callable[[float], None] | None = None,
    ) -> None:
        self.engine = engine
        self._on_shrink = on_shrink
        self._observe_step = observe_step
        self._unexplained = 0  # such steps in a row

    def step(self) -> list[Outcome]:
        """What a step came to, for those that have a token and those that end. Raises what a broken engine raises."""
        began = time.perf_counter()
        try:
            tokens = self.engine.step()
        except Exception as error:
            logger.exception("an engine step of %d sequences failed", len(self.engine.active))
            no_memory = _no_memory(error)
        else:
            if self._observe_step:
                self._observe_step(time.perf_counter() - began)
            self._unexplained = 0
            return [(token.sequence, token) for token in tokens]
        # Not before the error is gone, whose traceback holds all that the step had in memory.
        return self._go_on(no_memory)

    def _go_on(self, no_memory: bool) -> list[Outcome]:
        if no_memory:
            torch.cuda.empty_cache()  # nothing without CUDA
        active = self.engine.active
        outcomes = [outcome for sequence in active for outcome in self._alone(sequence)]
        failed = [sequence for sequence, token in outcomes if not token]
        if not failed:
            outcomes += [self._end(sequence) for sequence in self._too_many(no_memory)]
        elif len(failed) == len(active):
            self.engine.probe()
        return outcomes

    def _alone(self, sequence: Sequence) -> list[Outcome]:
        try:
            return [(token.sequence, token) for token in self.engine.step([sequence])]
        except Exception as error:
            logger.error("a sequence of %d tokens fails alone too: %s", len(sequence.tokens), in_one_line(error))
            return [self._end(sequence)]

    def _end(self, sequence: Sequence) -> Outcome:
        self.engine.cancel(sequence)
        return sequence, None

    def _too_many(self, no_memory: bool) -> list[Sequence]:
        """Those that are to end, for the others to go on."""
        if no_memory and self.engine.limit > 1:
            return self._shrink()
        self._unexplained += 1
        if self._unexplained < TRIES:
            return []
        logger.error("%d engine steps in a row failed, and no sequence alone: all end", TRIES)
        self._unexplained = 0
        return self.engine.active

    def _shrink(self) -> list[Sequence]:
        active, before = self.engine.active, self.engine.limit
        slots = self.engine.limit = before // 2
        logger.warning("out of memory: from %d slots to %d; lower PARLEY_SLOTS or PARLEY_CONTEXT", before, slots)
        if self._on_shrink:
            self._on_shrink(slots)
        return active[slots:]


def _no_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in NO_MEMORY)


def in_one_line(error: BaseException) -> str:
    """What an error is and says, in 250 characters at most."""
    return " ".join("".join(traceback.format_exception_only(error)).split())[:250]
