"""A prompt on its way through the engine, and the tokens that come of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from models.sampling import Sampling

Finish = Literal["stop", "max_output_tokens", "context_length"]


@dataclass(eq=False)
class Sequence:
    """A prompt and what follows it, and how far the engine has come with it."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    slot: int = field(default=-1, init=False)
    tokens: list[int] = field(init=False)  # the prompt and what was generated
    cached: int = field(default=0, init=False)  # tokens whose keys and values are in the slot
    reused: int = field(default=0, init=False)  # those of them that were there when it began
    uniform: float = field(init=False)  # the random number of the next token, however often a step is tried
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

    def append(self, token_id: int) -> None:
        """Take the next token, which spends its random number."""
        self.tokens.append(token_id)
        self.uniform = self.random.random()


class Token(NamedTuple):
    """One generated token; `finish` says why it is the last one, if it is."""

    sequence: Sequence
    id: int
    finish: Finish | None
