"""Checks data from outside against msgspec types, and says in one line what is wrong and where.

A type says what is allowed in two ways: constraints for msgspec, and a description for people, as in
`Annotated[float, Meta(ge=0, le=2, description="a number from 0 to 2")]`. An error names the nearest type that has a
description. With `extra={"report_object": True}`, missing and unknown fields are reported for the whole object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
from msgspec import Meta, inspect

from models.errors import InvalidJSONError, InvalidRequestError, InvalidValueError, MissingFieldError, UnknownFieldError

T = TypeVar("T")
Json = dict[str, Any]

SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
NO_SURROGATE = r"\A[^\ud800-\udfff]*\Z"  # JSON can have a lone surrogate, which cannot be sent or stored as UTF-8

MAX_DEPTH = 100  # of lists and objects in each other: what is stored and sent again must not run out of stack
BYTES_PER_PART = 16  # of JSON, for each list or object in it: schemas have more, and an empty list takes 60 in memory
MAX_COPIED = 10_000  # values in a value with a lone surrogate

ERROR = re.compile(  # of msgspec; names and values from clients may look like the end of its message
    r"(?P<reason>Object (?P<kind>missing required|contains unknown) field `(?P<field>.*?)`|.*?)"
    r"(?: - at (?:`key` in )?`\$(?P<path>[^`]*)`)?",
    re.DOTALL,
)

Text = Annotated[str, Meta(pattern=NO_SURROGATE, description="text")]


def parse_object(data: str | bytes, what: str) -> Json:
    """The JSON object in `data`, which error messages call `what`. Raises InvalidJSONError."""
    try:
        text = data if isinstance(data, str) else data.decode()
        # msgspec fails at a field name with a lone surrogate, which only an escape can have. Most requests have none.
        hook = _with_encodable_names if SURROGATE_ESCAPE.search(text) else None
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=hook)
    except RecursionError:
        raise InvalidJSONError(f"{what} is nested too deeply") from None
    except ValueError as error:  # bad JSON, bad UTF-8, a number with thousands of digits
        raise InvalidJSONError(f"{what} is not JSON: {printable(error)}") from None
    if not isinstance(value, dict):
        raise InvalidJSONError(f"{what} is not a JSON object")
    return value


def _with_encodable_names(fields: list[tuple[str, Any]]) -> Json:
    return {_encodable(name): value for name, value in fields}


def _encodable(text: str) -> str:
    """The text with "?" instead of lone surrogates."""
    return text.encode(errors="replace").decode()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def printable(words: object, limit: int = 200) -> str:
    """A client's words, shortened and made safe to send back."""
    try:
        return _encodable(str(words))[:limit]
    except RecursionError:  # lists in lists, as deep as JSON can have them
        return "nested too deeply"


def convert(value: Any, type: type[T], at: str = "") -> T:
    """The value as an object of a msgspec type; `at` is the parameter name of the value.

    Raises InvalidValueError, MissingFieldError or UnknownFieldError, whose `param` is the path of the wrong part.
    """
    try:
        return _convert(value, type)
    except RecursionError:
        raise InvalidValueError(f"{at or 'it'} is nested too deeply", at) from None
    except msgspec.ValidationError as error:
        raise _explained(str(error), type, at) from None


def check_json(value: Any, at: str, max_bytes: int) -> None:
    """Check JSON of any form, such as a schema: its size, its parts, and that all text in it is Unicode.

    `at` is the parameter name of the value. Raises InvalidValueError.
    """
    _check_parts(value, at, max_bytes // BYTES_PER_PART)
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except UnicodeEncodeError:
        raise InvalidValueError(f"{at} has a lone surrogate", at) from None
    except ValueError:
        raise InvalidValueError(f"{at} has a number that is too large", at) from None
    if size > max_bytes:
        raise InvalidValueError(f"{at} must have at most {max_bytes} bytes", at)


def _check_parts(value: Any, at: str, limit: int) -> None:
    """Raise InvalidValueError for over MAX_DEPTH lists and objects in each other, or over `limit` of them in all."""
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        inside = (child for one in level for child in (one.values() if isinstance(one, dict) else one))
        level = [child for child in inside if isinstance(child, dict | list)]
        limit -= len(level)
        if limit < 0:
            raise InvalidValueError(f"{at} has too many lists and objects", at)
        if not level:
            return
    raise InvalidValueError(f"{at} is nested too deeply", at)


def describe_allowed(type: Any, field: str) -> str:
    """The allowed values of a field of a msgspec type, in words."""
    return _description(_child(inspect.type_info(type), field)) or "something else"


def _convert(value: Any, type: type[T]) -> T:
    """The value as an object of a type. Works around msgspec, which fails if it has to encode a lone surrogate."""
    with suppress(UnicodeEncodeError):
        return msgspec.convert(value, type)
    if sum(1 for _ in islice(_values_in(value), MAX_COPIED)) == MAX_COPIED:  # to copy so much would take too long
        raise InvalidValueError("a text has a lone surrogate", "")
    return msgspec.convert(_without_surrogates(value), type)  # raises: text is in a place where no text is allowed


def _values_in(value: Any) -> Iterator[Any]:
    """A value and all values in it, however deep."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        yield one
        if isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, dict):
            waiting += one.values()


def _without_surrogates(value: Any) -> Any:
    """The value with "?" instead of lone surrogates, in texts and in field names."""
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, list | tuple):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(item) for name, item in value.items()}
    return value


def _explained(error: str, type: Any, at: str) -> InvalidRequestError:
    """The error for people, made from msgspec's message and the nearest description."""
    parts = ERROR.fullmatch(error)
    assert parts
    here = inspect.type_info(type)
    param, described = at, here
    for step in re.findall(r"\.\w+|\[\d+\]", parts["path"] or ""):
        here, at = _child(here, step.lstrip(".")), f"{at}{step}".lstrip(".")
        if _description(here):
            param, described = at, here
    if parts["field"] is not None and not _reports_object(here):
        field = printable(f"{at}.{parts['field']}" if at else parts["field"])
        if parts["kind"] == "missing required":
            return MissingFieldError(f"{field} is missing", field)
        return UnknownFieldError(f"{field} is not known here", field)
    allowed = _description(described) or parts["reason"]
    return InvalidValueError(f"{param or 'it'} must be {allowed}", param, allowed)


def _description(type: inspect.Type) -> str:
    """The description of a type, or of the first part of a union that has one."""
    if isinstance(type, inspect.Metadata):
        return str((type.extra_json_schema or {}).get("description") or _description(type.type))
    parts = type.types if isinstance(type, inspect.UnionType) else ()
    return next(filter(None, map(_description, parts)), "")


def _reports_object(type: inspect.Type) -> bool:
    return isinstance(type, inspect.Metadata) and bool((type.extra or {}).get("report_object"))


def _child(type: inspect.Type, step: str) -> inspect.Type:
    """The type of a field, or of the items of an array."""
    for part in _parts(type):
        if isinstance(part, inspect.ListType | inspect.VarTupleType) and step.startswith("["):
            return part.item_type
    return next((field.type for field in _fields(type) if field.encode_name == step), inspect.AnyType())


def _fields(type: inspect.Type) -> Iterator[inspect.Field]:
    for part in _parts(type):
        if isinstance(part, inspect.StructType):
            yield from part.fields


def _parts(type: inspect.Type) -> Iterator[inspect.Type]:
    """The members of a union, or the type itself; without descriptions."""
    if isinstance(type, inspect.Metadata):
        yield from _parts(type.type)
    elif isinstance(type, inspect.UnionType):
        for member in type.types:
            yield from _parts(member)
    else:
        yield type
