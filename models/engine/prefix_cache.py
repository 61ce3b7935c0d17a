"""Keeps track of the tokens in each slot, so that the common prefix of two prompts is computed only once."""

from __future__ import annotations

MIN_PREFIX = 16  # tokens; a shorter prefix is computed as fast as it is copied


class PrefixCache:
    """The tokens whose keys and values each slot holds, in order, and which slot was used last."""

    def __init__(self, slots: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self._used: list[int] = [0] * slots
        self._clock = 0

    def find(self, prompt: list[int]) -> tuple[int, int]:
        """The slot that shares the longest prefix with the prompt, and its length.

        The length is less than the prompt's, since the last token has to be computed for its logits.
        """
        shared = [_common_prefix(prompt, tokens) for tokens in self.tokens]
        slot = max(range(len(shared)), key=lambda slot: (shared[slot], self._used[slot]))
        length = min(shared[slot], len(prompt) - 1)
        return slot, length if length >= MIN_PREFIX else 0

    def choose(self, free: list[int], source: int, length: int) -> int:
        """The free slot for a prompt: the source itself if little else is lost, else the least recently used."""
        if source in free and 2 * length >= len(self.tokens[source]):
            return source
        return min(free, key=lambda slot: self._used[slot])

    def record(self, slot: int, tokens: list[int]) -> None:
        """Note which tokens a slot holds now."""
        self._clock += 1
        self._used[slot] = self._clock
        self.tokens[slot] = tokens


def _common_prefix(prompt: list[int], tokens: list[int]) -> int:
    length = min(len(prompt), len(tokens))
    if prompt[:length] == tokens[:length]:  # a thousand times faster than a loop
        return length
    return next(index for index in range(length) if prompt[index] != tokens[index])
