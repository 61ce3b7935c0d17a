"""Calls that are JSON objects with a name and arguments."""

from __future__ import annotations

from dataclasses import dataclass

from models.language.replies.call_format import CallFormat, Literal, ToolsByName, arguments_schema, start_call
from models.language.replies.json_text import as_json, parsed, read_string, read_value
from models.language.replies.parts import Parts
from models.language.replies.source import Reader, Source, markers_of
from models.tools import Tool

NAME_KEYS = ("name", "tool_name", "function")
ARGUMENTS_KEYS = ("arguments", "parameters")
OTHER_KEYS = ("type", "id", "tool_call_id")  # that may stand before the name


@dataclass(frozen=True)
class JSONCalls(CallFormat):
    """`{"name": "f", "arguments": {...}}` between markers: one, several, or a list of them.

    Without an opener, the object must stand at the beginning of the reply and have the name of a tool.
    """

    openers: tuple[str, ...] = ()
    close: str = ""
    arguments_key: str = "arguments"
    space: str = ""  # between a marker and the object, in a grammar
    markers: tuple[str, ...] = ()
    frame: tuple[str, str] = ("", "")

    @property
    def all_markers(self) -> tuple[str, ...]:
        return (*super().all_markers, self.close)

    def read(self, opener: str, source: Source, parts: Parts, tools: ToolsByName) -> Reader[bool]:
        found = False
        yield from source.skip_space()
        yield from source.matches("[")
        while (yield from source.skip_space()) == "{":
            call = _JSONCall(source, parts, None if self.openers else tools)
            whole = yield from call.read()
            found = found or call.started
            if not whole:
                if call.started:  # it is no JSON from here on, but the arguments still, as the model wrote them
                    yield from source.until(markers_of(self.close), parts.arguments)
                return found
            source.hold()  # what follows may be no call
            yield from source.skip_space()
            yield from source.matches(",", ";")
        yield from source.matches("]")
        yield from source.skip_space()
        if found and (not self.close or (yield from source.matches(self.close))):
            source.release()
        return found

    @property
    def between(self) -> str:
        return ", " if self.frame[1] else super().between if self.openers else "; "

    def rule(self, tool: Tool, name: str, literal: Literal) -> list[str]:
        head = f'{{"name": {as_json(tool.name)}, "{self.arguments_key}": '
        tail = "}" if self.frame[1] else f"}}{self.space}{self.close}"
        return [
            f"{name}: {literal(self.space + head)} {name}_arguments {literal(tail)}",
            f"{name}_arguments: %json {as_json(arguments_schema(tool))}",
        ]


class _JSONCall:
    """Reads one object. If `tools` is given, it is a call only with the name of one of them, and with arguments."""

    def __init__(self, source: Source, parts: Parts, tools: ToolsByName | None) -> None:
        self.started = False
        self._source = source
        self._parts = parts
        self._tools = tools
        self._name = ""
        self._arguments: str | None = None  # those that came before the name, or as a whole

    def read(self) -> Reader[bool]:
        """False if it is no call, or breaks off."""
        if not (yield from self._read_object()):
            return False
        if self._name and self._tools is None and not self.started:
            self._start()
        if self.started and self._arguments is None:
            self._parts.arguments("{}")
        if self.started:
            self._parts.end_call()
        return self.started

    def _read_object(self) -> Reader[bool]:
        source = self._source
        yield from source.matches("{")
        while (yield from source.skip_space()) != "}":
            yield from source.matches(",")
            yield from source.skip_space()
            key = yield from read_string(source)
            yield from source.skip_space()
            if key is None or not (yield from source.matches(":")):
                return False
            following = yield from source.skip_space()
            if not (yield from self._read_field(key, following)):
                return False
        source.take(1)
        return True

    def _read_field(self, key: str, following: str) -> Reader[bool]:
        if key == "function" and following == "{":
            return (yield from self._read_object())
        if key in NAME_KEYS and not self._name:
            return (yield from self._read_name())
        if key in ARGUMENTS_KEYS and self._arguments is None:
            return (yield from self._read_arguments(following))
        known = self.started or self._name or key in OTHER_KEYS
        return bool(known) and (yield from read_value(self._source, lambda piece: None))

    def _read_name(self) -> Reader[bool]:
        self._name = (yield from read_string(self._source)) or ""
        if not self._name or (self._tools is not None and self._name not in self._tools):
            return False
        if self._arguments is not None:
            self._start()
            self._parts.arguments(self._arguments)
        elif self._tools is None:
            self._start()
        return True

    def _read_arguments(self, following: str) -> Reader[bool]:
        if self._name and following == "{":
            self._start()
            self._arguments = ""
            return (yield from read_value(self._source, self._parts.arguments))
        pieces: list[str] = []
        whole = yield from read_value(self._source, pieces.append)
        self._arguments = _as_object("".join(pieces))
        if self._name:
            self._start()
            self._parts.arguments(self._arguments)
        return whole

    def _start(self) -> None:
        if not self.started:
            self.started = True
            start_call(self._source, self._parts, self._name)


def _as_object(text: str) -> str:
    """Arguments as an object, where the model wrote null, or the object as a string."""
    value = parsed(text)
    if isinstance(value, str) and isinstance(parsed(value), dict):
        return value
    return "{}" if value is None else text
