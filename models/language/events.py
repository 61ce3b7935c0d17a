"""The events of a language model while it answers.

A reply is a row of parts: reasoning, text, and calls of tools. A delta of another kind than the one before begins the
next part, and so does each `ToolCallStarted`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.messages import FinishReason
from models.output_item import TokenLogprob


@dataclass(frozen=True)
class ReasoningDelta:
    """A piece of the model's reasoning, never empty."""

    text: str


@dataclass(frozen=True)
class TextDelta:
    """A piece of the reply's text, never empty. `logprobs` has its tokens, if the request asks for them."""

    text: str
    logprobs: Sequence[TokenLogprob] | None = None


@dataclass(frozen=True)
class ToolCallStarted:
    """The model calls a tool, whose arguments follow."""

    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """A piece of the arguments of the current call, never empty; joined, they are JSON text."""

    text: str


@dataclass(frozen=True)
class Done:
    """The model has ended the reply. By "stop", the last part is complete too."""

    reason: FinishReason


Event = ReasoningDelta | TextDelta | ToolCallStarted | ArgumentsDelta | Done
