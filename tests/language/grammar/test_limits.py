from __future__ import annotations

import json
from typing import Any

import pytest

from models.errors import InvalidValueError
from models.language.grammar.lark import lark_of
from models.language.grammar.limits import check_grammar, check_schemas
from models.output_format import OutputFormat


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def check(schema: dict[str, Any]) -> None:
    check_schemas(lark_of(OutputFormat("json_schema", schema, "p")), "p")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"enum": ["x" * 70_000]}, "a schema of more than 65,536 bytes"),
        ({"enum": ["é" * 40_000]}, "a schema of more than 65,536 bytes"),
        ({"type": "integer", "multipleOf": 999_983}, "multipleOf"),
        ({"type": "number", "multipleOf": 1 / 1024}, "multipleOf"),
        ({"type": "number", "multipleOf": 1e300}, "multipleOf"),
        ({"allOf": [{"multipleOf": 97}, {"multipleOf": 89}, {"multipleOf": 83}]}, "multipleOf"),
        ({"type": "string", "pattern": "a?" * 1500}, "a pattern of more than 2,048 characters"),
        ({"items": {"pattern": "^(x{1000}){1000}$"}}, "repeats something more than 10,000 times"),
        ({"patternProperties": {"(x{1000,}){1000}": {}}}, "repeats something more than 10,000 times"),
        ({"properties": {f"p{n}": {} for n in range(501)}}, "over 500 optional properties"),
        (nested(120), "nested"),
        (nested(5000), "nested"),
        ({"enum": [1, 2**53 + 1]}, "beyond 2\\^53"),
        ({"type": "integer", "minimum": -(2**60)}, "beyond 2\\^53"),
        ({"const": float("nan")}, "no JSON"),
        ({"const": {1, 2}}, "no JSON"),
    ],
)
def test_a_schema_that_costs_too_much_is_refused(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidValueError, match=reason) as raised:
        check(schema)
    assert raised.value.param == "p"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "multipleOf": 0.01},
        {
            "type": "object",
            "properties": {"a": {"multipleOf": 0.25}, "b": {"multipleOf": 100}, "c": {"multipleOf": 60}},
        },
        {"pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}$"},
        {"pattern": "^[a-z0-9]{1,63}([.][a-z0-9]{1,63}){1,10}$"},
        {"properties": {f"p{n}": {} for n in range(900)}, "required": [f"p{n}" for n in range(900)]},
        {"enum": [f"value {n}" for n in range(2000)]},
        {"enum": [2**53, -(2**53), 0.1]},
        nested(40),
        {"multipleOf": True, "pattern": 7, "patternProperties": [], "properties": None, "required": "all"},
    ],
)
def test_a_usual_schema_is_not_refused(schema: dict[str, Any]) -> None:
    check(schema)


@pytest.mark.parametrize(
    ("lark", "reason"),
    [
        ("start: A\nA: /(.*a){9}/ & /(.*b){9}/", "with &"),
        ("start: A\nA: ~/a/", "with ~"),
        ('start: %json {"type": "integer"}', "with %json"),
        ('start: %regex {"substring_chars": "aaa"}', "with %regex"),
        ('start: %lark { start: "a" }', "with %lark"),
        ('a::_: "x" %if bit_clear(9)', "with %if"),
        ('start: "a" // "\n  & "b" // "', "with &"),
        ('start: /"/ & /"/', "with &"),
        ('start: "\\\\" & "\\\\"', "with &"),
        ("start: /" + "a?" * 1500 + "/", "more than 2,048 characters"),
        ("start: " + " | ".join(f"r{n}" for n in range(2000)), "more than 8,192 bytes"),
    ],
)
def test_a_grammar_of_a_client_that_costs_too_much_is_refused(lark: str, reason: str) -> None:
    with pytest.raises(InvalidValueError, match=reason):
        check_grammar(lark, "p")


@pytest.mark.parametrize(
    "lark",
    [
        'start: "a & b" /[~&%]+/ // & and ~ and %json',
        "%import common.INT\n%ignore / /\nstart: INT",
        '%llguidance {}\nstart: "100%" A{3,4}\nA: /x/i',
    ],
)
def test_a_usual_grammar_is_not_refused(lark: str) -> None:
    check_grammar(lark, "p")


def test_every_schema_in_a_larger_grammar_is_checked() -> None:
    good, bad = json.dumps({"type": "object"}), json.dumps({"multipleOf": 999_983})
    check_schemas(f"start: a b\na: %json {good}\nb: %json {good}", "tools")
    for lark in (f"start: a b\na: %json {good}\nb: %json\n  {bad}", f"start: %json // \n{good}", "start: %json {"):
        with pytest.raises(InvalidValueError) as raised:
            check_schemas(lark, "tools")
        assert raised.value.param == "tools"
    with pytest.raises(InvalidValueError, match="131,072 bytes"):
        check_schemas("\n".join(f'r{n}: "{"x" * 1000}"' for n in range(200)), "tools")


@pytest.mark.parametrize("value", [None, "x", ()])
def test_a_format_without_a_fitting_value_is_refused(value: Any) -> None:
    with pytest.raises(InvalidValueError, match="no value that fits its type"):
        lark_of(OutputFormat("choice", value, "p"))
