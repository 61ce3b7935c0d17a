from __future__ import annotations

import http
import inspect
import re
from pathlib import Path
from typing import get_args

import pytest
from sqlalchemy.exc import OperationalError

from models import errors
from models.errors import APIError, DataFolderError, ErrorType, ParleyError, ServerError, one_line

CLASSES = [one for _, one in inspect.getmembers(errors, inspect.isclass) if one.__module__ == errors.__name__]
API_CLASSES = [one for one in CLASSES if issubclass(one, APIError)]
RAISED = [one for one in API_CLASSES if not one.__subclasses__() or one is ServerError]  # the others are groups
TREE = str(errors.__doc__).partition("\n\n")[2]

each_refusal = pytest.mark.parametrize("error", RAISED, ids=lambda error: error.__name__)


# The tree


def test_each_class_is_an_error_of_parley() -> None:
    assert [one for one in CLASSES if not issubclass(one, ParleyError)] == []


def test_the_name_of_each_error_ends_in_error() -> None:
    assert [one.__name__ for one in CLASSES if not one.__name__.endswith("Error")] == []


def test_each_error_says_what_it_means() -> None:
    assert [one.__name__ for one in CLASSES if not one.__doc__] == []


def test_the_drawn_tree_names_every_error_and_no_other() -> None:
    drawn = re.findall(r"[A-Z]\w*[a-z]\w*", TREE)  # refusals are drawn without "Error"
    assert {f"{name.removesuffix('Error')}Error" for name in drawn} == {one.__name__ for one in CLASSES}


def test_the_drawn_tree_shows_the_status_of_each_refusal() -> None:
    drawn = dict[str, int]()
    status = 0
    for line in TREE.partition("APIError")[2].partition("EngineError")[0].splitlines():
        if found := re.search(r"\d{3}", line):
            status = int(found[0])
        leaves = line[found.end() if found else 0 :].replace("itself", "Server")
        drawn |= {f"{name}Error": status for name in re.findall("[A-Z][A-Za-z]+", leaves)}
    assert {one.__name__: one.status for one in RAISED}.items() <= drawn.items()


# Refused requests


@each_refusal
def test_each_refusal_has_a_status_a_type_and_a_code(error: type[APIError]) -> None:
    assert 400 <= http.HTTPStatus(error.status) < 600
    assert error.type in get_args(ErrorType)
    assert re.fullmatch("[a-z]+(_[a-z]+)*", error.code)


@each_refusal
def test_a_refusal_that_says_when_to_retry_has_a_status_for_that(error: type[APIError]) -> None:
    assert error.retry_after is None or (error.retry_after > 0 and error.status in (429, 503))


def test_the_type_tells_whose_fault_it_is() -> None:
    for error in API_CLASSES:
        assert (error.type == "server_error") == issubclass(error, ServerError)
        assert (error.type == "rate_limit_error") == issubclass(error, errors.RateLimitError)
        assert (error.type == "authentication_error") == issubclass(error, errors.AccessError)


def test_an_error_with_a_fixed_message_needs_none() -> None:
    error = errors.ConversationLockedError()
    assert str(error) == errors.ConversationLockedError.message
    assert (error.status, error.code, error.param) == (409, "conversation_locked", None)


def test_a_message_and_a_param_replace_the_fixed_ones() -> None:
    error = errors.ItemNotFoundError("gone", "response.after")
    assert (str(error), error.param) == ("gone", "response.after")
    assert errors.ItemNotFoundError().param == "after"


def test_an_invalid_value_keeps_what_is_allowed() -> None:
    error = errors.InvalidValueError("top_k must be a number", "top_k", "a number")
    assert (str(error), error.param) == ("top_k must be a number", "top_k")
    assert (error.allowed, error.code) == ("a number", "invalid_value")
    assert errors.InvalidValueError("wrong", "top_k").allowed is None


def test_a_rate_limit_says_when_to_try_again() -> None:
    error = errors.RateLimitExceededError("too many", 7)
    assert (error.retry_after, error.status) == (7, 429)


# Errors for the operator


def test_an_error_about_the_data_folder_names_it_and_the_reason() -> None:
    error = DataFolderError(Path("/data"), PermissionError(13, "Permission denied", "/data"))
    assert (
        str(error)
        == "PARLEY_DATA=/data cannot be used: Permission denied; it must be a folder that Parley can write to"
    )


def test_an_unsupported_model_says_what_is_unknown_and_what_to_do() -> None:
    message = str(errors.UnsupportedModelError("it has linear_attention"))
    assert message.startswith("the model cannot run on this engine: it has linear_attention; choose")


# One line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        pytest.param(ValueError("it is wrong"), "ValueError: it is wrong", id="error"),
        pytest.param(ValueError(" two\n\n\tlines "), "ValueError: two lines", id="lines"),
        pytest.param(ValueError(), "ValueError", id="no-text"),
        pytest.param(KeyboardInterrupt(), "KeyboardInterrupt", id="no-exception"),
        pytest.param(ServerError("the server failed"), "the server failed", id="error-of-ours"),
        pytest.param("two\nlines ", "two lines", id="text"),
        pytest.param("\x1b[31mred", "[31mred", id="escape-code"),
        pytest.param("", "", id="empty"),
        pytest.param("x" * 1000, "x" * 300, id="long"),
        pytest.param(
            OperationalError("SELECT secret", {"id": 1}, OSError(28, "No space left")),
            "OSError: [Errno 28] No space left",
            id="wrapped",
        ),
    ],
)
def test_an_error_is_told_in_one_line(error: BaseException | str, line: str) -> None:
    assert one_line(error) == line


def test_the_length_of_the_line_can_be_chosen() -> None:
    assert one_line(ValueError("x" * 1000), limit=15) == "ValueError: xxx"
