"""The parameters of a request of one of OpenAI's APIs: options of the reply, those that are refused, and the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from models.errors import InvalidValueError, MissingFieldError, UnknownFieldError, UnsupportedParameterError
from models.options import check_option
from models.validation import Json, convert, printable

T = TypeVar("T")

OFF: Mapping[str, Any] = {"seed": None, "top_k": 0}  # what clients of other servers mean by -1
MAX_PARAM = 64  # characters of an unknown name that are sent back


def take_unsupported(
    values: Json, unsupported: Mapping[str, tuple[Any, ...]], instead: Mapping[str, str] | None = None
) -> None:
    """Take out parameters that are not supported; each has some values without an effect.

    `instead` says what to do instead of leaving one out. Raises UnsupportedParameterError for any other value.
    """
    for name in sorted(unsupported.keys() & values.keys()):
        value = values.pop(name)
        # In JSON, true is not 1.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in unsupported[name]):
            told = (instead or {}).get(name, "leave it out")
            raise UnsupportedParameterError(f"{name} is not supported: {told}", name)


def read_option(name: str, value: Any, option: str) -> Any:
    """The value of an option, which the API calls `name`. Raises InvalidValueError."""
    if name in OFF and value == -1:
        return OFF[name]
    try:
        return check_option(option, value)
    except InvalidValueError as error:
        raise InvalidValueError(f"{name} must be {error.allowed}", name, error.allowed) from None


def convert_parameters(values: Json, type: type[T]) -> T:
    """The parameters as a struct, with the error codes of these APIs. Raises InvalidRequestError."""
    try:
        return convert(values, type)
    except MissingFieldError as error:
        raise InvalidValueError(str(error), str(error.param)) from None
    except UnknownFieldError as error:
        param = printable(error.param, MAX_PARAM)
        raise UnsupportedParameterError(f"there is no parameter {param}", param, "unknown_parameter") from None
