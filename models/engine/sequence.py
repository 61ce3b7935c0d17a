"""A prompt and the tokens that are generated after it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from models.engine.prefix_cache import OwnedTokens
from models.engine.sampling_params import SamplingParams
from models.messages import FinishReason


@dataclass(eq=False)
class Sequence:
    """A prompt, the tokens generated after it, and how many of them are in the key-value cache.

    Other owners may reuse only the first `public` tokens of the prompt.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    owner: str = ""
    public: int = 0
    slot: int = field(default=-1, init=False)  # in the key-value cache; -1 is none
    tokens: list[int] = field(init=False)  # the prompt and the generated tokens
    cached: int = field(default=0, init=False)  # tokens whose keys and values are in the slot
    reused: int = field(default=0, init=False)  # prompt tokens that were in the prefix cache
    uniform: float = field(init=False)  # the random number of the next token; a repeated step reuses it
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.uniform = self.random.random()
        self.tokens = list(self.prompt)

    @property
    def prefilled(self) -> bool:
        return self.cached >= len(self.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.prompt)

    def owned(self, length: int) -> OwnedTokens:
        """The first tokens, with their owner, for the prefix cache."""
        return OwnedTokens(self.tokens[:length], self.owner, self.public)

    def append(self, token_id: int) -> None:
        """Append a generated token and draw the random number of the next one."""
        self.tokens.append(token_id)
        self.uniform = self.random.random()


class Token(NamedTuple):
    """One generated token; `finish_reason` is set for the last one of its sequence."""

    sequence: Sequence
    id: int
    finish_reason: FinishReason | None
