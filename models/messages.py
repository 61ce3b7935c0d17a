"""The input and output of a language model: messages, token counts, finish reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

MAX_MESSAGES = 1000  # in one request

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "max_output_tokens", "context_length", "content_filter"]


class ToolCall(TypedDict):
    """A call of a tool by the model; `arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


class Message(TypedDict):
    """One message of a conversation. `content` may be empty in messages of the assistant."""

    role: Role
    content: str
    reasoning: NotRequired[str]  # what the assistant thought before
    tool_calls: NotRequired[list[ToolCall]]  # of the assistant, after the content
    tool_call_id: NotRequired[str]  # of a message with the role "tool": the call that it answers


def length(message: Message) -> int:
    """The characters of a message."""
    called = sum(len(call["name"]) + len(call["arguments"]) for call in message.get("tool_calls", ()))
    return len(message["content"]) + len(message.get("reasoning", "")) + called


@dataclass
class Usage:
    """Tokens read and written for one reply; `output_tokens` grows while the reply streams."""

    input_tokens: int
    cached_tokens: int = 0  # input tokens that were in the prefix cache
    output_tokens: int = 0
    reasoning_tokens: int = 0  # output tokens of the reasoning

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def counts(self) -> dict[str, int]:
        """The counts and their sum, by name."""
        return {
            "input_tokens": self.input_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "reasoning_tokens": self.reasoning_tokens,
            "total_tokens": self.total_tokens,
        }
