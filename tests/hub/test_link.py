from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from models.errors import (
    DatabaseUnavailableError,
    InvalidValueError,
    QueueFullError,
    ServerError,
    ServerUnavailableError,
)
from models.hub.link import Link
from models.hub.wire import FRAME_BYTES, Call, Hello, OnceEncoder, encode, frame_of, take_frames
from tests.support.links import FakeTransport, joined, joined_to_bytes

pytestmark = pytest.mark.anyio

HELLO = frame_of(encode(Hello(1, 4711)))


class Service:
    """Notes what it is asked for. `may_return` lets `wait` return."""

    def __init__(self) -> None:
        self.notes: asyncio.Queue[Any] = asyncio.Queue()
        self.may_return = asyncio.Event()
        self.error: BaseException = ServerError()

    def note(self, value: Any) -> None:
        self.notes.put_nowait(value)

    def note_numbered(self, numbers: list[int], value: str) -> None:
        self.notes.put_nowait((numbers, value))

    async def double(self, value: int) -> int:
        return 2 * value

    async def wait(self, value: int) -> int:
        self.note(f"wait {value}")
        try:
            await self.may_return.wait()
        except asyncio.CancelledError:
            self.note(f"cancelled {value}")
            raise
        return value

    def fail(self) -> None:
        raise self.error

    async def fail_later(self) -> None:
        raise self.error

    async def return_nonsense(self) -> int:
        return "nonsense"  # type: ignore[return-value]

    async def return_what_cannot_be_sent(self) -> Any:
        return object()

    def _private(self) -> None:
        self.note("private")

    async def heard(self, count: int) -> list[Any]:
        """The next notes."""
        return [await self.notes.get() for _ in range(count)]

    def rest(self) -> list[Any]:
        """All notes that were not taken yet."""
        return [self.notes.get_nowait() for _ in range(self.notes.qsize())]


class Stranger:
    """Calls methods that a `Service` does not have."""

    def unknown(self) -> None: ...

    def _private(self) -> None: ...


@pytest.fixture
def service() -> Service:
    return Service()


# Calls


async def test_a_call_returns_what_the_method_returns(service: Service) -> None:
    async with joined(service) as (link, _):
        assert await link.call(Service.double, 21) == 42


async def test_each_side_can_call_the_other(service: Service) -> None:
    other = Service()
    async with joined(service, other) as (link, back):
        link.tell(Service.note, "there")
        back.tell(Service.note, "and back")
        assert (await service.heard(1), await other.heard(1)) == (["there"], ["and back"])


async def test_calls_arrive_in_order(service: Service) -> None:
    async with joined(service) as (link, _):
        answers = list[asyncio.Future[None]]()
        for value in range(3):
            link.tell(Service.note, value)
            answers.append(link.start(Service.note, value + 0.5))
        await asyncio.gather(*answers)
        assert service.rest() == [0, 0.5, 1, 1.5, 2, 2.5]


async def test_coroutine_methods_begin_in_the_order_of_their_calls(service: Service) -> None:
    async with joined(service) as (link, _):
        calls = [asyncio.create_task(link.call(Service.wait, value)) for value in range(3)]
        assert await service.heard(3) == ["wait 0", "wait 1", "wait 2"]
        service.may_return.set()
        assert await asyncio.gather(*calls) == [0, 1, 2]


async def test_answers_come_in_the_order_of_the_ends_not_of_the_calls(service: Service) -> None:
    async with joined(service) as (link, _):
        waiting = asyncio.create_task(link.call(Service.wait, 1))
        assert await service.heard(1) == ["wait 1"]
        assert await link.call(Service.double, 2) == 4
        assert not waiting.done()
        service.may_return.set()
        assert await waiting == 1


async def test_what_is_sent_in_one_turn_leaves_in_one_write_after_the_hello(service: Service) -> None:
    transport, link = FakeTransport(), Link(lambda _: service)
    link.connection_made(transport)
    for value in range(3):
        link.tell(Service.note, value)
    await asyncio.sleep(0)
    assert len(transport.writes) == 1
    assert [type(frame) for frame in transport.frames()] == [Hello, Call, Call, Call]


async def test_what_is_called_before_the_connection_is_there_comes_after_the_hello(service: Service) -> None:
    transport, link = FakeTransport(), Link(lambda _: service)
    link.tell(Service.note, 1)
    await asyncio.sleep(0)
    link.connection_made(transport)
    await asyncio.sleep(0)
    assert [type(frame) for frame in transport.frames()] == [Hello, Call]


async def test_what_was_sent_before_a_close_arrives(service: Service) -> None:
    async with joined(service) as (link, other):
        link.tell(Service.note, 1)
        link.close()
        await other.lost.wait()
        assert service.rest() == [1]


async def test_all_calls_of_the_other_side_can_be_waited_for(service: Service) -> None:
    async with joined(service) as (link, other):
        calling = asyncio.create_task(link.call(Service.wait, 1))
        await service.heard(1)
        waiting = asyncio.create_task(other.wait_answered())
        await asyncio.sleep(0)
        assert not waiting.done()
        service.may_return.set()
        await waiting
        assert await calling == 1
        await other.wait_answered()


# Errors


@pytest.mark.parametrize("later", [False, True], ids=["plain method", "coroutine method"])
async def test_an_error_of_ours_is_raised_with_its_attributes(service: Service, later: bool) -> None:
    service.error = QueueFullError("full", 7)
    async with joined(service) as (link, _):
        with pytest.raises(QueueFullError, match="full") as caught:
            await (link.call(Service.fail_later) if later else link.start(Service.fail))
    assert caught.value.retry_after == 7


@pytest.mark.parametrize(
    "error", [OSError("no server"), OperationalError("SELECT 1", None, Exception("locked"))], ids=["OS", "SQLAlchemy"]
)
async def test_an_error_of_the_database_is_raised_as_ours_and_logged(
    service: Service, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    service.error = error
    async with joined(service) as (link, _):
        with pytest.raises(DatabaseUnavailableError):
            await link.call(Service.fail_later)
    assert "cannot be used" in caplog.text


@pytest.mark.parametrize("later", [False, True], ids=["plain method", "coroutine method"])
async def test_a_bug_is_a_server_error_and_logged(
    service: Service, later: bool, caplog: pytest.LogCaptureFixture
) -> None:
    service.error = KeyError("a bug")
    async with joined(service) as (link, _):
        with pytest.raises(ServerError) as caught:
            await (link.call(Service.fail_later) if later else link.start(Service.fail))
        assert (type(caught.value), await link.call(Service.double, 1)) == (ServerError, 2)
    assert "KeyError: 'a bug'" in caplog.text


async def test_a_bug_in_a_call_without_an_answer_is_logged(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    service.error = KeyError("a bug")
    async with joined(service) as (link, _):
        link.tell(Service.fail)
        assert await link.call(Service.double, 1) == 2
    assert "KeyError: 'a bug'" in caplog.text


async def test_an_error_that_cannot_be_sent_is_a_server_error(service: Service) -> None:
    service.error = QueueFullError("half \ud83d")
    async with joined(service) as (link, _):
        with pytest.raises(ServerError):
            await link.start(Service.fail)
        assert await link.call(Service.double, 1) == 2


async def test_a_result_that_cannot_be_sent_is_a_server_error(service: Service) -> None:
    async with joined(service) as (link, _):
        with pytest.raises(ServerError):
            await link.call(Service.return_what_cannot_be_sent)
        assert await link.call(Service.double, 1) == 2


async def test_a_result_that_cannot_be_read_fails_only_its_call(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    async with joined(service) as (link, _):
        with pytest.raises(ServerError):
            await link.call(Service.return_nonsense)
        assert await link.call(Service.double, 1) == 2
    assert "return_nonsense cannot be read" in caplog.text


async def test_arguments_that_cannot_be_read_fail_only_their_call(service: Service) -> None:
    async with joined(service) as (link, _):
        with pytest.raises(ServerError):
            await link.call(Service.double, "nonsense")  # type: ignore[arg-type]
        assert await link.call(Service.double, 1) == 2


def nested(depth: int) -> list[Any]:
    """A list in a list, and so on."""
    value = list[Any]()
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [2**64, "half \ud83d", nested(100_000)], ids=["65 bits", "surrogate", "too deep"])
async def test_what_cannot_be_sent_is_a_clear_error_and_the_link_goes_on(service: Service, value: Any) -> None:
    async with joined(service) as (link, _):
        with pytest.raises(InvalidValueError, match="64 bits"):
            await link.start(Service.note, value)
        assert await link.call(Service.double, 1) == 2
        assert service.rest() == []


# Calls that end early


async def test_a_cancelled_call_cancels_the_method(service: Service) -> None:
    async with joined(service) as (link, _):
        calling = asyncio.create_task(link.call(Service.wait, 1))
        await service.heard(1)
        calling.cancel()
        assert await service.heard(1) == ["cancelled 1"]
        assert await link.call(Service.double, 1) == 2


async def test_a_call_that_is_cancelled_before_the_method_begins_does_nothing(service: Service) -> None:
    async with joined(service) as (link, _):
        calling = asyncio.create_task(link.call(Service.wait, 1))
        await asyncio.sleep(0)  # it is about to be sent
        calling.cancel()
        await asyncio.wait([calling])
        assert await link.call(Service.double, 1) == 2
        assert service.rest() == []


async def test_an_answer_that_crosses_the_cancellation_is_dropped(service: Service) -> None:
    async with joined(service) as (link, _):
        calling = asyncio.create_task(link.call(Service.wait, 1))
        await service.heard(1)
        service.may_return.set()
        calling.cancel()
        await asyncio.wait([calling])
        assert await link.call(Service.double, 1) == 2
        assert calling.cancelled()


async def test_a_method_that_is_cancelled_by_others_fails_its_call(service: Service) -> None:
    service.error = asyncio.CancelledError()
    async with joined(service) as (link, _):
        with pytest.raises(ServerUnavailableError):
            await link.call(Service.fail_later)


async def test_calls_that_wait_fail_when_the_other_side_is_lost(service: Service) -> None:
    async with joined(service) as (link, other):
        calling = asyncio.create_task(link.call(Service.wait, 1))
        await service.heard(1)
        started = link.start(Service.note, 2)
        other.close()
        await link.lost.wait()
        with pytest.raises(ServerUnavailableError):
            await calling
        with pytest.raises(ServerUnavailableError):
            await started
        service.may_return.set()
        await other.wait_answered()


async def test_what_is_called_after_the_loss_fails_or_is_dropped(service: Service) -> None:
    async with joined(service) as (link, other):
        other.close()
        await link.lost.wait()
        with pytest.raises(ServerUnavailableError):
            await link.call(Service.double, 1)
        with pytest.raises(ServerUnavailableError):
            link.start(Service.note, 1)
        with pytest.raises(ServerUnavailableError):
            link.tell(Service.note, 1)
        link.try_tell(Service.note, 1)
        link.tell_numbered(Service.note_numbered, 1, "a", encode)


async def test_the_loss_is_told_once(service: Service) -> None:
    lost = list[Link]()
    async with joined(service, on_lost=lost.append) as (link, other):
        other.close()
        await link.lost.wait()
        await other.lost.wait()
    assert sorted(map(id, lost)) == sorted(map(id, (link, other)))


# One value for many numbers


class CountingEncoder(OnceEncoder):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def encode(self, value: object) -> bytes:
        self.asked += 1
        return super().encode(value)


async def test_calls_with_one_value_in_a_row_become_one_call(service: Service) -> None:
    encoder, first, second = CountingEncoder(), "a", "b"
    async with joined(service) as (link, _):
        for number in (1, 2, 3):
            link.tell_numbered(Service.note_numbered, number, first, encoder.encode)
        link.tell_numbered(Service.note_numbered, 1, second, encoder.encode)
        assert await service.heard(2) == [([1, 2, 3], "a"), ([1], "b")]
    assert encoder.asked == 2


async def test_a_numbered_call_keeps_its_place_among_other_calls(service: Service) -> None:
    async with joined(service) as (link, _):
        link.tell_numbered(Service.note_numbered, 1, "a", encode)
        link.tell(Service.note, "between")
        link.tell_numbered(Service.note_numbered, 2, "a", encode)
        assert await service.heard(3) == [([1], "a"), "between", ([2], "a")]


async def test_a_numbered_call_has_the_value_as_it_was(service: Service) -> None:
    growing = [1]
    async with joined(service) as (link, _):
        link.tell_numbered(Service.note_numbered, 1, growing, lambda value: encode(str(value)))  # type: ignore[arg-type]
        growing.append(2)
        assert await service.heard(1) == [([1], "[1]")]


async def test_several_links_send_the_same_encoding() -> None:
    encoder, value = OnceEncoder(), "a long value"
    transports = [FakeTransport(), FakeTransport()]
    for transport in transports:
        link = Link(lambda _: None)
        link.connection_made(transport)
        link.tell_numbered(Service.note_numbered, 1, value, encoder.encode)
    assert encoder.encode(value) is encoder.encode(value)
    await asyncio.sleep(0)
    assert transports[0].writes == transports[1].writes
    assert encode(value) in transports[0].writes[0]


# A side that goes wrong


async def test_a_side_that_does_not_read_is_disconnected(caplog: pytest.LogCaptureFixture) -> None:
    async with joined_to_bytes(unread=2**20) as (link, _, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        text = "x" * 2**18
        while not link.lost.is_set():
            link.try_tell(Service.note, text)
            await asyncio.sleep(0)
    assert "does not read" in caplog.text


async def test_one_long_frame_does_not_count_as_unread(service: Service) -> None:
    async with joined(service, unread=1000) as (link, _):
        await link.start(Service.note, "x" * 2**21)
        assert len((await service.heard(1))[0]) == 2**21


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(frame_of(encode([1, 0, "note", [1]])), id="no hello first"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="another protocol"),
        pytest.param((FRAME_BYTES + 1).to_bytes(4, "big"), id="too long"),
        pytest.param(HELLO + frame_of(b"\xc1"), id="garbage"),
        pytest.param(HELLO + frame_of(encode([1] * 9)), id="no frame of ours"),
    ],
)
async def test_a_side_that_sends_what_cannot_be_read_is_disconnected(
    service: Service, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with joined_to_bytes(service) as (link, _, writer):
        writer.write(data)
        await link.lost.wait()
    assert "cannot be read" in caplog.text
    assert service.rest() == []


@pytest.mark.parametrize("method", [Stranger.unknown, Stranger._private])
async def test_a_side_that_calls_what_there_is_not_is_disconnected(service: Service, method: Any) -> None:
    async with joined(service) as (link, _):
        with pytest.raises(ServerUnavailableError):
            await link.start(method)
        assert service.rest() == []


# A side that must be trusted first


async def test_a_stranger_may_send_only_short_frames(service: Service) -> None:
    async with joined(service, longest=200) as (link, _):
        await link.start(Service.note, "x" * 100)
        with pytest.raises(ServerUnavailableError):
            await link.start(Service.note, "x" * 200)
        assert service.rest() == ["x" * 100]


async def test_a_trusted_side_calls_another_service_with_long_frames(service: Service) -> None:
    door = Service()
    async with joined(door, longest=200) as (link, other):
        await link.start(Service.note, "knock")
        other.trust(service)
        await link.start(Service.note, "x" * 1000)
        assert (door.rest(), service.rest()) == (["knock"], ["x" * 1000])


async def test_an_aborted_connection_is_lost_although_much_is_unsent() -> None:
    async with joined_to_bytes() as (link, _, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        link.tell(Service.note, "x" * 2**24)
        await asyncio.sleep(0)
        link.abort()
        await link.lost.wait()


async def test_whole_frames_before_garbage_still_count(service: Service) -> None:
    async with joined(service) as (link, _):
        link.tell(Service.note, 1)
        link.tell(Stranger.unknown)
        await link.lost.wait()
        assert service.rest() == [1]


async def test_frames_that_come_byte_by_byte_are_understood(service: Service) -> None:
    async with joined_to_bytes(service) as (_, _, writer):
        transport = FakeTransport()
        caller = Link(lambda _: None)
        caller.connection_made(transport)
        caller.tell(Service.note, "slowly")
        await asyncio.sleep(0)
        for byte in transport.writes[0]:
            writer.write(bytes([byte]))
            await writer.drain()
        assert await service.heard(1) == ["slowly"]


async def test_a_hello_names_the_process_and_the_version() -> None:
    async with joined_to_bytes(version=7) as (_, reader, _):
        data = bytearray(await reader.read(100))
        (hello,) = take_frames(data)
        assert isinstance(hello, Hello)
        assert hello.version == 7


async def test_another_version_is_refused_by_its_process_and_not_listened_to(service: Service) -> None:
    async with joined_to_bytes(service, version=2) as (link, _, writer):
        writer.write(HELLO + frame_of(encode([1, 0, "note", [1]])))
        with pytest.raises(ServerUnavailableError, match="process 4711 runs another version"):
            await link.wait_greeted()
        await link.lost.wait()
    assert service.rest() == []


async def test_a_side_that_is_lost_before_its_hello_is_an_error() -> None:
    async with joined_to_bytes() as (link, _, writer):
        writer.close()
        with pytest.raises(ServerUnavailableError):
            await link.wait_greeted()
