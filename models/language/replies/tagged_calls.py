"""Calls whose arguments stand in tags, one by one, as in XML."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from models.language.replies.call_format import CallFormat, Literal, ToolsByName, arguments_schema, start_call
from models.language.replies.json_text import as_json, parsed
from models.language.replies.parts import Parts
from models.language.replies.source import Reader, Source, markers_of
from models.tools import Tool

LONGEST_NAME = 256
NAME_END = re.compile(r"[\s<]")
PYTHON_WORDS = {"True": True, "False": False, "None": None}
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


@dataclass(frozen=True)
class TaggedCalls(CallFormat):
    """A tag with the name of the function; for each argument a tag with its name, its value, and an end tag.

    Tags are the texts around a name, such as `<function=` and `>`. A value is text if the tool's schema says so; else
    it is JSON, if it can be. Arguments become JSON while they stream.
    """

    openers: tuple[str, ...]
    name: tuple[str, str]  # without the second one, a name ends before white space or a tag
    key: tuple[str, str]
    value_end: str
    close: str
    value: str = ""  # after the key
    ends: tuple[str, ...] = ()  # after the last call
    line: str = ""  # a line break after a tag and before an end tag, which is no part of a value
    markers: tuple[str, ...] = ()
    frame: tuple[str, str] = ("", "")

    @property
    def all_markers(self) -> tuple[str, ...]:
        return (*super().all_markers, *self.name, *self.key, self.value, self.value_end, self.close, *self.ends)

    def read(self, opener: str, source: Source, parts: Parts, tools: ToolsByName) -> Reader[bool]:
        found = False
        before, after = self.name
        while True:
            yield from source.skip_space()
            name = yield from read_name(source, "" if opener == before else before, after)
            if name is None:
                break
            found, opener = True, ""
            start_call(source, parts, name)
            if (yield from self._read_arguments(source, parts, _Schema(tools.get(name)))):
                parts.end_call()
            source.hold()
            if not before:
                break
        for end in self.ends if found else ():
            yield from source.skip_space()
            yield from source.matches(end)
        if found:
            source.release()
        return found

    def _read_arguments(self, source: Source, parts: Parts, schema: _Schema) -> Reader[bool]:
        """Read up to the end of the call. False if the reply ends before."""
        opened = "{"
        while True:
            yield from source.skip_space()
            if (yield from source.matches(self.close)):
                parts.arguments("{}" if opened == "{" else "}")
                return True
            key = yield from read_name(source, *self.key)
            if key is None and self._is_cut(source):
                return False
            if key is None:  # the model has forgotten the end tag
                parts.arguments("{}" if opened == "{" else "}")
                return True
            yield from source.skip_space()
            if self.value and not (yield from source.matches(self.value)) and self._is_cut(source):
                return False
            parts.arguments(f"{opened}{as_json(key)}: ")
            opened = ", "
            if not (yield from self._read_value(source, parts, schema.types(key))):
                return False

    def _is_cut(self, source: Source) -> bool:
        """Whether the reply ends with a part of a tag, which is no text."""
        rest = source.look(source.coming) if source.ended else ""
        begun = any(tag.startswith(rest) for tag in (*self.key, self.value, self.close)) or rest.startswith(self.key[0])
        if source.ended and begun:
            source.take(len(rest))
        return source.ended and begun

    def _read_value(self, source: Source, parts: Parts, types: set[str]) -> Reader[bool]:
        """Read a value and its end tag, which the model may have forgotten."""
        yield from source.matches(self.line)
        tags = (self.value_end, self.key[0], self.close)
        ends = markers_of(*tags, *(self.line + tag for tag in tags))
        if types == {"string"}:
            parts.arguments('"')
            end = yield from source.until(ends, lambda piece: parts.arguments(as_json(piece)[1:-1]))
            parts.arguments('"' if end else "")
        else:
            pieces: list[str] = []
            end = yield from source.until(ends, pieces.append)
            text = "".join(pieces)
            parts.arguments(as_json(typed(text, types)) if end else text)
        if end and not end.endswith(self.value_end):
            source.unread(end)
        return bool(end)

    def rule(self, tool: Tool, name: str, literal: Literal) -> list[str]:
        schema = arguments_schema(tool)
        types = _Schema(tool)
        rules, arguments = list[str](), list[str]()
        for index, (key, value) in enumerate(schema.get("properties", {}).items()):
            before = f"{self.key[0]}{key}{self.key[1]}{self.value}{self.line}"
            after = f"{self.line}{self.value_end}{self.line}"
            argument = f"{name}_{index}"
            if "string" in types.types(key) and not _choices(value):
                rules.append(f"{argument}[suffix={as_json(after)}]: /(?s:.*)/")
                expression = f"{literal(before)} {argument}"
            else:
                choices = " | ".join(literal(choice) for choice in _choices(value))
                rules.append(f"{argument}: {choices or '%json ' + as_json(_embedded(value, schema))}")
                expression = f"{literal(before)} {argument} {literal(after)}"
            arguments.append(expression if key in schema.get("required", ()) else f"({expression})?")
        head = f"{self.line}{self.name[0]}{tool.name}{self.name[1] or chr(10)}{self.line}"
        tail = "".join([self.close, *(self.line + end for end in self.ends)])
        return [f"{name}: {literal(head)} {' '.join(arguments)} {literal(tail)}", *rules]


def _embedded(value: Any, schema: dict[str, Any]) -> Any:
    """The schema of one argument, with the definitions and options of the whole one."""
    shared = {key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema}
    return {**value, **shared} if isinstance(value, dict) else shared


def _choices(schema: Any) -> list[str]:
    """The texts that an enum of texts allows."""
    values = schema.get("enum", []) if isinstance(schema, dict) else []
    return values if all(isinstance(value, str) for value in values) else []


def read_name(source: Source, before: str, after: str) -> Reader[str | None]:
    """Read a tag and return the name in it; read nothing if none comes next."""
    if before and not (yield from source.matches(before)):
        return None
    while True:
        text = source.look(LONGEST_NAME)
        end = NAME_END.search(text)
        at = text.find(after) if after else end.start() if end else -1
        if at > 0:
            source.take(at + len(after))
            return text[:at].partition('"')[0].strip()
        if at == 0 or source.ended or len(text) == LONGEST_NAME:
            source.unread(before)
            return None
        yield


class _Schema:
    """The types of a tool's arguments."""

    def __init__(self, tool: Tool | None) -> None:
        self._root: Any = (tool.parameters if tool else None) or {}

    def types(self, key: str) -> set[str]:
        """The names of JSON types that an argument may have; empty if that is not known."""
        properties = self._root.get("properties")
        return self._types(properties.get(key), 0) if isinstance(properties, dict) else set()

    def _types(self, schema: Any, depth: int) -> set[str]:
        if not isinstance(schema, dict) or depth > 8:
            return set()
        if isinstance(reference := schema.get("$ref"), str):
            return self._types(self._referred(reference), depth + 1)
        declared = schema.get("type", [])
        types = {*([declared] if isinstance(declared, str) else declared)}
        for union in ("anyOf", "oneOf", "allOf"):
            for choice in schema.get(union) or ():
                types |= self._types(choice, depth + 1)
        if not types and isinstance(values := schema.get("enum"), list):
            types = {JSON_TYPES.get(type(value), "null") for value in values}
        return types | {"null"} if schema.get("nullable") else types

    def _referred(self, reference: str) -> Any:
        place = self._root
        for step in reference.removeprefix("#/").split("/"):
            place = place.get(step) if isinstance(place, dict) else None
        return place


def typed(text: str, types: set[str]) -> Any:
    """The value that a text means, if a value of these types is wanted; the text itself if it is none of them."""
    word = text.strip()
    value: Any = PYTHON_WORDS[word] if word in PYTHON_WORDS else parsed(word)
    kind = "null" if value is None else JSON_TYPES[type(value)]
    if kind == "number" and "integer" in types and "number" not in types and value.is_integer():
        return int(value)
    fits = not types or kind in types or (kind == "integer" and "number" in types)
    return value if fits and kind != "string" else text
