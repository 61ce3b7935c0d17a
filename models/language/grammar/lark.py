"""Output formats as Lark text, the language that llguidance compiles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from models.errors import InvalidValueError, one_line
from models.language.grammar.limits import SCHEMA_BYTES, check_grammar, check_regex
from models.output_format import OutputFormat

# A model that is not sure what comes next can write spaces for ever.
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}


def lark_of(format: OutputFormat) -> str:
    """The grammar of a format as Lark text, with a rule `start`. It can stand in a larger one, in `%lark { ... }`.

    Raises InvalidValueError for what is too large. What llguidance refuses, it refuses when the text is compiled.
    """
    value, param = format.value, format.param
    if format.type == "json_object":
        return f"start: {json_rule({'type': 'object'}, param)}"
    if format.type == "json_schema" and isinstance(value, Mapping):
        return f"start: {json_rule(value, param)}"
    if format.type == "regex" and isinstance(value, str):
        check_regex(value, param)
        return f"start: /{regex_to_lark(value)}/" if value else 'start: ""'
    if format.type == "choice" and isinstance(value, tuple) and value:
        return f"start: {' | '.join(map(_literal, value))}"
    if format.type == "grammar" and isinstance(value, str):
        return _client_grammar(value, param)
    raise InvalidValueError(f"{param} has no value that fits its type", param)


def json_rule(schema: Mapping[str, Any], param: str) -> str:
    """The right side of a rule: JSON text that matches a schema. Raises InvalidValueError."""
    try:
        text = json.dumps({**schema, "x-guidance": JSON_OPTIONS}, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise InvalidValueError(f"{param} has a schema that is no JSON, or is nested too deeply", param) from None
    if len(text.encode(errors="replace")) > SCHEMA_BYTES:
        raise InvalidValueError(f"{param} has a schema of more than {SCHEMA_BYTES:,} bytes", param)
    return f"%json {text}"


def _client_grammar(text: str, param: str) -> str:
    """A client's grammar, in Lark or in the GBNF of llama.cpp, as Lark text."""
    if "::=" in text and not is_lark_syntax(text):
        try:
            text = gbnf_to_lark(text)
        except Exception as error:  # it raises plain ones
            raise InvalidValueError(f"{param} has a grammar that is not GBNF: {one_line(str(error))}", param) from None
    check_grammar(text, param)
    return text


def _literal(text: str) -> str:
    """A text as a string of Lark."""
    shown = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() and char != "%" else f"\\u{ord(char):04x}" for char in shown)
