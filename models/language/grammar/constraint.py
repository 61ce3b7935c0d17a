"""A grammar as the constraint of a reply."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from llguidance import LLMatcher
from torch import Tensor

from models.errors import FormatFailedError, one_line

BURST_SECONDS = 0.1  # of the engine's thread, which one reply may take for its grammar
TOKEN_SECONDS = 0.002  # and more for each of its tokens; a usual one takes a hundredth


@dataclass
class CompiledGrammar:
    """A grammar that was compiled. Its matchers share what they learn of it, which takes memory."""

    matcher: LLMatcher
    words: int  # of its masks
    param: str
    seconds: float = 0.0  # that its matchers took; memory grows with it

    def new_constraint(self) -> GrammarConstraint:
        """A constraint at the beginning of the grammar."""
        return GrammarConstraint(self, self.matcher.deep_copy())


class GrammarConstraint:
    """The `Constraint` of a reply whose text has a grammar. `clock` has the seconds that its thread has worked."""

    def __init__(
        self, grammar: CompiledGrammar, matcher: LLMatcher, clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._grammar = grammar
        self._matcher = matcher
        self._clock = clock
        self._allowed = BURST_SECONDS

    @property
    def ended(self) -> bool:
        """Whether nothing may follow but the end of the sequence."""
        return self._matcher.is_stopped()

    def fill(self, mask: Tensor) -> None:
        """Set the bits of the tokens that may come next, and clear all others. Raises FormatFailedError."""
        with self._timed():
            words = mask
            if mask.numel() < self._grammar.words:  # the tokenizer has tokens that the model has not
                words = torch.empty(self._grammar.words, dtype=mask.dtype)
            self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * words.element_size())
            if words is not mask:
                mask.copy_(words[: mask.numel()])
        if not mask.any():
            raise self._failure("no token can follow")

    def accept(self, token_id: int) -> None:
        """Go on after a token. Raises FormatFailedError."""
        with self._timed():
            self._matcher.consume_token(token_id)
        self._allowed += TOKEN_SECONDS

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """What takes longer than allowed fails, and so does what ends with an error of llguidance."""
        began = self._clock()
        yield
        seconds = self._clock() - began
        self._grammar.seconds += seconds
        self._allowed -= seconds
        if self._matcher.is_error():
            raise self._failure(self._matcher.get_error())
        if self._allowed < 0:
            raise self._failure("it takes too long to follow")

    def _failure(self, reason: str) -> FormatFailedError:
        text = one_line(reason.replace("<non-verbose/>", "")).strip()
        return FormatFailedError(f"the reply cannot go on in its format: {text}", self._grammar.param)
