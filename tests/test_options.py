from __future__ import annotations

import json
from typing import Any

import pytest

from models.options import CHECKS, InvalidOption, Options, check, text


@pytest.mark.parametrize(
    ("name", "value", "held"),
    [
        ("instructions", "Be brief.", "Be brief."),
        ("instructions", "", ""),
        ("instructions", None, None),
        ("temperature", 0, 0.0),
        ("temperature", 2, 2.0),
        ("top_p", 1, 1.0),
        ("top_p", 1e-9, 1e-9),
        ("top_k", 0, 0),
        ("top_k", 40, 40),
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
)
def test_an_allowed_value_is_held(name: str, value: Any, held: Any) -> None:
    assert check(name, value) == held
    assert getattr(Options().updated({name: value}), name) == held


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instructions", 1),
        ("instructions", "\ud800"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", 10**400),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", [0.5]),
        ("top_k", -1),
        ("top_k", 1.0),
        ("top_k", False),
        ("top_k", 2**64),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.5),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", None),
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
)
def test_any_other_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidOption, match=f"^{name} must be ") as raised:
        Options().updated({name: value})
    assert raised.value.name == name
    assert raised.value.allowed == CHECKS[name][0]


def test_an_unknown_option_is_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(InvalidOption, match=r"^top_q must be left out; the options are .*top_p") as raised:
        check("top_q", 0.5)
    assert raised.value.name == "top_q"


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_a_penalty_out_of_bounds_is_told_what_they_are(name: str) -> None:
    with pytest.raises(InvalidOption, match=f"^{name} must be a number from -2 to 2$"):
        check(name, 3)


def test_the_defaults_are_the_documented_ones() -> None:
    assert Options() == Options(None, 0.45, 0.9, 0, 1.1, 0.0, 0.0, None, (), None)


def test_an_update_changes_what_it_names_and_leaves_the_original() -> None:
    before = Options(temperature=1.5, stop=("END",))
    assert before.updated({"top_k": 5}) == Options(temperature=1.5, stop=("END",), top_k=5)
    assert before == Options(temperature=1.5, stop=("END",))


def test_one_bad_value_refuses_the_whole_update() -> None:
    with pytest.raises(InvalidOption, match="top_p"):
        Options().updated({"temperature": 1, "top_p": 3})


def test_there_is_a_check_for_each_option_and_no_other() -> None:
    assert set(Options().public()) == set(CHECKS)


def test_the_public_form_survives_json_and_sets_the_same_options() -> None:
    options = Options("Be brief.", 0.0, 0.5, 7, 1.2, -0.5, 1.5, 9, ("a", "b"), 3)
    assert Options().updated(json.loads(json.dumps(options.public()))) == options


USUAL = Options(temperature=1.5, stop=("END",), seed=3)


@pytest.mark.parametrize(
    ("changes", "beyond"),
    [
        ({}, {}),
        ({"temperature": 1.5, "stop": ["END"], "seed": 3}, {}),
        ({"temperature": 0.45}, {"temperature": 0.45}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop": []}, {"stop": []}),
        ({"seed": None, "instructions": ""}, {"seed": None, "instructions": ""}),
        ({"top_k": 7, "max_output_tokens": 9}, {"top_k": 7, "max_output_tokens": 9}),
    ],
)
def test_what_differs_from_the_usual_options_is_told_as_json_has_it_and_makes_them_again(
    changes: dict[str, Any], beyond: dict[str, Any]
) -> None:
    options = USUAL.updated(changes)
    told = json.loads(json.dumps(options.beyond(USUAL)))
    assert told == beyond
    assert USUAL.updated(told) == options


@pytest.mark.parametrize("value", ["", "广州", "\u0000", "👩\u200d👩\u200d👧"])
def test_text_that_utf8_can_hold_passes(value: str) -> None:
    assert text(value) == value


@pytest.mark.parametrize("value", [None, 1, b"bytes", ["a"], "\ud83d", "a\udc00b"])
def test_what_is_no_sendable_text_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"not a string|surrogates not allowed"):
        text(value)
