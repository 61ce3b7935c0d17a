"""The form that the text of a reply must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class OutputFormat:
    """The form of a reply's text; its reasoning and its tool calls are not part of it.

    `value` is the JSON Schema of "json_schema", the pattern of "regex", the texts of "choice", or the grammar of
    "grammar" (Lark, or the GBNF of llama.cpp). The others have none.
    """

    type: Literal["text", "json_object", "json_schema", "regex", "choice", "grammar"] = "text"
    value: Mapping[str, Any] | str | tuple[str, ...] | None = None
    param: str = "text.format"  # the name of the parameter, for errors
    strict: bool | None = None  # what the request says of its schema; our engine always keeps to it


PLAIN_TEXT = OutputFormat()
