"""The parts of a reply as events."""

from __future__ import annotations

from typing import Literal

from models.language.events import ArgumentsDelta, Event, ReasoningDelta, TextDelta, ToolCallStarted

NUL = "\0"
REPLACEMENT = "\ufffd"


class EnoughCalls(Exception):
    """The reply has as many calls as it may have, so it ends here."""


class Parts:
    """Collects the parts of a reply as a parser finds them.

    White space around reasoning and calls belongs to no part. White space at the end of a text is held back until the
    text goes on or the reply ends. `plain` keeps all white space at once: nothing but text can come.
    """

    def __init__(self, plain: bool, single_call: bool = False) -> None:
        self.thinking = False  # whether the parser reads reasoning; the parser sets it
        self._plain = plain
        self._single_call = single_call
        self._kind: Literal["text", "reasoning", "call"] | None = None  # of the last part
        self._space = ""  # held back
        self._gap = ""  # between two messages of one part
        self._events: list[Event] = []

    @property
    def begins(self) -> bool:
        """Whether the next text begins a part."""
        return self._kind != "text"

    def take(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def text(self, piece: str) -> None:
        if certain := self._without_space("text", piece):
            self._events.append(TextDelta(certain))

    def reasoning(self, piece: str) -> None:
        if certain := self._without_space("reasoning", piece):
            self._events.append(ReasoningDelta(certain))

    def begin_reasoning(self) -> None:
        """Reasoning begins, and may be empty."""
        self._kind, self._space, self._gap = "reasoning", "", ""

    def separate(self) -> None:
        """The next piece is another message: if it is of the kind of the last one, a blank line stands between."""
        self._gap = "\n\n"

    def call(self, name: str) -> None:
        self._kind, self._space, self._gap = "call", "", ""
        self._events.append(ToolCallStarted(name))

    def arguments(self, piece: str) -> None:
        if piece:
            self._events.append(ArgumentsDelta(piece.replace(NUL, REPLACEMENT)))

    def end_call(self) -> None:
        """The arguments are complete. Raises EnoughCalls if this is the only call that the reply may have."""
        if self._single_call:
            raise EnoughCalls

    def end(self) -> None:
        """The reply ends: white space at the end of a text is a part of it."""
        if self._space and self._kind in (None, "text"):
            self._events.append(TextDelta(self._space))
        self._space = ""

    def _without_space(self, kind: Literal["text", "reasoning"], piece: str) -> str:
        """The text that is certain to belong to a part of this kind."""
        piece = piece.replace(NUL, REPLACEMENT)  # as in the database: PostgreSQL cannot store U+0000
        if self._plain:
            return piece
        content = piece.rstrip()
        if not content:
            self._space += piece
            return ""
        if self._kind == kind:
            content = (self._gap or self._space) + content
        elif self._kind is None and kind == "text":
            content = self._space + content
        else:
            content = content.lstrip()
        self._kind, self._space, self._gap = kind, piece[len(piece.rstrip()) :], ""
        return content
