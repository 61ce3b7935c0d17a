"""Calls that are a name and a JSON object after it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from models.language.replies.call_format import CallFormat, Literal, ToolsByName, arguments_schema, start_call
from models.language.replies.json_text import as_json, read_value
from models.language.replies.parts import Parts
from models.language.replies.source import Reader, Source, markers_of
from models.tools import Tool

LONGEST_HEAD = 256  # characters between the opener and the arguments


@dataclass(frozen=True)
class NamedCalls(CallFormat):
    """An opener, a head that has the name, the arguments as JSON, and markers that end the call."""

    openers: tuple[str, ...]
    head: re.Pattern[str]  # of what stands between the opener and the arguments; its first group is the name
    wire: str  # how the model writes the head, with {name}; for grammars
    ends: tuple[str, ...] = ()  # after the arguments, in this order
    markers: tuple[str, ...] = ()
    frame: tuple[str, str] = ("", "")

    @property
    def all_markers(self) -> tuple[str, ...]:
        return (*super().all_markers, *self.ends)

    def read(self, opener: str, source: Source, parts: Parts, tools: ToolsByName) -> Reader[bool]:
        head = yield from self._read_head(source)
        name = self.head.fullmatch(head)
        if not name:
            return False
        start_call(source, parts, name[1])
        if (yield from read_value(source, parts.arguments)):
            parts.end_call()
            for end in self.ends:
                yield from source.skip_space()
                yield from source.matches(end)
        else:
            yield from source.until(markers_of(*self.ends[-1:]), parts.arguments)
        return True

    def _read_head(self, source: Source) -> Reader[str]:
        """The text before the arguments; too long a one is no head."""
        while "{" not in source.look(LONGEST_HEAD) and source.coming < LONGEST_HEAD and not source.ended:
            yield
        head, bracket, _ = source.look(LONGEST_HEAD).partition("{")
        return source.take(len(head)) if bracket else ""

    @property
    def between(self) -> str:
        return self.openers[0]

    def rule(self, tool: Tool, name: str, literal: Literal) -> list[str]:
        return [
            f"{name}: {literal(self.wire.format(name=tool.name))} {name}_arguments {literal(''.join(self.ends[-1:]))}",
            f"{name}_arguments: %json {as_json(arguments_schema(tool))}",
        ]
