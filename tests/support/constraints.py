"""Constraints whose tokens a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from models.errors import FormatFailedError


def set_bits(mask: Tensor, tokens: Iterable[int]) -> None:
    """Let a mask have some tokens and no others."""
    words = mask.numpy().view("uint32")
    words[:] = 0
    for token in tokens:
        words[token // 32] |= 1 << token % 32


class Cycle:
    """Allows one of some sets of tokens after the other, again and again, and ends after `length` tokens.

    `accepted` has the tokens, `filled` how many of them each mask came after. The other two say where it fails.
    """

    def __init__(
        self,
        allowed: list[set[int]],
        length: int = 10**6,
        fills_fail: Callable[[int], bool] = lambda tokens: False,
        accepts_fail: Callable[[int], bool] = lambda tokens: False,
    ) -> None:
        self.allowed = allowed
        self.length = length
        self.fills_fail = fills_fail
        self.accepts_fail = accepts_fail
        self.accepted: list[int] = []
        self.filled: list[int] = []

    @property
    def ended(self) -> bool:
        return len(self.accepted) >= self.length

    def fill(self, mask: Tensor) -> None:
        if self.fills_fail(len(self.accepted)):
            raise FormatFailedError("too complex")
        self.filled.append(len(self.accepted))
        set_bits(mask, self.allowed[len(self.accepted) % len(self.allowed)])

    def accept(self, token_id: int) -> None:
        assert token_id in self.allowed[len(self.accepted) % len(self.allowed)]
        self.accepted.append(token_id)
        if self.accepts_fail(len(self.accepted)):
            raise FormatFailedError("too complex")
