"""Ends a text before the first stop string, and never returns the first characters of one."""

from __future__ import annotations


class StopStrings:
    """Watches a text that comes in pieces, and holds back characters that may begin a stop string.

    If several stop strings match, the one that ends first counts; of those that end together, the longest.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that can no longer be part of a stop string; empty after one was found."""
        if self.found:
            return ""
        text = self._held + piece
        starts = {string: text.find(string) for string in self._strings if string in text}
        if starts:
            first = min(starts, key=lambda string: (starts[string] + len(string), -len(string)))
            self.found, self._held = True, ""
            return text[: starts[first]]
        kept = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """The text that was held back, after the last piece."""
        piece, self._held = self._held, ""
        return piece


def _overlap(text: str, string: str) -> int:
    """How many of the last characters of the text are the beginning of the string."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
