"""A server with OpenAI's API that answers what a test wants, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass
class Exchange:
    """One request, and how it is answered."""

    path: str
    headers: dict[str, str]
    body: Json
    writer: asyncio.StreamWriter
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # the client has closed the connection

    async def send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        """Answer with JSON."""
        await self.send_body(json.dumps(value).encode(), "application/json", status, **headers)

    async def send_body(self, body: bytes, kind: str, status: int = 200, **headers: str) -> None:
        """Answer with some bytes."""
        told = {"content-type": kind, "content-length": str(len(body))} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        await self.send_raw(_head(status, told) + body)

    async def begin(self) -> None:
        """Begin a stream of events."""
        await self.send_raw(_head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"}))

    async def send_event(self, data: Any) -> None:
        """Send one event of a stream."""
        text = data if isinstance(data, str) else json.dumps(data)
        event = f"data: {text}\n\n".encode()
        await self.send_raw(f"{len(event):x}\r\n".encode() + event + b"\r\n")

    async def say(self, *texts: str) -> None:
        """Send pieces of text."""
        for text in texts:
            await self.send_event(chunk({"content": text}))

    async def finish(self, reason: str = "stop", usage: Json | None = None) -> None:
        """End a stream as servers do."""
        await self.send_event(chunk({}, reason))
        if usage:
            await self.send_event({"choices": [], "usage": usage})
        await self.send_event("[DONE]")
        await self.send_raw(b"0\r\n\r\n")

    async def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    def vanish(self) -> None:
        """Break the connection, as the end of the process does."""
        self.writer.transport.abort()


Answer = Callable[[Exchange], Awaitable[None]]


async def hello(exchange: Exchange) -> None:
    """The usual answer."""
    await exchange.begin()
    await exchange.say("Hel", "lo")
    await exchange.finish(usage={"prompt_tokens": 7, "completion_tokens": 2})


async def endless(exchange: Exchange) -> None:
    """Begin a reply that does not end."""
    await exchange.begin()
    await exchange.say("Hel")
    await exchange.ended.wait()


class FakeUpstream:
    """The server. `asked` has all requests for replies; the next ones are answered by what `will` has got."""

    def __init__(self, models: list[Json]) -> None:
        self.url = ""
        self.models = models
        self.pages: dict[str, Any] = {}  # what other GETs and POSTs answer, by path; a number is a status
        self.asked: list[Exchange] = []
        self.is_silent = False  # whether it answers nothing at all
        self._answers: deque[Answer] = deque()
        self._arrived: asyncio.Queue[Exchange] = asyncio.Queue()
        self._writers: set[asyncio.StreamWriter] = set()
        self._fewer = asyncio.Condition()  # connections
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server
        self._port = 0

    @classmethod
    @asynccontextmanager
    async def running(cls, *names: str, owner: str = "vllm", context: int | None = 4096) -> AsyncIterator[FakeUpstream]:
        """A server with some models."""
        fake = cls([{"id": name, "owned_by": owner, "max_model_len": context} for name in names or ("tiny",)])
        await fake.start()
        try:
            yield fake
        finally:
            await fake.stop()

    async def wait_unused(self) -> None:
        """Wait until no client holds a connection."""
        async with self._fewer:
            await self._fewer.wait_for(lambda: not self._writers)

    def will(self, *answers: Answer) -> None:
        """Answer the next requests so."""
        self._answers.extend(answers)

    async def next(self) -> Exchange:
        """The next request for a reply."""
        return await self._arrived.get()

    async def start(self) -> None:
        """Listen, after a stop at the same port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/v1"

    async def stop(self) -> None:
        """End as a killed process does."""
        self._server.close()
        for writer in [*self._writers]:
            writer.transport.abort()
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        self._writers.add(writer)
        exchange: Exchange | None = None
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *rest = head.decode().split("\r\n")
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in rest if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                exchange = Exchange(first.split()[1], headers, json.loads(body or "{}"), writer)
                answering = asyncio.create_task(self._answer(exchange))
                self._tasks.add(answering)
                answering.add_done_callback(self._tasks.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            if exchange:
                exchange.ended.set()
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.close()
            async with self._fewer:
                self._fewer.notify_all()

    async def _answer(self, exchange: Exchange) -> None:
        if self.is_silent:
            return
        if exchange.path in self.pages:
            page = self.pages[exchange.path]
            return await (exchange.send_json({}, page) if isinstance(page, int) else exchange.send_json(page))
        if exchange.path == "/v1/models":
            return await exchange.send_json({"object": "list", "data": self.models})
        if not exchange.path.endswith("/completions"):
            return await exchange.send_json({"detail": "Not Found"}, 404)
        self.asked.append(exchange)
        self._arrived.put_nowait(exchange)
        await (self._answers.popleft() if self._answers else hello)(exchange)


def chunk(delta: Json, reason: str | None = None, **fields: Any) -> Json:
    """A chunk of a stream of Chat Completions."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason, **fields}]}


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} .", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
