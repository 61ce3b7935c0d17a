"""A reply as it comes: what it says, how it ends, why there is none."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from models.refused import Refused
from models.sequence import Finish


class MessagesRefused(Refused):
    """The model's chat template refuses the messages; the message says why."""

    code = "invalid_value"
    param = "response.input"


class ContextLengthExceeded(Refused):
    """The last message alone leaves no room for a reply in the context."""

    code = "context_length_exceeded"
    param = "response.input"


@dataclass
class Usage:
    """Tokens read and written for a reply; `output_tokens` grows while it streams."""

    input_tokens: int
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def public(self) -> dict[str, int]:
        """The counts and their sum, as JSON has them."""
        return asdict(self) | {"total_tokens": self.total_tokens}


@dataclass(frozen=True)
class Started:
    """The reply is on its way. `left_out` of the oldest messages behind the system prompt had no room."""

    usage: Usage
    left_out: int = 0


@dataclass(frozen=True)
class Queued:
    """The reply waits for a slot; `position` 1 is next."""

    position: int


@dataclass(frozen=True)
class Delta:
    """A piece of the reply's text, never empty."""

    text: str


@dataclass(frozen=True)
class Done:
    """The reply ended by itself."""

    reason: Finish


Event = Started | Queued | Delta | Done
