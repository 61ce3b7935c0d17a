"""A prompt and the tokens that are generated after it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from models.engine.constraint import Constraint
from models.engine.logprobs import Logprobs
from models.engine.prefix_cache import OwnedTokens
from models.engine.sampling_params import SamplingParams
from models.errors import FormatFailedError
from models.messages import FinishReason


@dataclass(eq=False)
class Sequence:
    """A prompt, the tokens generated after it, and how many of them are in the key-value cache.

    Other owners may reuse only the first `public` tokens of the prompt. A token that a device computes counts before
    its id is known: it is in flight. If its constraint fails, `error` says why it ended.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    owner: str = ""
    public: int = 0
    constraint: Constraint | None = None
    slot: int = field(default=-1, init=False)  # in the key-value cache; -1 is none
    tokens: list[int] = field(init=False)  # the prompt and the generated tokens
    in_flight: int = field(default=0, init=False)  # generated tokens whose ids are not known yet
    cached: int = field(default=0, init=False)  # tokens whose keys and values are in the slot
    final_length: int = field(init=False)  # where it ends at the latest
    reused: int = field(default=0, init=False)  # prompt tokens that were in the prefix cache
    error: FormatFailedError | None = field(default=None, init=False)
    uniform: float = field(init=False)  # the random number of the next token; a repeated step reuses it
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.uniform = self.random.random()
        self.tokens = list(self.prompt)
        self.final_length = len(self.prompt) + self.max_tokens

    @property
    def length(self) -> int:
        """All tokens, with those in flight."""
        return len(self.tokens) + self.in_flight

    @property
    def decodes(self) -> bool:
        """Whether only its last token is to be computed."""
        return self.length - self.cached == 1 and self.cached >= len(self.prompt)

    @property
    def generated(self) -> int:
        """The tokens after the prompt whose ids are known."""
        return len(self.tokens) - len(self.prompt)

    def owned(self, length: int) -> OwnedTokens:
        """The first tokens, with their owner, for the prefix cache."""
        return OwnedTokens(self.tokens[:length], self.owner, self.public)

    def expect(self) -> None:
        """Note that a token is in flight, and draw the random number of the one after it."""
        self.in_flight += 1
        self.uniform = self.random.random()

    def append(self, token_id: int) -> None:
        """Append the first token in flight, whose id is known now."""
        self.in_flight -= 1
        self.tokens.append(token_id)


class Token(NamedTuple):
    """One generated token; `finish_reason` is set for the last one of its sequence."""

    sequence: Sequence
    id: int
    finish_reason: FinishReason | None
    logprobs: Logprobs | None = None  # if its sequence asks for them

    @property
    def stops(self) -> bool:
        """Whether it only says that the sequence ends. A sequence can also end by "stop" at the end of its format."""
        return self.id in self.sequence.stop_ids
