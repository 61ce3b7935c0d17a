from __future__ import annotations

import pytest

from models.errors import InvalidValueError
from models.protocols.responses.retrieval import Retrieval


@pytest.mark.parametrize(
    ("parameters", "retrieval"),
    [
        ({}, Retrieval(False, -1)),
        ({"stream": "false"}, Retrieval(False, -1)),
        ({"stream": "true"}, Retrieval(True, -1)),
        ({"stream": "true", "starting_after": "0"}, Retrieval(True, 0)),
        ({"stream": "true", "starting_after": "17", "include_obfuscation": "true"}, Retrieval(True, 17)),
    ],
)
def test_a_response_is_read_whole_or_after_a_number(parameters: dict[str, str], retrieval: Retrieval) -> None:
    assert Retrieval.parse(parameters) == retrieval


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"stream": "1"}, "stream"),
        ({"starting_after": "-1"}, "starting_after"),
        ({"starting_after": "1.5"}, "starting_after"),
        ({"starting_after": "9" * 5000}, "starting_after"),
        ({"starting_after": "٣"}, "starting_after"),
    ],
)
def test_a_bad_number_is_refused(parameters: dict[str, str], param: str) -> None:
    with pytest.raises(InvalidValueError) as raised:
        Retrieval.parse(parameters)
    assert raised.value.param == param
