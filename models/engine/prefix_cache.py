"""Keeps track of the tokens in each slot, so that the common prefix of two prompts is computed only once.

A reused prefix shows in the token counts and in the time to the first token. So a prompt finds only what its owner
knows already: all tokens of the same owner, and the public beginning of the others.
"""

from __future__ import annotations

from typing import NamedTuple

MIN_PREFIX = 16  # tokens; a shorter prefix is computed as fast as it is copied


class OwnedTokens(NamedTuple):
    """The tokens of a slot or of a prompt, in order. The first `public` ones are no secret of the owner."""

    tokens: list[int]
    owner: str = ""
    public: int = 0

    def shared_with(self, prompt: OwnedTokens) -> int:
        """How many of these tokens a prompt may reuse."""
        length = min(len(self.tokens), len(prompt.tokens))
        if self.owner != prompt.owner:
            length = min(length, self.public, prompt.public)  # before any comparison: its time would tell too
        return common_prefix(self.tokens, prompt.tokens, length)


class PrefixCache:
    """The tokens that each slot holds, and which slot was used last.

    With `whole`, a prompt reuses all tokens of a slot or none: a recurrent state is that after the last one.
    """

    def __init__(self, slots: int, whole: bool = False) -> None:
        self.whole = whole
        self.cached: list[OwnedTokens] = [OwnedTokens([]) for _ in range(slots)]
        self._used: list[int] = [0] * slots
        self._clock = 0

    def find(self, prompt: OwnedTokens) -> tuple[int, int]:
        """The slot that shares the longest prefix with the prompt, and its length.

        The length is less than the prompt's, since the last token has to be computed for its logits.
        """
        shared = [min(cached.shared_with(prompt), len(prompt.tokens) - 1) for cached in self.cached]
        if self.whole:
            shared = [
                length if length == len(cached.tokens) else 0
                for length, cached in zip(shared, self.cached, strict=True)
            ]
        slot = max(range(len(shared)), key=lambda slot: (shared[slot], self._used[slot]))
        return slot, shared[slot] if shared[slot] >= MIN_PREFIX else 0

    def choose(self, free: list[int], source: int, length: int, owner: str = "") -> int:
        """The free slot for a prompt: the source itself if its owner loses little, else the least recently used."""
        cached = self.cached[source]
        if source in free and cached.owner == owner and 2 * length >= len(cached.tokens):
            return source
        return self.least_recently_used(free)

    def least_recently_used(self, slots: list[int]) -> int:
        """The one of some slots whose tokens were recorded first."""
        return min(slots, key=lambda slot: self._used[slot])

    def forget(self, slot: int) -> None:
        """Note that a slot holds no tokens any more."""
        self.cached[slot] = OwnedTokens([])

    def record(self, slot: int, cached: OwnedTokens) -> None:
        """Note which tokens a slot holds now."""
        self._clock += 1
        self._used[slot] = self._clock
        self.cached[slot] = cached


def common_prefix(tokens: list[int], others: list[int], limit: int | None = None) -> int:
    """The length of the common prefix, at most `limit`."""
    length = min(len(tokens), len(others)) if limit is None else limit
    if tokens[:length] == others[:length]:  # a thousand times faster than a loop
        return length
    return next(index for index in range(length) if tokens[index] != others[index])
