from __future__ import annotations

from typing import Any

import pytest
from msgspec import Struct

from models.errors import InvalidValueError, UnsupportedParameterError
from models.protocols.parameters import convert_parameters, read_option, take_unsupported


class Body(Struct, forbid_unknown_fields=True):
    model: str


def test_a_parameter_that_is_not_supported_is_taken_out_where_it_has_no_effect() -> None:
    values = {"best_of": 1, "model": "m"}
    take_unsupported(values, {"best_of": (1,), "echo": (False,)})
    assert values == {"model": "m"}


@pytest.mark.parametrize("value", [True, 2, "1", None, [1]])
def test_any_other_value_of_it_is_refused_with_what_to_do_instead(value: Any) -> None:
    with pytest.raises(UnsupportedParameterError, match="best_of is not supported: use n") as raised:
        take_unsupported({"best_of": value}, {"best_of": (1,)}, {"best_of": "use n"})
    assert raised.value.param == "best_of"


@pytest.mark.parametrize(("option", "off"), [("seed", None), ("top_k", 0)])
def test_minus_one_turns_some_options_off(option: str, off: int | None) -> None:
    assert read_option(option, -1, option) == off


def test_a_bad_option_has_the_name_that_the_api_gives_it() -> None:
    assert read_option("max_tokens", 3, "max_output_tokens") == 3
    with pytest.raises(InvalidValueError, match="max_tokens must be a whole number, 1 or more, or null") as raised:
        read_option("max_tokens", -1, "max_output_tokens")
    assert raised.value.param == "max_tokens"


@pytest.mark.parametrize(
    ("values", "code", "param"),
    [({}, "invalid_value", "model"), ({"model": "m", "mode": 1}, "unknown_parameter", "mode")],
    ids=["missing", "unknown"],
)
def test_a_missing_or_unknown_parameter_has_the_code_of_these_apis(
    values: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises((InvalidValueError, UnsupportedParameterError)) as raised:
        convert_parameters(values, Body)
    assert (raised.value.code, raised.value.param) == (code, param)
