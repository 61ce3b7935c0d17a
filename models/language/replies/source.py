"""The text of a reply that a parser has not read yet.

Parsers are generators. They yield to wait for more text, and go on when `Source.push` has brought some, so a parser
reads as if the whole reply were there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Reader = Generator[None, None, T]  # reads something; each yield waits for more text
Sink = Callable[[str], None]  # takes pieces of text

SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Markers:
    """Texts to look for."""

    pattern: re.Pattern[str]  # any of them, the longest first
    beginning: re.Pattern[str]  # the beginning of one at the end of a text
    longest: int  # characters


@lru_cache(1024)
def markers_of(*texts: str) -> Markers:
    """The patterns of some texts; there may be none."""
    longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
    whole = "|".join(map(re.escape, longest_first)) or "(?!)"
    begun = "|".join(filter(None, map(_beginning, longest_first))) or "(?!)"
    return Markers(re.compile(whole), re.compile(rf"(?:{begun})\Z"), max(map(len, longest_first), default=0))


def _beginning(text: str) -> str:
    """A pattern of the text without its last characters."""
    pattern = ""
    for character in reversed(text[:-1]):
        pattern = re.escape(character) + (f"(?:{pattern})?" if pattern else "")
    return pattern


class Source:
    """Text that comes in pieces and is read from its beginning."""

    def __init__(self) -> None:
        self.ended = False  # no more text comes
        self._text = ""
        self._at = 0
        self._held: int | None = None  # where `rewind` goes back to

    def push(self, piece: str) -> None:
        start = self._at if self._held is None else self._held
        self._text = self._text[start:] + piece
        self._at -= start
        self._held = None if self._held is None else 0

    @property
    def coming(self) -> int:
        """How many characters have come and were not read."""
        return len(self._text) - self._at

    def look(self, count: int) -> str:
        """The next characters that have come, without reading them."""
        return self._text[self._at : self._at + count]

    def take(self, count: int) -> str:
        """Read some characters that have come."""
        start, self._at = self._at, min(self._at + count, len(self._text))
        return self._text[start : self._at]

    def match(self, pattern: re.Pattern[str]) -> str:
        """Read what a pattern matches here; empty if nothing."""
        found = pattern.match(self._text, self._at)
        return self.take(found.end() - self._at) if found else ""

    def unread(self, text: str) -> None:
        """Go back before a text that was just read."""
        self._at -= len(text)

    def hold(self) -> None:
        """Remember this place, for `rewind`."""
        self._held = self._at

    def release(self) -> None:
        """Forget the place; what was read stays read."""
        self._held = None

    def rewind(self) -> None:
        """Go back to the place that is held, if any."""
        if self._held is not None:
            self._at, self._held = self._held, None

    def peek(self) -> Reader[str]:
        """The next character; empty at the end of the reply."""
        while not self.coming and not self.ended:
            yield
        return self.look(1)

    def skip_space(self, sink: Sink | None = None) -> Reader[str]:
        """Read white space, which goes to the sink, and return the next character, as `peek` does."""
        while True:
            following = yield from self.peek()
            skipped = self.match(SPACE)
            if sink:
                _give(sink, skipped)
            if not following or self.coming:
                return self.look(1)

    def matches(self, *texts: str) -> Reader[str]:
        """Read one of the texts, if it comes next: the longest; else read nothing and return an empty text."""
        while True:
            longer = any(len(text) > self.coming and text.startswith(self.look(len(text))) for text in texts)
            if self.ended or not longer:
                fitting = (len(text) for text in texts if self._text.startswith(text, self._at))
                return self.take(max(fitting, default=0))
            yield

    def until(self, ends: Markers, sink: Sink) -> Reader[str]:
        """Read up to a marker and past it, and return it; empty at the end of the reply. The text goes to the sink."""
        while True:
            found = ends.pattern.search(self._text, self._at)
            tail = max(self._at, len(self._text) - ends.longest)
            begun = None if self.ended else ends.beginning.search(self._text, tail)
            if found and not (begun and begun.start() <= found.start()):
                _give(sink, self.take(found.start() - self._at))
                return self.take(len(found[0]))
            _give(sink, self.take((begun.start() if begun else len(self._text)) - self._at))
            if self.ended:
                return ""
            yield


def _give(sink: Sink, text: str) -> None:
    if text:
        sink(text)
