"""What the slots still hold, so that a conversation's next turn, or a shared system prompt, is not read again."""

from __future__ import annotations

from collections.abc import Sequence

WORTH_COPYING = 16  # tokens; fewer are read again as fast


class PrefixCache:
    """The tokens whose keys and values each slot holds, in order, and which slot was used last."""

    def __init__(self, slots: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self._used: list[int] = [0] * slots
        self._clock = 0

    def find(self, prompt: list[int]) -> tuple[int, int]:
        """The slot that begins with most of the prompt's tokens, and how many; never all: the last gives logits."""
        shared = [_shared(prompt, tokens) for tokens in self.tokens]
        slot = max(range(len(shared)), key=lambda slot: (shared[slot], self._used[slot]))
        length = min(shared[slot], len(prompt) - 1)
        return slot, length if length >= WORTH_COPYING else 0

    def choose(self, free: Sequence[int], source: int, length: int) -> int:
        """The free slot that a prompt is to get: the source itself if little else is lost, or the longest unused."""
        if source in free and 2 * length >= len(self.tokens[source]):
            return source
        return min(free, key=lambda slot: self._used[slot])

    def hold(self, slot: int, tokens: list[int]) -> None:
        """Note what a slot holds now."""
        self._clock += 1
        self._used[slot] = self._clock
        self.tokens[slot] = tokens


def _shared(prompt: list[int], tokens: list[int]) -> int:
    length = min(len(prompt), len(tokens))
    if prompt[:length] == tokens[:length]:  # a thousand times faster than a loop over them
        return length
    return next(index for index in range(length) if prompt[index] != tokens[index])
