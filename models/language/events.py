"""The events of a language model while it answers."""

from __future__ import annotations

from dataclasses import dataclass

from models.messages import FinishReason


@dataclass(frozen=True)
class TextPiece:
    """A piece of the reply's text, never empty."""

    text: str


@dataclass(frozen=True)
class Done:
    """The model has ended the reply."""

    reason: FinishReason


Event = TextPiece | Done
