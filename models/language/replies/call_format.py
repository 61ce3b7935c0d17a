"""What a format of tool calls has to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from models.language.grammar.lark import JSON_OPTIONS
from models.language.replies.parts import Parts
from models.language.replies.source import Reader, Source
from models.tools import Tool

Literal = Callable[[str], str]  # the Lark expression of a text, in which special tokens are tokens
ToolsByName = Mapping[str, Tool]


class CallFormat(ABC):
    """How a family of models writes calls of tools.

    Its reader begins after the opener. It calls `Parts.call` as soon as the text is certainly a call, then
    `Parts.arguments` with JSON text and, if they are complete, `Parts.end_call`.
    """

    openers: tuple[str, ...]  # the markers that begin a call; without one, JSON at the beginning of the reply does
    markers: tuple[str, ...]  # the other ones, which are dropped where they stand alone
    frame: tuple[str, str]  # in a grammar: the text between the opener and the first call, and after the last one

    @property
    def all_markers(self) -> tuple[str, ...]:
        """The texts of the format that may be special tokens, or begin or end with one."""
        return (*self.openers, *self.markers)

    @abstractmethod
    def read(self, opener: str, source: Source, parts: Parts, tools: ToolsByName) -> Reader[bool]:
        """Read one call, or a list of them. False if there is none: the parser then goes back to the opener."""

    @abstractmethod
    def rule(self, tool: Tool, name: str, literal: Literal) -> list[str]:
        """The Lark rules of one call after an opener, or in a list.

        The first one has this name, and the names of others begin with it.
        """

    @property
    def between(self) -> str:
        """The text between two calls, in a grammar."""
        return f"\n{self.openers[0]}"


def start_call(source: Source, parts: Parts, name: str) -> None:
    """The text is certainly a call, so the parser does not go back."""
    source.release()
    parts.call(name)


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments for a grammar. If the tool is not strict, what it cannot say is ignored."""
    schema: dict[str, Any] = {"type": "object", **(tool.parameters or {})}
    return {**schema, "x-guidance": {**JSON_OPTIONS, "lenient": not tool.strict}}
