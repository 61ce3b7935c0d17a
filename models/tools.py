"""The tools that a model may call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. `parameters` is a JSON Schema of its arguments; None is any object."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False  # whether the arguments of a call always match the schema


@dataclass(frozen=True)
class Tools:
    """The tools of one reply.

    `choice` says whether the model may call them ("auto"), must call at least one ("required"), or must not ("none").
    `allowed` has the names of those that it may call; None is all. `parallel` allows several calls.
    """

    tools: tuple[Tool, ...] = ()
    choice: Literal["auto", "none", "required"] = "auto"
    allowed: frozenset[str] | None = None
    parallel: bool = True

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that the model may call."""
        if self.choice == "none":
            return ()
        return tuple(tool for tool in self.tools if self.allowed is None or tool.name in self.allowed)

    @property
    def forced(self) -> bool:
        """Whether the reply consists of calls."""
        return self.choice == "required" and bool(self.callable)


NO_TOOLS = Tools()
