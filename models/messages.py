"""The input and output of a language model: messages, token counts, finish reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

MAX_MESSAGES = 1000  # in one request

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "max_output_tokens", "context_length"]


class Message(TypedDict):
    """One message of a conversation, in the form that chat templates take."""

    role: Role
    content: str


@dataclass
class Usage:
    """Tokens read and written for one reply; `output_tokens` grows while the reply streams."""

    input_tokens: int
    cached_tokens: int = 0  # input tokens that were in the prefix cache
    output_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def counts(self) -> dict[str, int]:
        """The counts and their sum, by name."""
        return {
            "input_tokens": self.input_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "total_tokens": self.total_tokens,
        }
