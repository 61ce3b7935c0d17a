from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings, strategies
from msgspec import Meta, Struct

from models.errors import (
    InvalidJSONError,
    InvalidRequestError,
    InvalidValueError,
    MissingFieldError,
    UnknownFieldError,
)
from models.validation import BYTES_PER_PART, Text, check_json, convert, describe_allowed, parse_object, printable

Number = Annotated[int, Meta(ge=0, le=9, description="a digit")]


class Part(Struct, forbid_unknown_fields=True):
    """An object whose missing and unknown fields are told by name."""

    size: Number
    name: Text = ""


WHOLE = Meta(description='{"size": 1}', extra={"report_object": True})


class Form(Struct, forbid_unknown_fields=True):
    """An object with every kind of field."""

    number: Number = 0
    text: Text = ""
    word: Annotated[Literal["yes", "no"], Meta(description="yes or no")] = "no"
    optional: Annotated[Number | None, Meta(description="a digit or null")] = None
    numbers: Annotated[list[Number], Meta(max_length=2, description="a list of up to 2 digits")] = []
    plain_list: list[Number] = []
    part: Annotated[Part | None, Meta(description="an object of size and name")] = None
    parts: Annotated[list[Part], Meta(description="a list of objects")] = []
    whole_parts: list[Annotated[Part, WHOLE]] = []
    either: Annotated[Text | list[Part], Meta(description="text, or a list of objects")] = ""
    anything: Any = None
    digits: Annotated[
        dict[Annotated[str, Meta(pattern="^[a-z]$")], int], Meta(description="digits by small letters")
    ] = {}


def error_of(value: Any, type: Any = Form, at: str = "") -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as raised:
        convert(value, type, at)
    return raised.value


def can_be_sent(text: str) -> bool:
    """Whether UTF-8 can hold a text."""
    return text.encode(errors="replace") == text.encode(errors="surrogatepass")


# Values


def test_a_valid_object_is_converted() -> None:
    form = convert({"number": 3, "part": {"size": 1}, "either": [{"size": 2}], "anything": {"a": [1]}}, Form)
    assert form == Form(number=3, part=Part(1), either=[Part(2)], anything={"a": [1]})


@pytest.mark.parametrize(
    ("value", "param", "description"),
    [
        pytest.param({"number": 10}, "number", "a digit", id="number-out-of-bounds"),
        pytest.param({"number": "1"}, "number", "a digit", id="text-for-a-number"),
        pytest.param({"number": True}, "number", "a digit", id="boolean-for-a-number"),
        pytest.param({"number": 1.5}, "number", "a digit", id="fraction"),
        pytest.param({"number": None}, "number", "a digit", id="null"),
        pytest.param({"number": 10**400}, "number", "a digit", id="huge-number"),
        pytest.param({"number": -(10**5000)}, "number", "a digit", id="huge-negative-number"),
        pytest.param({"text": 1}, "text", "text", id="number-for-a-text"),
        pytest.param({"word": "maybe"}, "word", "yes or no", id="word"),
        pytest.param({"optional": 10}, "optional", "a digit or null", id="one-type-of-two"),
        pytest.param({"numbers": 1}, "numbers", "a list of up to 2 digits", id="number-for-a-list"),
        pytest.param({"numbers": [1, 2, 3]}, "numbers", "a list of up to 2 digits", id="long-list"),
        pytest.param({"numbers": [1, "x"]}, "numbers[1]", "a digit", id="item-of-a-list"),
        pytest.param({"plain_list": [1, 2, 3, 10]}, "plain_list[3]", "a digit", id="item-of-a-list-without-words"),
        pytest.param({"part": 1}, "part", "an object of size and name", id="number-for-an-object"),
        pytest.param({"part": {"size": 10}}, "part.size", "a digit", id="field-of-an-object"),
        pytest.param({"parts": [{"size": 1}, {"size": 10}]}, "parts[1].size", "a digit", id="field-of-an-item"),
        pytest.param({"parts": [{"size": 1}, 5]}, "parts", "a list of objects", id="item-without-words"),
        pytest.param({"either": 1}, "either", "text, or a list of objects", id="neither-type"),
        pytest.param({"either": [{"size": 10}]}, "either[0].size", "a digit", id="field-in-one-type-of-two"),
        pytest.param({"either": [1]}, "either", "text, or a list of objects", id="item-in-one-type-of-two"),
    ],
)
def test_the_error_names_the_nearest_described_type_and_where_it_is(value: Any, param: str, description: str) -> None:
    error = error_of(value)
    assert isinstance(error, InvalidValueError)
    assert str(error) == f"{param} must be {description}"
    assert (error.param, error.allowed, error.code, error.status) == (param, description, "invalid_value", 400)


def test_the_path_begins_with_the_parameter_that_holds_the_value() -> None:
    assert error_of({"part": {"size": 10}}, at="response").param == "response.part.size"
    assert error_of({"colour": 1}, at="response").param == "response.colour"
    assert error_of({}, Part, at="response").param == "response.size"


@pytest.mark.parametrize("value", [None, 1, "text", [1], [["number", 1]]], ids=ascii)
def test_a_value_that_is_no_object_is_refused(value: Any) -> None:
    error = error_of(value, at="response")
    assert (error.param, error.code) == ("response", "invalid_value")


# Missing and unknown fields


@pytest.mark.parametrize(
    ("value", "type", "field"),
    [({}, Part, "size"), ({"part": {}}, Form, "part.size"), ({"parts": [{"size": 1}, {}]}, Form, "parts[1].size")],
    ids=["top", "object", "item"],
)
def test_a_missing_field_is_named(value: Any, type: Any, field: str) -> None:
    error = error_of(value, type)
    assert isinstance(error, MissingFieldError)
    assert (str(error), error.param, error.code) == (f"{field} is missing", field, "missing_field")


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"part": {"size": 1, "colour": 1}}, "part.colour"),
        ({"parts": [{"size": 1, "colour": 1}]}, "parts[0].colour"),
        ({"either": [{"size": 1, "colour": 1}]}, "either[0].colour"),
        ({"colour": 1}, "colour"),
        ({"": 1}, ""),
    ],
    ids=["object", "item", "one-type-of-two", "top", "empty-name"],
)
def test_an_unknown_field_is_named(value: Any, field: str) -> None:
    error = error_of(value)
    assert isinstance(error, UnknownFieldError)
    assert str(error) == f"{field} is not known here"
    assert ((error.param or ""), error.code) == (field, "invalid_value")


@pytest.mark.parametrize("part", [{}, {"size": 1, "colour": 1}], ids=["missing", "unknown"])
def test_fields_of_a_whole_object_are_told_of_the_object(part: Any) -> None:
    error = error_of({"whole_parts": [{"size": 1}, part]})
    assert isinstance(error, InvalidValueError)
    assert str(error) == 'whole_parts[1] must be {"size": 1}'
    assert (error.param, error.code) == ("whole_parts[1]", "invalid_value")


def test_a_wrong_value_in_a_whole_object_is_told_of_itself() -> None:
    assert error_of({"whole_parts": [5]}).param == "whole_parts[0]"
    assert error_of({"whole_parts": [{"size": 10}]}).param == "whole_parts[0].size"


@pytest.mark.parametrize(
    "name",
    ["a - at `$.b`", "a` - at `$.part", "`", "$", "a\nb", "a.b[0]", "x" * 10_000],
    ids=["like-a-path", "like-a-path-in-quotes", "quote", "dollar", "newline", "dots", "long"],
)
def test_an_unknown_name_may_be_any_text(name: str) -> None:
    error = error_of({name: 1})
    assert (error.status, error.code) == (400, "invalid_value")
    assert len(str(error)) < 500


# Lone surrogates, which JSON can spell and UTF-8 cannot


@pytest.mark.parametrize(
    ("value", "param"),
    [
        pytest.param({"text": "\ud83d"}, "text", id="text"),
        pytest.param({"word": "\ud83d"}, "word", id="word"),
        pytest.param({"number": "\ud83d"}, "number", id="number"),
        pytest.param({"part": {"size": 1, "name": "a\udc00b"}}, "part.name", id="nested-text"),
        pytest.param({"\ud83d": 1}, "?", id="name"),
        pytest.param({"part": {"size": 1, "\ud83d": 1}}, "part.?", id="nested-name"),
        pytest.param({"\ud83d": {"\ud83d": ["\ud83d"]}}, "?", id="everywhere"),
    ],
)
def test_a_lone_surrogate_is_refused_in_words_that_can_be_sent(value: Any, param: str) -> None:
    error = error_of(value)
    assert error.param == param
    assert can_be_sent(str(error))


@pytest.mark.parametrize("text", ["", "广州", "\u0000", "👩\u200d👩\u200d👧"], ids=ascii)
def test_text_is_any_string_that_utf8_can_hold(text: str) -> None:
    assert convert(text, Text) == text


@pytest.mark.parametrize("value", [None, 1, b"bytes", ["a"], "\ud83d", "a\udc00b"], ids=ascii)
def test_anything_else_is_no_text(value: Any) -> None:
    assert str(error_of(value, Text, at="name")) == "name must be text"


ANY_TEXT = strategies.text(strategies.characters(), max_size=4)  # with lone surrogates
SCALARS = strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | ANY_TEXT
VALUES = strategies.recursive(
    SCALARS, lambda values: strategies.lists(values) | strategies.dictionaries(ANY_TEXT, values), max_leaves=4
)
NAMES = strategies.sampled_from(Form.__struct_fields__) | ANY_TEXT


def refusal(value: Any) -> InvalidRequestError | None:
    """The error of a value; None where it is accepted."""
    try:
        convert(value, Form)
    except InvalidRequestError as error:
        return error
    return None


@settings(deadline=None)
@given(strategies.dictionaries(NAMES, VALUES, max_size=3))
def test_any_object_is_converted_or_refused_in_words_that_can_be_sent(value: dict[str, Any]) -> None:
    if error := refusal(value):
        assert can_be_sent(f"{error} {error.param}")


# What a field may be


def test_a_wrong_name_is_told_of_its_object() -> None:
    refused = error_of({"digits": {"a": 1, "B": 2}})
    assert (refused.param, str(refused)) == ("digits", "digits must be digits by small letters")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"a": ["x" * 100]}, "at most 100 bytes"),
        (["é" * 49], "at most 100 bytes"),
        ({"a": ["\ud800"]}, "lone surrogate"),
        ([float("inf")], "number that is too large"),
    ],
    ids=ascii,
)
def test_json_of_any_form_is_bounded_and_can_be_sent(value: Any, told: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^schema .*{told}") as raised:
        check_json(value, "schema", 100)
    assert raised.value.param == "schema"


def test_json_that_is_nested_too_deeply_is_refused() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(InvalidValueError, match="nested too deeply"):
        check_json(value, "schema", 2**20)


def test_small_json_of_any_form_is_accepted() -> None:
    check_json({"a": [1, None, "é" * 20]}, "schema", 100)


def test_the_description_of_a_field_can_be_asked_for() -> None:
    assert describe_allowed(Form, "number") == "a digit"
    assert describe_allowed(Form, "optional") == "a digit or null"
    assert describe_allowed(Form, "anything") == describe_allowed(Form, "no_such_field") == "something else"


# JSON


def nested(depth: int) -> list[Any]:
    """Empty lists in each other."""
    return [nested(depth - 1)] if depth > 1 else []


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ('{"a": [1, 2.5, null, true, "é"]}', {"a": [1, 2.5, None, True, "é"]}),
        ('{"a": "é"}'.encode(), {"a": "é"}),
        ('{"a": "\\ud83d"}', {"a": "\ud83d"}),
        ('{"\\uDBFF": {"\\ud83d": 1}}', {"?": {"?": 1}}),
        ('{"\\ud83d\\udc69": 1}', {"👩": 1}),
        ('{"\\ud83d": ' + "[" * 500 + "]" * 500 + "}", {"?": nested(500)}),
        ("{}", {}),
    ],
    ids=["text", "bytes", "surrogate", "surrogate-name", "surrogate-pair-name", "surrogate-name-of-nested", "empty"],
)
def test_an_object_is_read_from_json(data: str | bytes, value: Any) -> None:
    assert parse_object(data, "the body") == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param("", "the body is not JSON: ", id="empty"),
        pytest.param("{", "the body is not JSON: ", id="cut"),
        pytest.param("{'a': 1}", "the body is not JSON: ", id="python"),
        pytest.param('{"a": 1}{}', "the body is not JSON: ", id="two-objects"),
        pytest.param(b'{"a": "\xff"}', "the body is not JSON: ", id="bad-utf-8"),
        pytest.param('{"a": NaN}', "the body is not JSON: NaN is not JSON", id="nan"),
        pytest.param('{"a": -Infinity}', "the body is not JSON: -Infinity is not JSON", id="infinity"),
        pytest.param('{"a": ' + "9" * 5000 + "}", "the body is not JSON: ", id="thousands-of-digits"),
        pytest.param("[" * 100_000, "the body is nested too deeply", id="nested-lists"),
        pytest.param('{"a": ' * 100_000, "the body is nested too deeply", id="nested-objects"),
        pytest.param("[]", "the body is not a JSON object", id="list"),
        pytest.param("null", "the body is not a JSON object", id="null"),
        pytest.param('"text"', "the body is not a JSON object", id="string"),
    ],
)
def test_anything_else_is_refused_as_invalid_json(data: str | bytes, message: str) -> None:
    with pytest.raises(InvalidJSONError) as raised:
        parse_object(data, "the body")
    assert str(raised.value).startswith(message)
    assert (raised.value.code, raised.value.status) == ("invalid_json", 400)


@pytest.mark.parametrize("name", ["number", "anything", "colour", "\\ud83d"])
@pytest.mark.parametrize("depth", [100, 400, 600, 900])
def test_an_object_that_json_can_nest_is_never_too_deep_to_be_refused(name: str, depth: int) -> None:
    value = parse_object(f'{{"{name}": {"[" * depth}{"]" * depth}, "\\ud83d": 1}}', "the body")
    error = error_of(value)
    assert can_be_sent(str(error))
    assert (error.status, error.code) == (400, "invalid_value")


# Words of clients


@pytest.mark.parametrize(
    ("words", "shown"),
    [("plain", "plain"), ("a\ud83db", "a?b"), ("x" * 1000, "x" * 200), (ValueError("why"), "why")],
    ids=["plain", "surrogate", "long", "error"],
)
def test_words_are_shortened_and_can_be_sent(words: object, shown: str) -> None:
    assert printable(words) == shown


def test_an_error_about_json_is_short() -> None:
    with pytest.raises(InvalidJSONError) as raised:
        parse_object(json.dumps({"a": "x" * 10_000})[:-1], "the body")
    assert len(str(raised.value)) < 300


def test_a_bad_name_in_an_object_is_told_as_the_objects() -> None:
    names = Annotated[dict[Annotated[str, Meta(max_length=2)], int], Meta(description="an object with short names")]
    with pytest.raises(InvalidValueError, match="numbers must be an object with short names") as raised:
        convert({"long": 1}, names, "numbers")
    assert raised.value.param == "numbers"


@pytest.mark.parametrize("depth", [100, 101, 500, 900])
def test_json_of_any_form_may_be_nested_a_hundred_times(depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    if depth <= 100:
        return check_json(value, "schema", 10_000)
    with pytest.raises(InvalidValueError, match="schema is nested too deeply"):
        check_json(value, "schema", 10_000)


def test_json_of_any_form_has_a_limit_of_lists_and_objects() -> None:
    limit = 2**16 // BYTES_PER_PART
    schema = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(2000)}}
    check_json(schema, "schema", 2**16)
    check_json([[]] * (limit - 1), "schema", 2**16)
    too_many: list[Any] = [[[]] * limit, {"x": [{}] * (limit - 1)}]
    for value in too_many:
        with pytest.raises(InvalidValueError, match="schema has too many lists and objects"):
            check_json(value, "schema", 2**16)


@pytest.mark.parametrize(
    ("value", "told"),
    [("x" * 99, "at most 100 bytes"), ("\ud800", "a lone surrogate"), (float("inf"), "a number that is too large")],
)
def test_json_of_any_form_must_be_short_and_sendable(value: Any, told: str) -> None:
    with pytest.raises(InvalidValueError, match=told):
        check_json({"x": value}, "schema", 100)


def test_words_that_are_nested_as_deep_as_json_can_have_them_can_be_told() -> None:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    assert printable(value) == "nested too deeply"
    while value != 1:  # or freeing it would need as much stack
        (value,) = value
