"""Gemma's calls: JSON without quotes around keys, and with other quotes around strings."""

from __future__ import annotations

from dataclasses import dataclass

from models.language.replies.call_format import CallFormat, Literal, ToolsByName, arguments_schema, start_call
from models.language.replies.json_text import as_json, parsed, read_string
from models.language.replies.parts import Parts
from models.language.replies.source import Reader, Sink, Source, markers_of
from models.language.replies.tagged_calls import read_name
from models.tools import Tool

BARE_ENDS = (",", "}", "]")


@dataclass(frozen=True)
class GemmaCalls(CallFormat):
    """`call:f{city:"Paris",days:3}` between markers, with `quote` for each quotation mark."""

    openers: tuple[str, ...]
    quote: str
    close: str
    markers: tuple[str, ...] = ()
    frame: tuple[str, str] = ("", "")

    @property
    def all_markers(self) -> tuple[str, ...]:
        return (*super().all_markers, self.quote, self.close)

    def read(self, opener: str, source: Source, parts: Parts, tools: ToolsByName) -> Reader[bool]:
        if (name := (yield from read_name(source, "call:", "{"))) is None:
            return False
        start_call(source, parts, name)
        source.unread("{")
        if (yield from self._read_value(source, parts.arguments)):
            parts.end_call()
            yield from source.skip_space()
            yield from source.matches(self.close)
        else:
            yield from source.until(markers_of(self.close), parts.arguments)
        return True

    def _read_value(self, source: Source, sink: Sink) -> Reader[bool]:
        """Pass a value on as JSON. False if it breaks off."""
        yield from source.skip_space()
        if (yield from source.matches("{")):
            return (yield from self._read_list(source, sink, "{", "}"))
        if (yield from source.matches("[")):
            return (yield from self._read_list(source, sink, "[", "]"))
        if (yield from source.matches(self.quote)):
            sink('"')
            end = yield from source.until(markers_of(self.quote), lambda piece: sink(as_json(piece)[1:-1]))
            sink('"' if end else "")
            return bool(end)
        if source.look(1) == '"':
            text = yield from read_string(source)
            sink("" if text is None else as_json(text))
            return text is not None
        return (yield from self._read_bare(source, sink))

    def _read_list(self, source: Source, sink: Sink, opening: str, closing: str) -> Reader[bool]:
        """The values of an array, or the keys and values of an object, after its bracket."""
        sink(opening)
        separator = ""
        while (yield from source.skip_space()):
            if (yield from source.matches(closing)):
                sink(closing)
                return True
            yield from source.matches(",")
            sink(separator)
            separator = ", "
            if opening == "{" and not (yield from self._read_key(source, sink)):
                return False
            if not (yield from self._read_value(source, sink)):
                return False
        return False

    def _read_key(self, source: Source, sink: Sink) -> Reader[bool]:
        pieces: list[str] = []
        yield from source.skip_space()
        if not (yield from source.until(markers_of(":"), pieces.append)):
            sink("".join(pieces))
            return False
        key = "".join(pieces).strip().removeprefix(self.quote).removesuffix(self.quote)
        sink(f"{as_json(parsed(key) if key.startswith(chr(34)) else key)}: ")
        return True

    def _read_bare(self, source: Source, sink: Sink) -> Reader[bool]:
        """A number, a word, or a text that has lost its quotes."""
        pieces: list[str] = []
        end = yield from source.until(markers_of(*BARE_ENDS, self.close), pieces.append)
        source.unread(end)
        text = "".join(pieces).strip()
        sink(as_json(parsed(text)) if end else text)
        return end in BARE_ENDS and bool(text)

    @property
    def between(self) -> str:
        return self.openers[0]

    def rule(self, tool: Tool, name: str, literal: Literal) -> list[str]:
        return [
            f"{name}: {literal(f'call:{tool.name}')} {name}_arguments {literal(self.close)}",
            f"{name}_arguments: %json {as_json(arguments_schema(tool))}",
        ]
