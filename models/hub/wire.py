"""The frames between two processes of a server: MessagePack, each behind its length in 4 bytes."""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Iterator
from functools import cache
from types import GenericAlias
from typing import Any, NamedTuple, get_type_hints

from msgspec import Raw, Struct
from msgspec.msgpack import Decoder, Encoder

from models.errors import APIError, ServerError

VERSION = 2  # of the frames and of all types in them: other versions are refused
FRAME_BYTES = 2**30  # of one frame: a long reply with all its probabilities has some hundred MiB

_LENGTH = struct.Struct(">I")


class Hello(Struct, frozen=True, array_like=True, tag=0):
    """The first frame, in each direction. Its form is the same in all versions."""

    version: int
    pid: int


class Call(Struct, frozen=True, array_like=True, tag=1):
    """Calls a method. A call with the id 0 wants no answer."""

    id: int
    method: str
    arguments: Raw


class Result(Struct, frozen=True, array_like=True, tag=2):
    """What a call has returned."""

    id: int
    value: Raw


class Failure(Struct, frozen=True, array_like=True, tag=3):
    """The error that a call has raised."""

    id: int
    error: APIError


class Cancel(Struct, frozen=True, array_like=True, tag=4):
    """Nobody waits for the answer of a call any more."""

    id: int


Frame = Hello | Call | Result | Failure | Cancel


class Signature(NamedTuple):
    """Decoders for the arguments and the result of a method, and whether it is a coroutine function."""

    arguments: Decoder[tuple[Any, ...]]
    result: Decoder[Any]
    is_coroutine: bool


@cache
def signature_of(method: Callable[..., Any]) -> Signature:
    """How the arguments and the result of a method are decoded, from its type hints."""
    hints = get_type_hints(method)
    result = hints.pop("return")
    arguments = GenericAlias(tuple, tuple(hints.values()))
    return Signature(_decoder(arguments), _decoder(result), inspect.iscoroutinefunction(method))


def encode_error(value: Any) -> Any:
    """What msgspec sends for an APIError: its class, its message and its attributes."""
    if isinstance(value, APIError):
        return type(value).__name__, str(value), vars(value)
    raise NotImplementedError(f"{type(value).__name__} cannot be sent to another process")


def decode_error(kind: type, value: Any) -> Any:
    """The APIError of what `encode_error` has sent."""
    if not issubclass(kind, APIError):
        raise NotImplementedError(f"{kind.__name__} cannot come from another process")
    name, message, attributes = value
    error = APIError.__new__(_classes()[name])
    Exception.__init__(error, message)
    vars(error).update(attributes)
    return error


encode = Encoder(enc_hook=encode_error).encode


def encode_failure(id: int, error: APIError) -> bytes:
    """A `Failure`; with a plain ServerError if the error has something that cannot be sent."""
    try:
        return encode(Failure(id, error))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return encode(Failure(id, ServerError()))


class OnceEncoder:
    """Encodes a value once, however often it is asked for in a row."""

    def __init__(self) -> None:
        self._value: object = None
        self._encoded = b""

    def encode(self, value: object) -> bytes:
        """The encoded value."""
        if value is not self._value:
            self._value, self._encoded = value, encode(value)
        return self._encoded


def frame_of(body: bytes) -> bytes:
    """A frame, of its body."""
    return _LENGTH.pack(len(body)) + body


def take_frames(data: bytearray, longest: Callable[[], int] = lambda: FRAME_BYTES) -> Iterator[Frame]:
    """Take all whole frames from the beginning of `data`; `longest` is how many bytes one may have.

    Raises ValueError or msgspec's errors if they are none.
    """
    start = 0
    try:
        while len(data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, start)
            if length > longest():
                raise ValueError(f"a frame of {length} bytes is too long")
            end = start + _LENGTH.size + length
            if len(data) < end:
                return
            with memoryview(data) as view:
                body = bytes(view[start + _LENGTH.size : end])
            start = end
            yield _decode(body)
    finally:
        del data[:start]


@cache
def _classes() -> dict[str, type[APIError]]:
    """All classes of APIErrors, by name."""
    classes, found = [APIError], dict[str, type[APIError]]()
    while classes:
        one = classes.pop()
        found[one.__name__] = one
        classes += one.__subclasses__()
    return found


def _decoder(type: Any) -> Decoder[Any]:
    return Decoder(type, dec_hook=decode_error)


_decode: Callable[[bytes], Frame] = _decoder(Frame).decode
