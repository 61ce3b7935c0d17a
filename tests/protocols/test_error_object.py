from __future__ import annotations

from models.errors import InvalidValueError, ItemNotFoundError, ServerError
from models.protocols.error_object import render_error


def test_an_error_has_the_four_fields_of_openais_api() -> None:
    rendered = render_error(InvalidValueError("seed must be a number", "seed"))
    assert list(rendered.items()) == [
        ("message", "seed must be a number"),
        ("type", "invalid_request_error"),
        ("param", "seed"),
        ("code", "invalid_value"),
    ]
    assert render_error(ItemNotFoundError())["param"] == "after"
    assert render_error(ServerError())["param"] is None
