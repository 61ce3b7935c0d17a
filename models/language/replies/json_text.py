"""Reads JSON text while it streams."""

from __future__ import annotations

import json
import re
from typing import Any

from models.language.replies.source import Reader, Sink, Source

STRING_PIECE = re.compile(r'(?:[^"\\]|\\.)+', re.DOTALL)
SCALAR = re.compile(r"[\w.+-]+")
BETWEEN = re.compile(r"[\s\w.,:+-]+")  # what stands in JSON outside of strings and brackets


def read_value(source: Source, sink: Sink) -> Reader[bool]:
    """Pass the text of one value on as it comes. False if it breaks off, or is no JSON from some place on."""
    depth = 0
    while following := (yield from source.peek()):
        if following == '"':
            if not (yield from _read_string(source, sink)):
                return False
        elif following in "{[":
            depth += 1
            sink(source.take(1))
        elif following in "}]" and depth:
            depth -= 1
            sink(source.take(1))
        elif depth and (between := source.match(BETWEEN)):
            sink(between)
        else:
            return not depth and (yield from _read_scalar(source, sink))
        if not depth:
            return True
    return False


def _read_string(source: Source, sink: Sink) -> Reader[bool]:
    sink(source.take(1))
    while following := (yield from source.peek()):
        if following == '"':
            sink(source.take(1))
            return True
        if piece := source.match(STRING_PIECE):
            sink(piece)
        elif source.ended:  # a lone backslash
            sink(source.take(1))
        else:
            yield
    return False


def _read_scalar(source: Source, sink: Sink) -> Reader[bool]:
    """A number, true, false or null, which ends before the first other character."""
    found = False
    while (following := (yield from source.peek())) and (scalar := source.match(SCALAR)):
        sink(scalar)
        found = True
    return found and bool(following)


def read_string(source: Source) -> Reader[str | None]:
    """A string, decoded; None if none comes next, or a broken one."""
    pieces: list[str] = []
    if (yield from source.peek()) != '"' or not (yield from _read_string(source, pieces.append)):
        return None
    value = parsed("".join(pieces))
    return value if isinstance(value, str) else None


def parsed(text: str) -> Any:
    """The value of a JSON text; the text itself if it is none."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
