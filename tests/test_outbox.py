from __future__ import annotations

import asyncio

import pytest

from models.outbox import Outbox

pytestmark = pytest.mark.anyio


class Left(Exception):
    """What a WebSocket raises once its client has gone."""


class FakeClient:
    """Keeps what it reads, while it reads; `began` is set when a text is sent to it, `arrived` has those it read."""

    def __init__(self, *, reads: bool = True, answers_close: bool = True) -> None:
        self.got: list[str | tuple[int, str | None]] = []
        self.began = asyncio.Event()
        self.reading = asyncio.Event()
        self.arrived: asyncio.Queue[str] = asyncio.Queue()
        self.answers_close = answers_close
        self.left = False
        if reads:
            self.reading.set()

    async def send_text(self, data: str) -> None:
        self.began.set()
        await self.reading.wait()
        if self.left:
            raise Left
        self.got.append(data)
        self.arrived.put_nowait(data)

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        if not self.answers_close:
            await self.reading.wait()
        self.got.append((code, reason))


NOT_READ = (1013, "what is sent to you is not read")


async def test_texts_arrive_in_order_and_the_close_after_them() -> None:
    client = FakeClient()
    outbox = Outbox(client)
    for text in ("one", "two", "three"):
        outbox.put(text)
    outbox.close(4401, "invalid_credentials")
    assert await outbox.deliver()
    assert client.got == ["one", "two", "three", (4401, "invalid_credentials")]


async def test_nothing_goes_out_after_the_first_close() -> None:
    client = FakeClient()
    outbox = Outbox(client)
    outbox.close(1008, "first")
    outbox.put("late")
    outbox.close(1011, "second")
    assert outbox.closing
    assert await outbox.deliver()
    assert client.got == [(1008, "first")]


async def test_putting_does_not_wait_for_a_client_that_does_not_read() -> None:
    client = FakeClient(reads=False)
    outbox = Outbox(client)
    delivering = asyncio.create_task(outbox.deliver())
    outbox.put("one")
    await client.began.wait()
    outbox.put("two")
    outbox.close(1000, "bye")
    client.reading.set()
    assert await delivering
    assert client.got == ["one", "two", (1000, "bye")]


@pytest.mark.parametrize("text", ["x" * 100, "州" * 34])
async def test_a_client_that_lets_too_many_bytes_lie_is_let_go(text: str) -> None:
    client = FakeClient(reads=False)
    outbox = Outbox(client, unsent_bytes=100, seconds=3600)
    delivering = asyncio.create_task(outbox.deliver())
    outbox.put("first")
    await client.began.wait()
    outbox.put(text)
    outbox.put("and more")
    async with asyncio.timeout(10):  # else it would hang for the hour
        assert await delivering
    assert client.got == [NOT_READ]
    assert outbox.closing


async def test_a_client_that_lets_a_text_lie_too_long_is_let_go() -> None:
    client = FakeClient(reads=False)
    outbox = Outbox(client, seconds=0)
    outbox.put("first")
    assert await outbox.deliver()
    assert client.got == [NOT_READ]


async def test_what_is_put_after_a_client_was_let_go_is_dropped() -> None:
    client = FakeClient(reads=False)
    outbox = Outbox(client, unsent_bytes=10, seconds=0)
    outbox.put("first")
    await outbox.deliver()
    outbox.put("x" * 100)
    outbox.close(1012, "the server restarts")
    assert client.got == [NOT_READ]


async def test_a_client_that_does_not_even_read_the_close_is_given_up() -> None:
    outbox = Outbox(client := FakeClient(reads=False, answers_close=False), seconds=0)
    outbox.put("first")
    assert not await outbox.deliver()
    assert client.got == []


async def test_a_close_that_is_not_read_is_given_up() -> None:
    outbox = Outbox(client := FakeClient(reads=False, answers_close=False), seconds=0)
    outbox.close(1000, "bye")
    assert not await outbox.deliver()
    assert client.got == []


@pytest.mark.parametrize("seconds", [0, 30])
async def test_a_text_over_the_limit_reaches_a_client_that_reads(seconds: float) -> None:
    outbox = Outbox(client := FakeClient(), unsent_bytes=10, seconds=seconds)
    outbox.put("x" * 1000)
    outbox.close(1000, "bye")
    assert await outbox.deliver()
    assert client.got == ["x" * 1000, (1000, "bye")]


async def test_bytes_that_were_read_do_not_count() -> None:
    outbox = Outbox(client := FakeClient(reads=False), unsent_bytes=10)
    delivering = asyncio.create_task(outbox.deliver())
    for _ in range(3):
        outbox.put("x" * 6)
        await client.began.wait()
        outbox.put("y" * 4)
        client.reading.set()
        async with asyncio.timeout(10):  # else a client let go would be awaited for ever
            assert [await client.arrived.get(), await client.arrived.get()] == ["x" * 6, "y" * 4]
        client.began.clear()
        client.reading.clear()
    outbox.close(1000, "bye")
    assert await delivering
    assert client.got[-1] == (1000, "bye")


async def test_what_a_client_that_left_raises_is_passed_on() -> None:
    outbox = Outbox(client := FakeClient())
    client.left = True
    outbox.put("hello")
    with pytest.raises(Left):
        await outbox.deliver()


async def test_putting_still_does_no_harm_after_a_client_left() -> None:
    outbox = Outbox(client := FakeClient(), unsent_bytes=10)
    client.left = True
    outbox.put("hello")
    with pytest.raises(Left):
        await outbox.deliver()
    outbox.put("x" * 100)
    assert client.got == []


async def test_delivering_can_be_cancelled() -> None:
    outbox = Outbox(client := FakeClient(reads=False))
    delivering = asyncio.create_task(outbox.deliver())
    outbox.put("hello")
    await client.began.wait()
    delivering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await delivering
    assert client.got == []


async def test_an_outbox_that_was_read_or_left_is_not_unread() -> None:
    outbox = Outbox(client := FakeClient())
    assert not outbox.unread
    outbox.put("hello")
    outbox.close(1000, "bye")
    assert await outbox.deliver()
    assert not outbox.unread
    outbox = Outbox(client := FakeClient())
    client.left = True
    outbox.put("hello")
    with pytest.raises(Left):
        await outbox.deliver()
    assert not outbox.unread


@pytest.mark.parametrize("answers_close", [True, False])
async def test_an_outbox_whose_client_does_not_read_is_unread(answers_close: bool) -> None:
    outbox = Outbox(FakeClient(reads=False, answers_close=answers_close), seconds=0)
    outbox.put("hello")
    assert await outbox.deliver() == answers_close
    assert outbox.unread
