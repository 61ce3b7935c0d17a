from __future__ import annotations

import asyncio
from typing import Any

import pytest

from models.web.outbox import FEW_FRAMES, Outbox

pytestmark = pytest.mark.anyio

UNREAD = (1013, "the client does not read its frames")


class ClientGone(Exception):
    """What a WebSocket raises when its client has gone."""


class FakeWebSocket:
    """The client reads while `reading` is set.

    `received` has the texts that it read and the close; `texts` has the texts too, to be waited for. `sending` is set
    when a text is being sent.
    """

    def __init__(self, *, reads: bool = True, reads_close: bool = True, gone: bool = False) -> None:
        self.received: list[str | tuple[int, str | None]] = []
        self.texts: asyncio.Queue[str] = asyncio.Queue()
        self.sending, self.reading = asyncio.Event(), asyncio.Event()
        self.reads_close = reads_close
        self.gone = gone
        if reads:
            self.reading.set()

    async def send_text(self, data: str) -> None:
        self.sending.set()
        await self.reading.wait()
        if self.gone:
            raise ClientGone
        self.received.append(data)
        self.texts.put_nowait(data)

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        if not self.reads_close:
            await self.reading.wait()
        self.received.append((code, reason))


async def test_texts_arrive_in_order_and_then_the_close() -> None:
    websocket = FakeWebSocket()
    outbox = Outbox(websocket)
    for text in ("one", "two", "three"):
        outbox.send_text(text)
    outbox.close(4401, "invalid_credentials")
    assert await outbox.deliver()
    assert websocket.received == ["one", "two", "three", (4401, "invalid_credentials")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": 1, "b": [None, True]}, '{"a":1,"b":[null,true]}'),
        ({"delta": "广\n\u2028州"}, '{"delta":"广\\n\u2028州"}'),
    ],
    ids=["no spaces", "no escapes"],
)
async def test_a_value_is_sent_as_short_json(value: dict[str, Any], text: str) -> None:
    websocket = FakeWebSocket()
    outbox = Outbox(websocket)
    outbox.send_json(value)
    outbox.close(1000, "bye")
    assert await outbox.deliver()
    assert websocket.received[0] == text


async def test_nothing_is_sent_after_the_first_close() -> None:
    websocket = FakeWebSocket()
    outbox = Outbox(websocket)
    outbox.close(1008, "first")
    outbox.send_text("late")
    outbox.close(1011, "second")
    assert outbox.closing
    assert await outbox.deliver()
    assert websocket.received == [(1008, "first")]


async def test_sending_never_waits_for_the_client() -> None:
    websocket = FakeWebSocket(reads=False)
    outbox = Outbox(websocket)
    delivering = asyncio.create_task(outbox.deliver())
    outbox.send_text("one")
    await websocket.sending.wait()
    outbox.send_text("two")
    outbox.close(1000, "bye")
    websocket.reading.set()
    assert await delivering
    assert websocket.received == ["one", "two", (1000, "bye")]


async def test_an_outbox_is_drained_when_the_client_has_read_all() -> None:
    websocket = FakeWebSocket(reads=False)
    outbox = Outbox(websocket)
    await outbox.wait_sent()
    delivering = asyncio.create_task(outbox.deliver())
    outbox.send_text("one")
    outbox.send_text("two")
    draining = asyncio.create_task(outbox.wait_sent())
    await websocket.sending.wait()
    assert not draining.done()
    websocket.reading.set()
    await draining
    assert websocket.received == ["one", "two"]
    outbox.close(1000, "bye")
    assert await delivering


# Clients that do not read


@pytest.mark.parametrize("text", ["x" * 100, "州" * 34], ids=["ASCII", "Chinese"])
async def test_too_many_unread_bytes_close_the_connection(text: str) -> None:
    websocket = FakeWebSocket(reads=False)
    outbox = Outbox(websocket, unsent_bytes=100, seconds=3600)
    delivering = asyncio.create_task(outbox.deliver())
    outbox.send_text("first")
    await websocket.sending.wait()
    outbox.send_text(text)
    for _ in range(FEW_FRAMES + 1):
        outbox.send_text("and more")
    async with asyncio.timeout(10):  # else it would hang for the hour
        assert await delivering
    assert websocket.received == [UNREAD]
    assert outbox.closing


async def test_a_client_that_reads_gets_the_long_frames_at_the_end_of_a_reply() -> None:
    websocket = FakeWebSocket(reads=False)
    outbox = Outbox(websocket, unsent_bytes=100)
    delivering = asyncio.create_task(outbox.deliver())
    outbox.send_text("x" * 200)
    await websocket.sending.wait()
    for _ in range(3):
        outbox.send_text("x" * 200)
    websocket.reading.set()
    outbox.close(1000, "bye")
    assert await delivering
    assert websocket.received == [*["x" * 200] * 4, (1000, "bye")]


async def test_a_text_that_waits_too_long_closes_the_connection() -> None:
    websocket = FakeWebSocket(reads=False)
    outbox = Outbox(websocket, seconds=0)
    outbox.send_text("first")
    assert await outbox.deliver()
    assert websocket.received == [UNREAD]


async def test_nothing_is_sent_to_a_client_closed_as_unread() -> None:
    websocket = FakeWebSocket(reads=False)
    outbox = Outbox(websocket, unsent_bytes=10, seconds=0)
    outbox.send_text("first")
    await outbox.deliver()
    outbox.send_text("x" * 100)
    outbox.close(1012, "the server restarts")
    assert websocket.received == [UNREAD]


async def test_a_client_that_does_not_read_the_close_is_given_up() -> None:
    websocket = FakeWebSocket(reads=False, reads_close=False)
    outbox = Outbox(websocket, seconds=0)
    outbox.send_text("first")
    assert not await outbox.deliver()
    assert websocket.received == []


async def test_an_ordinary_close_that_is_not_read_is_given_up() -> None:
    websocket = FakeWebSocket(reads=False, reads_close=False)
    outbox = Outbox(websocket, seconds=0)
    outbox.close(1000, "bye")
    assert not await outbox.deliver()
    assert websocket.received == []


@pytest.mark.parametrize("seconds", [0, 30])
async def test_a_text_over_the_limit_reaches_a_client_that_reads(seconds: float) -> None:
    websocket = FakeWebSocket()
    outbox = Outbox(websocket, unsent_bytes=10, seconds=seconds)
    outbox.send_text("x" * 1000)
    outbox.close(1000, "bye")
    assert await outbox.deliver()
    assert websocket.received == ["x" * 1000, (1000, "bye")]


async def test_bytes_that_were_read_do_not_count() -> None:
    websocket = FakeWebSocket(reads=False)
    outbox = Outbox(websocket, unsent_bytes=10)
    delivering = asyncio.create_task(outbox.deliver())
    for _ in range(3):
        outbox.send_text("x" * 6)
        await websocket.sending.wait()
        outbox.send_text("y" * 4)
        websocket.reading.set()
        async with asyncio.timeout(10):  # else a closed client would be awaited for ever
            assert [await websocket.texts.get(), await websocket.texts.get()] == ["x" * 6, "y" * 4]
        websocket.sending.clear()
        websocket.reading.clear()
    outbox.close(1000, "bye")
    assert await delivering
    assert websocket.received[-1] == (1000, "bye")


@pytest.mark.parametrize("reads_close", [True, False])
async def test_an_outbox_is_unread_when_the_client_did_not_read(reads_close: bool) -> None:
    outbox = Outbox(FakeWebSocket(reads=False, reads_close=reads_close), seconds=0)
    outbox.send_text("hello")
    assert await outbox.deliver() == reads_close
    assert outbox.stalled


async def test_an_outbox_is_not_unread_when_the_client_read_or_left() -> None:
    outbox = Outbox(FakeWebSocket())
    assert not outbox.stalled
    outbox.send_text("hello")
    outbox.close(1000, "bye")
    assert await outbox.deliver()
    assert not outbox.stalled
    outbox = Outbox(FakeWebSocket(gone=True))
    outbox.send_text("hello")
    with pytest.raises(ClientGone):
        await outbox.deliver()
    assert not outbox.stalled


# Clients that have gone


async def test_the_error_of_a_client_that_has_gone_is_raised() -> None:
    outbox = Outbox(FakeWebSocket(gone=True))
    outbox.send_text("hello")
    with pytest.raises(ClientGone):
        await outbox.deliver()


async def test_sending_to_a_client_that_has_gone_does_nothing() -> None:
    websocket = FakeWebSocket(gone=True)
    outbox = Outbox(websocket, unsent_bytes=10)
    outbox.send_text("hello")
    with pytest.raises(ClientGone):
        await outbox.deliver()
    outbox.send_text("x" * 100)
    assert websocket.received == []


async def test_delivering_can_be_cancelled() -> None:
    websocket = FakeWebSocket(reads=False)
    outbox = Outbox(websocket)
    delivering = asyncio.create_task(outbox.deliver())
    outbox.send_text("hello")
    await websocket.sending.wait()
    delivering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await delivering
    assert websocket.received == []
