"""What a client may ask of a reply, and the bounds of each wish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


class InvalidOption(ValueError):
    """An option that does not exist or has a value that is not allowed; `name` says which."""

    def __init__(self, name: str, allowed: str) -> None:
        super().__init__(f"{name} must be {allowed}")
        self.name = name
        self.allowed = allowed


@dataclass(frozen=True)
class Options:
    """How a reply is made. `temperature` 0 is greedy; `top_k` 0 is off; None leaves it to the context or to chance."""

    instructions: str | None = None
    temperature: float = 0.45
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.1
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    max_output_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def updated(self, changes: Mapping[str, Any]) -> Options:
        """These options with `changes`, values as JSON has them. Raises InvalidOption."""
        return replace(self, **{name: check(name, value) for name, value in changes.items()})

    def public(self) -> dict[str, Any]:
        """The options as JSON has them."""
        return asdict(self) | {"stop": list(self.stop)}

    def beyond(self, defaults: Options) -> dict[str, Any]:
        """Those of the options that differ from `defaults`, as JSON has them."""
        usual = defaults.public()
        return {name: value for name, value in self.public().items() if value != usual[name]}


def check(name: str, value: Any) -> Any:
    """The value of one option as `Options` holds it. Raises InvalidOption."""
    if name not in CHECKS:
        raise InvalidOption(name, f"left out; the options are {', '.join(CHECKS)}")
    allowed, convert = CHECKS[name]
    try:
        return convert(value)
    except (ValueError, OverflowError):
        raise InvalidOption(name, allowed) from None


def text(value: Any) -> str:
    """The value where it is a string that can be sent on as UTF-8. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError("not a string")
    value.encode()  # a lone surrogate, which JSON can spell, raises UnicodeEncodeError, a ValueError
    return value


def _number(low: float, high: float, *, low_included: bool = True) -> Callable[[Any], float]:
    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("not a number")
        if not low <= value <= high or (value == low and not low_included):
            raise ValueError("out of bounds")
        return float(value)

    return convert


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError("not a whole number in bounds")
        return value

    return convert


def _optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _stop(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, tuple | list) or len(strings) > 8:
        raise ValueError("not a string or up to 8")
    if not all(0 < len(text(string)) <= 256 for string in strings):
        raise ValueError("a string that is empty or too long")
    return tuple(strings)


CHECKS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "instructions": ("a string or null", _optional(text)),
    "temperature": ("a number from 0 to 2", _number(0, 2)),
    "top_p": ("a number above 0, 1 at most", _number(0, 1, low_included=False)),
    "top_k": ("a whole number, 0 or more", _whole(0, 2**31)),
    "repetition_penalty": ("a number above 0, 2 at most", _number(0, 2, low_included=False)),
    "frequency_penalty": ("a number from -2 to 2", _number(-2, 2)),
    "presence_penalty": ("a number from -2 to 2", _number(-2, 2)),
    "max_output_tokens": ("a whole number, 1 or more, or null", _optional(_whole(1, 2**31))),
    "stop": ("a string of 1 to 256 characters or a list of up to 8", _stop),
    "seed": ("a whole number from 0 to 2^63 - 1, or null", _optional(_whole(0, 2**63 - 1))),
}
