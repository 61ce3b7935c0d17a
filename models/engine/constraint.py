"""What limits the tokens of a sequence, such as a grammar."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Constraint(Protocol):
    """Says which tokens of one sequence may come next. One thread uses it.

    Its methods raise FormatFailedError if it cannot go on; that ends its sequence and no other one.
    """

    @property
    def ended(self) -> bool:
        """Whether nothing may follow but the end of the sequence."""

    def fill(self, mask: Tensor) -> None:
        """Set the bits of the tokens that may come next, and clear all others. Changes no state.

        `mask` is int32 words on the host, (words,): token i is bit i % 32 of word i // 32. A stop token is set only
        where the sequence may end.
        """

    def accept(self, token_id: int) -> None:
        """Go on after a token, which is none that stops the sequence."""
