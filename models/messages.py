"""The input and output of a language model: messages, token counts, finish reasons."""

from __future__ import annotations

from collections.abc import Iterator
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


class Image(TypedDict):
    """A picture in a message: a `data:` URL, and how many characters of the content come before it."""

    url: str
    at: int


class Message(TypedDict):
    """One message of a conversation. `content` may be empty in messages of the assistant."""

    role: Role
    content: str
    images: NotRequired[list[Image]]  # of the user, in their order
    reasoning: NotRequired[str]  # what the assistant thought before
    tool_calls: NotRequired[list[ToolCall]]  # of the assistant, after the content
    tool_call_id: NotRequired[str]  # of a message with the role "tool": the call that it answers


def length(message: Message) -> int:
    """The characters of a message."""
    called = sum(len(call["name"]) + len(call["arguments"]) for call in message.get("tool_calls", ()))
    pictures = sum(len(image["url"]) for image in message.get("images", ()))
    return len(message["content"]) + len(message.get("reasoning", "")) + called + pictures


def parts_of(message: Message) -> Iterator[str | Image]:
    """The text and the pictures of a message, in their order; texts of several parts stood in lines."""
    content, start = message["content"], 0
    for image in message.get("images", ()):
        if text := content[start : image["at"]].removeprefix("\n" if start else ""):
            yield text
        yield image
        start = image["at"]
    if text := content[start:].removeprefix("\n" if start else ""):
        yield text


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
