"""Tells apart reasoning, text, and calls of tools in a reply, while it streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.language.events import Event
from models.language.replies.call_format import CallFormat
from models.language.replies.parts import EnoughCalls, Parts
from models.language.replies.source import Reader, Source, markers_of
from models.tools import NO_TOOLS, Tools


@dataclass(frozen=True)
class Reasoning:
    """The markers around a model's reasoning."""

    open: str
    close: str


class ReplyParser:
    """Text in, in any pieces; events out. It never raises: what cannot be understood is text.

    A subclass says how the reply is read.
    """

    def __init__(self, parts: Parts) -> None:
        self.ended = False  # no more text is wanted, since the reply has the only call that it may have
        self._source = Source()
        self._parts = parts
        self._failed = False
        self._reader = self._read()

    @property
    def thinking(self) -> bool:
        """Whether the text goes on with reasoning."""
        return self._parts.thinking

    def push(self, piece: str) -> list[Event]:
        """The events that are certain after a piece of text."""
        if piece and not self.ended:
            self._source.push(piece)
            self._run()
        return self._parts.take()

    def end(self) -> list[Event]:
        """The rest of the events, after the last piece."""
        if not self.ended:
            self._source.ended = True
            self._run()
            self._parts.end()
        return self._parts.take()

    def _run(self) -> None:
        try:
            if not self._failed:
                next(self._reader, None)
        except EnoughCalls:
            self.ended = True
        except Exception:
            # A format of a model that we misread: its text is worth more to the user than an error.
            self._failed, self._parts.thinking = True, False
            self._source.rewind()
        if self._failed:
            self._parts.text(self._source.take(self._source.coming))

    def _read(self) -> Reader[None]:
        """Read the whole reply."""
        raise NotImplementedError


class MarkedReply(ReplyParser):
    """A reply with reasoning and calls between markers, and text around them.

    `thinking` says that the prompt has opened the reasoning already. Markers in `special` are special tokens of the
    model: they never become text. A marker that is ordinary text opens reasoning only where a part begins.
    """

    def __init__(
        self,
        reasoning: Reasoning | None = None,
        formats: Sequence[CallFormat] = (),
        tools: Tools = NO_TOOLS,
        special: frozenset[str] = frozenset(),
        thinking: bool = False,
    ) -> None:
        self._reasoning = reasoning
        self._formats = formats if tools.callable else ()
        self._tools = {tool.name: tool for tool in tools.callable}
        self._special = special
        self._openers = {opener for format in self._formats for opener in format.openers}
        self._dropped = special.union(*(format.markers for format in self._formats))
        self._bare = [format for format in self._formats if not format.openers]
        super().__init__(Parts(not reasoning and not self._formats, not tools.parallel))
        self._parts.thinking = thinking

    def _read(self) -> Reader[None]:
        if self._parts.thinking:
            yield from self._read_reasoning()
        opens = self._reasoning.open if self._reasoning else ""
        ends = markers_of(opens, *self._openers, *self._dropped)
        yield from self._read_bare()
        while marker := (yield from self._source.until(ends, self._parts.text)):
            if marker == opens and (self._is_special(marker) or self._parts.begins):
                yield from self._read_reasoning()
                yield from self._read_bare()
            elif marker in self._openers:
                yield from self._read_calls(marker)
            elif marker not in self._dropped:
                self._parts.text(marker)

    def _read_reasoning(self) -> Reader[None]:
        """Read up to the end of the reasoning, or to a special token that begins a call."""
        assert self._reasoning
        self._parts.thinking = True
        self._parts.begin_reasoning()
        yield from self._source.skip_space()
        yield from self._source.matches(self._reasoning.open)  # some models repeat it
        yield from self._source.skip_space()
        calls = {opener for opener in self._openers if self._is_special(opener)}
        ends = markers_of(self._reasoning.close, *calls, *self._dropped)
        while marker := (yield from self._source.until(ends, self._parts.reasoning)):
            if marker == self._reasoning.close:
                break
            if marker in calls:
                self._source.unread(marker)
                break
        self._parts.thinking = False

    def _read_calls(self, opener: str) -> Reader[None]:
        """Read the calls after an opener; if there are none, the opener is text."""
        for format in self._formats:
            if opener in format.openers:
                self._source.hold()
                found = yield from format.read(opener, self._source, self._parts, self._tools)
                self._source.rewind()
                if found:
                    return
        if not self._is_special(opener):
            self._parts.text(opener)

    def _is_special(self, marker: str) -> bool:
        """Whether a marker is, or begins with, a special token."""
        return any(marker.startswith(token) for token in self._special)

    def _read_bare(self) -> Reader[None]:
        """Read calls without an opener, if the text begins with one."""
        if not self._bare:
            return
        following = yield from self._source.skip_space(self._parts.text)
        for format in self._bare:
            if following in ("{", "["):
                self._source.hold()
                yield from format.read("", self._source, self._parts, self._tools)
                self._source.rewind()
