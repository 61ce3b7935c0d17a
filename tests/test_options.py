from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import structs

from models.errors import InvalidValueError, UnknownFieldError
from models.options import Options
from models.validation import describe_allowed

OPTION_NAMES = Options.__struct_fields__


LONG_ID = 30


def short_id(value: Any) -> str:
    return ascii(value).strip("'")[:LONG_ID]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("instructions", "Be brief.", "Be brief."),
        ("instructions", "", ""),
        ("instructions", "é" * 2**15, "é" * 2**15),
        ("instructions", None, None),
        ("temperature", 0, 0.0),
        ("temperature", 2, 2.0),
        ("top_p", 1, 1.0),
        ("top_p", 1e-9, 1e-9),
        ("top_k", 0, 0),
        ("top_k", 40, 40),
        ("top_k", 2**31, 2**31),
        ("repetition_penalty", 2, 2.0),
        ("frequency_penalty", -2, -2.0),
        ("frequency_penalty", 2, 2.0),
        ("presence_penalty", -2.0, -2.0),
        ("presence_penalty", 2, 2.0),
        ("max_output_tokens", 1, 1),
        ("max_output_tokens", None, None),
        ("stop", "END", ("END",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", [], ()),
        ("stop", ["x" * 256] * 8, ("x" * 256,) * 8),
        ("seed", 0, 0),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("seed", None, None),
    ],
    ids=short_id,
)
def test_an_allowed_value_is_taken(name: str, value: Any, expected: Any) -> None:
    taken = getattr(Options().updated({name: value}), name)
    assert taken == expected
    assert type(taken) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instructions", 1),
        ("instructions", "x" * (2**15 + 1)),
        ("instructions", "\ud800"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", 10**400),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", [0.5]),
        ("top_k", -1),
        ("top_k", 1.0),
        ("top_k", 1.5),
        ("top_k", False),
        ("top_k", 2**64),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.5),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("max_output_tokens", 0),
        ("max_output_tokens", "9"),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", 1]),
        ("stop", ["a"] * 9),
        ("stop", "x" * 257),
        ("stop", {"a": 1}),
        ("stop", "\udfff"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("seed", True),
    ],
    ids=short_id,
)
def test_any_other_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidValueError) as raised:
        Options().updated({name: value})
    error = raised.value
    assert str(error) == f"{name} must be {describe_allowed(Options, name)}"
    assert (error.param, error.code, error.allowed) == (name, "invalid_value", describe_allowed(Options, name))


def test_an_unknown_option_is_refused_with_the_known_names() -> None:
    with pytest.raises(UnknownFieldError) as raised:
        Options().updated({"top_q": 0.5})
    assert raised.value.param == "top_q"
    assert str(raised.value) == f"top_q is not an option: the options are {', '.join(OPTION_NAMES)}"


@pytest.mark.parametrize(
    ("changes", "param"), [({"top_p": 3}, "options.top_p"), ({"top_q": 3}, "options.top_q")], ids=["value", "name"]
)
def test_the_error_names_the_parameter_that_holds_the_options(changes: dict[str, Any], param: str) -> None:
    with pytest.raises((InvalidValueError, UnknownFieldError)) as raised:
        Options().updated(changes, at="options")
    assert raised.value.param == param
    assert str(raised.value).startswith(param)


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_the_error_tells_the_bounds_of_a_penalty(name: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^{name} must be a number from -2 to 2$"):
        Options().updated({name: 3})


def test_the_defaults_are_the_documented_ones() -> None:
    assert Options() == Options(None, 0.45, 0.9, 0, 0.0, 1.1, 0.0, 0.0, None, (), None, {}, None)


def test_an_update_leaves_the_original_unchanged() -> None:
    before = Options(temperature=1.5, stop=("END",))
    assert before.updated({"top_k": 5}) == Options(temperature=1.5, stop=("END",), top_k=5)
    assert before == Options(temperature=1.5, stop=("END",))


def test_an_update_leaves_the_changes_unchanged() -> None:
    changes = {"stop": "END"}
    Options().updated(changes)
    assert changes == {"stop": "END"}


def test_one_bad_value_refuses_the_whole_update() -> None:
    with pytest.raises(InvalidValueError, match="top_p"):
        Options().updated({"temperature": 1, "top_p": 3})


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_each_option_says_what_it_may_be(name: str) -> None:
    assert describe_allowed(Options, name) != "something else"


def test_the_option_names_are_those_of_the_fields() -> None:
    assert list(OPTION_NAMES) == list(Options().as_json()) == list(structs.asdict(Options()))


def test_options_survive_json() -> None:
    options = Options("Be brief.", 0.0, 0.5, 7, 0.1, 1.2, -0.5, 1.5, 9, ("a", "b"), 3, {"9": -1.0}, "low")
    assert Options().updated(json.loads(json.dumps(options.as_json()))) == options


DEFAULTS = Options(temperature=1.5, stop=("END",), seed=3)


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        pytest.param({}, {}, id="no-change"),
        pytest.param({"temperature": 1.5, "stop": ["END"], "seed": 3}, {}, id="same-values"),
        pytest.param({"temperature": 0.45}, {"temperature": 0.45}, id="number"),
        pytest.param({"stop": ["a", "b"]}, {"stop": ["a", "b"]}, id="stop-strings"),
        pytest.param({"stop": []}, {"stop": []}, id="no-stop-strings"),
        pytest.param({"seed": None, "instructions": ""}, {"seed": None, "instructions": ""}, id="null"),
        pytest.param({"top_k": 7, "max_output_tokens": 9}, {"top_k": 7, "max_output_tokens": 9}, id="two-options"),
    ],
)
def test_the_differences_from_the_defaults_restore_the_options(
    changes: dict[str, Any], differences: dict[str, Any]
) -> None:
    options = DEFAULTS.updated(changes)
    told = json.loads(json.dumps(options.differences(DEFAULTS)))
    assert told == differences
    assert DEFAULTS.updated(told) == options
