"""A connection to another process of the server, on which each side calls methods of the other."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from msgspec import Raw

from models.errors import (
    APIError,
    DatabaseUnavailableError,
    InvalidValueError,
    ServerError,
    ServerUnavailableError,
    one_line,
)
from models.hub.wire import (
    FRAME_BYTES,
    VERSION,
    Call,
    Cancel,
    Failure,
    Frame,
    Hello,
    Result,
    encode,
    encode_failure,
    frame_of,
    signature_of,
    take_frames,
)
from models.store.database import DATABASE_ERRORS

logger = logging.getLogger("parley")

UNREAD_BYTES = FRAME_BYTES  # that may wait for the other side to read them; with more, it counts as stuck

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """A call for some numbers with the same value, which is encoded already."""

    method: str
    numbers: list[int]
    value: object
    encoded: bytes


class Link(asyncio.Protocol):
    """One side of a connection. The public methods of `service` are what the other side may call.

    Calls arrive in order. A plain method runs at once, a coroutine method in a task of its own. What is sent in one
    turn of the event loop leaves in one write. A side that does not read is disconnected.
    """

    def __init__(
        self,
        service: Callable[[Link], object],
        on_lost: Callable[[Link], None] | None = None,
        version: int = VERSION,
        unread: int = UNREAD_BYTES,
        longest: int = FRAME_BYTES,
    ) -> None:
        self.lost = asyncio.Event()
        self.peer: Hello | None = None  # what the other side has said first
        self._version = version
        self._unread = unread
        self._longest = longest  # bytes of a frame of the other side
        self._loop = asyncio.get_running_loop()
        self._greeted = asyncio.Event()  # or lost
        self._service = service(self)
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._incoming = bytearray()
        self._outgoing = [frame_of(encode(Hello(version, os.getpid())))]
        self._group: Group | None = None  # the last call, if more numbers may come to it
        self._flushing = False  # soon
        self._answers: dict[int, tuple[Callable[..., Any], asyncio.Future[Any]]] = {}  # that are waited for
        self._tasks: dict[int, asyncio.Task[None]] = {}  # calls of the other side that run
        self._last = 0  # the number of the last call

    # Calls

    async def call(self, method: Callable[Concatenate[S, P], Awaitable[T]], *arguments: P.args, **named: P.kwargs) -> T:
        """Call a coroutine method of the other side, by position.

        Raises its APIError, or ServerUnavailableError if the other side is gone.
        """
        return cast(T, await self._start(method, arguments, named))

    def start(
        self, method: Callable[Concatenate[S, P], None], *arguments: P.args, **named: P.kwargs
    ) -> asyncio.Future[None]:
        """Call a plain method of the other side, by position; the future gets its errors. Raises like `call`."""
        return self._start(method, arguments, named)

    def tell(self, method: Callable[Concatenate[S, P], None], *arguments: P.args, **named: P.kwargs) -> None:
        """Call a plain method of the other side, by position; it must not fail. Raises like `call`."""
        assert not named
        self._send_call(0, method, arguments)

    def try_tell(self, method: Callable[Concatenate[S, P], None], *arguments: P.args, **named: P.kwargs) -> None:
        """Like `tell`, but says nothing if the other side is gone."""
        with suppress(ServerUnavailableError):
            self.tell(method, *arguments, **named)

    def tell_numbered(
        self, method: Callable[[S, list[int], T], None], number: int, value: T, encoded: Callable[[T], bytes]
    ) -> None:
        """Call a plain method with a list of numbers and a value. Such calls in a row with one value become one call.

        Says nothing if the other side is gone.
        """
        if self._group and self._group.value is value:
            self._group.numbers.append(number)
        elif not self.lost.is_set():
            self._end_group()
            self._group = Group(method.__name__, [number], value, encoded(value))
            self._flush_soon()

    async def wait_greeted(self) -> None:
        """Wait until the other side has said hello. Raises ServerUnavailableError if it does not, in our version."""
        await self._greeted.wait()
        if self.peer is None:
            raise ServerUnavailableError
        if self.peer.version != self._version:
            self.close()
            raise ServerUnavailableError(f"process {self.peer.pid} runs another version of Parley: restart the server")

    async def wait_answered(self) -> None:
        """Wait until all calls of the other side are answered."""
        if tasks := [*self._tasks.values()]:
            await asyncio.wait(tasks)

    def trust(self, service: object) -> None:
        """Let the other side call this from now on, and send frames of any length."""
        self._service, self._longest = service, FRAME_BYTES

    def close(self) -> None:
        """End the connection, after everything that was sent."""
        if self._transport:
            self._flush()
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport:
            self._transport.abort()

    def _start(
        self, method: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> asyncio.Future[Any]:
        assert not named
        self._last += 1
        id = self._last
        self._send_call(id, method, arguments)
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._answers[id] = method, answer
        answer.add_done_callback(partial(self._forget, id))
        return answer

    def _forget(self, id: int, answer: asyncio.Future[Any]) -> None:
        del self._answers[id]
        if answer.cancelled() and not self.lost.is_set():
            self._send(encode(Cancel(id)))

    def _send_call(self, id: int, method: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self.lost.is_set():
            raise ServerUnavailableError
        try:
            self._send(encode(Call(id, method.__name__, Raw(encode(arguments)))))
        except (OverflowError, RecursionError, UnicodeEncodeError) as error:
            told = "the request has a whole number of more than 64 bits, a text that is no Unicode, or is too deep"
            raise InvalidValueError(told, "") from error

    def _send(self, body: bytes) -> None:
        self._end_group()
        self._flush_soon()
        self._outgoing.append(frame_of(body))

    def _end_group(self) -> None:
        if group := self._group:
            self._group = None
            arguments = encode((group.numbers, Raw(group.encoded)))
            self._outgoing.append(frame_of(encode(Call(0, group.method, Raw(arguments)))))

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._end_group()
        if self._transport is None:  # `connection_made` comes soon
            return
        frames, self._outgoing = self._outgoing, []
        if not frames or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() > self._unread:
            logger.error("process %s does not read: its connection is closed", self.peer and self.peer.pid)
            return self._transport.abort()
        self._transport.write(b"".join(frames))

    # Frames of the other side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello."""
        self._transport = cast(asyncio.Transport, transport)
        self._flush_soon()

    def data_received(self, data: bytes) -> None:
        """Act on all frames that are whole."""
        self._incoming += data
        try:
            for frame in take_frames(self._incoming, lambda: self._longest):
                self._act(frame)
        except Exception:
            logger.exception("process %s sends what cannot be read", self.peer and self.peer.pid)
            if self._transport:
                self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Fail all calls that wait for an answer. What the other side has called goes on."""
        self.lost.set()
        self._greeted.set()
        for _, answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ServerUnavailableError())
        if self._on_lost:
            self._on_lost(self)

    def _act(self, frame: Frame) -> None:
        if self.peer is None:
            if not isinstance(frame, Hello):
                raise ValueError("the first frame is no hello")
            self.peer = frame
            return self._greeted.set()
        if self.peer.version != self._version:
            return  # the frames may mean something else
        match frame:
            case Call(id, name, arguments):
                self._run(id, name, arguments)
            case Result(id, value) if id in self._answers:
                self._take_result(*self._answers[id], value)
            case Failure(id, error) if id in self._answers:
                _, answer = self._answers[id]
                if not answer.done():
                    answer.set_exception(error)
            case Cancel(id) if task := self._tasks.get(id):
                task.cancel()

    def _take_result(self, method: Callable[..., Any], answer: asyncio.Future[Any], value: Raw) -> None:
        if answer.done():
            return
        try:
            answer.set_result(signature_of(method).result.decode(value))
        except Exception:  # the database has something odd, say: the other calls go on
            logger.exception("the result of %s cannot be read", method.__name__)
            answer.set_exception(ServerError())

    def _run(self, id: int, name: str, encoded: Raw) -> None:
        method: Callable[..., Any] | None = None if name.startswith("_") else getattr(type(self._service), name, None)
        if method is None:
            raise ValueError(f"there is no method {name}")
        try:
            signature = signature_of(method)
            call = partial(method, self._service, *signature.arguments.decode(encoded))
            if signature.is_coroutine:
                task = self._loop.create_task(self._await(id, call))
                self._tasks[id] = task
                task.add_done_callback(lambda _: self._tasks.pop(id, None))
                return
            call()
            if id:
                self._answer(id, None)
        except Exception as error:
            self._fail(id, error)

    async def _await(self, id: int, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            self._answer(id, await call())
        except asyncio.CancelledError:  # perhaps not by the other side, which would wait for ever
            self._fail(id, ServerUnavailableError())
            raise
        except Exception as error:
            self._fail(id, error)

    def _answer(self, id: int, result: Any) -> None:
        body = encode(Result(id, Raw(encode(result))))
        if not self.lost.is_set():
            self._send(body)

    def _fail(self, id: int, error: Exception) -> None:
        if isinstance(error, DATABASE_ERRORS):
            logger.error("the database or a file cannot be used: %s", one_line(error))
            error = DatabaseUnavailableError()
        if not isinstance(error, APIError):
            logger.error("a call of another process failed", exc_info=error)
            error = ServerError()
        if id and not self.lost.is_set():
            self._send(encode_failure(id, error))
