"""Limits of what clients send to be compiled. Without them, llguidance takes seconds and gigabytes, or crashes.

They were measured on texts that are made to be expensive, with the embedded model's 49,152 tokens: within them,
compiling takes less than 0.3 s in a thread of its own, a mask less than 0.1 s, and a grammar less than 70 MB. Usual
schemas take 1 ms, 0.01 ms and 3 MB.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from llguidance import LLParserLimits

from models.errors import InvalidValueError

SCHEMA_BYTES = 2**16
LARK_BYTES = 2**17  # of a whole grammar, which may have the schemas of many tools
GRAMMAR_BYTES = 2**13  # of a client's own grammar: rules in a chain of thousands overflow the stack
REGEX_LENGTH = 2048  # time grows with its square
REPEATS = 10_000  # of repeats in repeats, as in (x{100}){100}
OPTIONAL_PROPERTIES = 500  # of one object; they are all possible at once
MULTIPLE = 10_000  # a number modulo this has so many states
DEPTH = 100  # of a schema
EXACT = 2**53  # whole numbers beyond are rounded by llguidance

COMMON: dict[str, Any] = {"step_lexer_fuel": 20_000, "max_lexer_states": 50_000, "verbose_errors": False}
SCHEMA_LIMITS = LLParserLimits(**COMMON, max_items_in_row=2000, step_max_items=20_000)
# A grammar of a client can be ambiguous: then the work of a token grows with each one before it.
GRAMMAR_LIMITS = LLParserLimits(
    **COMMON, max_items_in_row=500, step_max_items=5000, initial_lexer_fuel=200_000, max_grammar_size=100_000
)

STRING, REGEX, COMMENT = r'"(?:\\.|[^"\\\n])*"', r"/(?:\\.|[^/\\\n])+/", r"//[^\n]*"
LITERAL = re.compile(f"(?P<regex>{REGEX})|{STRING}|{COMMENT}")
OPERATOR = re.compile(r"[&~]|%(?!import\b|ignore\b|llguidance\b)\w*")
JSON = re.compile(r"%json\s*")
MINIMUM = re.compile(r"\{\s*(\d+)")


def check_regex(pattern: str, param: str) -> None:
    """Raises InvalidValueError for a pattern that is too long, or repeats too much."""
    if len(pattern) > REGEX_LENGTH:
        raise InvalidValueError(f"{param} has a pattern of more than {REGEX_LENGTH:,} characters", param)
    if math.prod(max(1, int(number[:9])) for number in MINIMUM.findall(pattern)) > REPEATS:
        raise InvalidValueError(f"{param} has a pattern that repeats something more than {REPEATS:,} times", param)


def check_grammar(lark: str, param: str) -> None:
    """Raises InvalidValueError for a client's own Lark text that is too large, or has operators that cost too much."""
    if len(lark.encode()) > GRAMMAR_BYTES:
        raise InvalidValueError(f"{param} has a grammar of more than {GRAMMAR_BYTES:,} bytes", param)
    for literal in LITERAL.finditer(lark):
        if literal["regex"]:
            check_regex(literal["regex"], param)
    if found := OPERATOR.search(LITERAL.sub(" ", lark)):
        raise InvalidValueError(f"{param} has a grammar with {found[0]}, which is not allowed here", param)


def check_schemas(lark: str, param: str) -> None:
    """Check all schemas in Lark text. Raises InvalidValueError for what is too large or costs too much."""
    if len(lark.encode()) > LARK_BYTES:
        raise InvalidValueError(f"{param}: all schemas together have more than {LARK_BYTES:,} bytes", param)
    end = 0
    while found := JSON.search(lark, end):
        try:
            schema, end = json.JSONDecoder().raw_decode(lark, found.end())
        except (ValueError, RecursionError):
            raise InvalidValueError(f"{param} has a schema that is no JSON, or is nested too deeply", param) from None
        check_schema(schema, param)


def check_schema(schema: Any, param: str) -> None:
    """Raises InvalidValueError for a schema that costs too much."""
    multiples = 1
    for part in _parts(schema, param):
        for pattern in (part.get("pattern"), *_names(part, "patternProperties")):
            if isinstance(pattern, str):
                check_regex(pattern, param)
        required = part.get("required")
        optional = len(_names(part, "properties")) - (len(required) if isinstance(required, list) else 0)
        if optional > OPTIONAL_PROPERTIES:
            raise InvalidValueError(f"{param} has an object with over {OPTIONAL_PROPERTIES} optional properties", param)
        if isinstance(multiple := part.get("multipleOf"), int | float) and not isinstance(multiple, bool):
            multiples = math.lcm(multiples, _digits(multiple))
    if multiples > MULTIPLE:
        raise InvalidValueError(f"{param} has a multipleOf with too many digits, or several that differ", param)


def _parts(value: Any, param: str) -> Iterator[dict[str, Any]]:
    """All objects in a schema, which is not too deep and has no number that would be rounded."""
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > DEPTH:
            raise InvalidValueError(f"{param} has a schema that is nested more than {DEPTH} levels deep", param)
        if isinstance(one, int) and abs(one) > EXACT:
            raise InvalidValueError(f"{param} has a schema with a whole number beyond 2^53", param)
        if isinstance(one, dict):
            yield one
            one = list(one.values())
        if isinstance(one, list):
            waiting += [(each, depth + 1) for each in one]


def _names(part: dict[str, Any], keyword: str) -> list[str]:
    value = part.get(keyword)
    return list(value) if isinstance(value, dict) else []


def _digits(number: float) -> int:
    """The digits of a number as a whole number: 25 of 0.25, and 100 of 100. Too many digits count as many."""
    _, digits, exponent = Decimal(str(number)).normalize().as_tuple()
    if not isinstance(exponent, int) or len(digits) + max(0, exponent) > len(str(MULTIPLE)):
        return MULTIPLE + 1
    return max(1, int("".join(map(str, digits)) + "0" * exponent))
