"""The tools of a request: functions, and which of them the model may call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from models.errors import InvalidValueError, UnsupportedParameterError
from models.tools import Tool, Tools
from models.validation import Text, check_json, printable

MAX_TOOLS = 256
SCHEMA_BYTES = 2**16  # of one JSON Schema

FunctionName = Annotated[
    str, Meta(pattern=r"\A[a-zA-Z0-9_.:-]{1,128}\Z", description="1 to 128 letters, digits and . : _ -")
]
Choice = Literal["auto", "none", "required"]


class Function(Struct):
    """A function; fields that it has beside these are ignored."""

    name: FunctionName
    description: Text | None = None
    parameters: Annotated[dict[str, Any] | None, Meta(description="a JSON Schema")] = None
    strict: Annotated[bool | None, Meta(description="true or false")] = None

    def as_tool(self, at: str) -> Tool:
        """The tool in the form of the domain; the place is for errors. Raises InvalidValueError."""
        if self.parameters is not None:
            check_json(self.parameters, f"{at}.parameters", SCHEMA_BYTES)
        return Tool(self.name, self.description, self.parameters, bool(self.strict))


class ChatTool(Struct):
    """A tool in the form of Chat Completions."""

    type: Any = "function"
    function: Annotated[Function | None, Meta(description="an object with a name")] = None

    def as_tool(self, at: str) -> Tool:
        """The tool in the form of the domain; the place is for errors. Raises InvalidRequestError."""
        if self.type != "function":
            told = f"tools of the type {printable(self.type, 64)} are not supported, only functions"
            raise UnsupportedParameterError(f"{at}.type: {told}", f"{at}.type")
        if self.function is None:
            raise InvalidValueError(f"{at}.function is missing", f"{at}.function")
        return self.function.as_tool(f"{at}.function")


ChatTools = Annotated[
    list[Annotated[ChatTool, Meta(description='{"type": "function", "function": {...}}')]],
    Meta(max_length=MAX_TOOLS, description=f"a list of up to {MAX_TOOLS} tools"),
]


def make_tools(tools: Sequence[Tool], choice: Choice, allowed: frozenset[str] | None, parallel: bool) -> Tools:
    """The tools of a reply. Raises InvalidValueError if two have one name, or if the choice needs what is missing."""
    names = [tool.name for tool in tools]
    if twice := next((index for index, name in enumerate(names) if name in names[:index]), None):
        raise InvalidValueError(f"tools[{twice}] has the same name as another tool", f"tools[{twice}]")
    if unknown := (allowed or frozenset()) - {*names}:
        raise InvalidValueError(f"tool_choice names {min(unknown)}, which is not in tools", "tool_choice")
    if choice == "required" and not tools:
        raise InvalidValueError("tool_choice needs tools", "tool_choice")
    return Tools(tuple(tools), choice, allowed, parallel)


def parse_tools(values: Sequence[ChatTool], choice: Any, parallel: bool) -> Tools:
    """The tools of a request, and its `tool_choice`. Raises InvalidValueError or UnsupportedParameterError."""
    tools = [value.as_tool(f"tools[{index}]") for index, value in enumerate(values)]
    match choice:
        case None | "auto" | "none" | "required":
            return make_tools(tools, choice or "auto", None, parallel)
        case {"type": "function", "function": {"name": str(name)}}:
            return make_tools(tools, "required", _names([name]), parallel=False)
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*allowed]}}:
            names = [_name_of(tool) for tool in allowed]
            if None not in names:
                return make_tools(tools, mode, _names(names), parallel)
    told = 'auto, none, required, {"type": "function", "function": {"name": "..."}}, or allowed_tools'
    raise InvalidValueError(f"tool_choice must be {told}", "tool_choice", told)


def _name_of(tool: Any) -> str | None:
    match tool:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    return None


def _names(names: Sequence[str | None]) -> frozenset[str]:
    return frozenset(printable(name, 128) for name in names)
