"""Measure many idle sockets: the memory of each, and how long they delay the streams of others.

    python tests/bench/idle.py --idle 2000 --streams 50 --seconds 30

The same is measured for a bare uvicorn application that only sends pieces at the same rate. The server and the idle
sockets have processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from platformdirs import user_cache_path
from websockets.asyncio.client import ClientConnection, connect
from websockets.protocol import State
from websockets.typing import Subprotocol

from models.engine.native import build
from models.language.events import Event, TextDelta
from models.settings import Settings
from models.validation import Json
from server import create_app
from tests.bench.soak import Errors, in_process, memory, processes, run_app
from tests.support.client import ENDS
from tests.support.scripted import ScriptedChat, ScriptedReply
from tests.support.tiny import opens_tiny

RATE = 20  # pieces per second of each stream without a model
SETTLE = 2.0  # seconds before anything is measured
PER_USER = 10  # idle sockets

Receive = Callable[[], Awaitable[Json]]
Send = Callable[[Json], Awaitable[None]]


# The servers


class FixedChat(ScriptedChat):
    """Says the same piece again and again, at a fixed rate, until nobody follows."""

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        while True:
            await asyncio.sleep(1 / RATE)
            yield TextDelta("piece ")


def serve_parley(settings: Settings, model: str, started: Connection) -> None:
    """Serve a tiny model, or pieces at a fixed rate."""
    logging.basicConfig(handlers=[Errors()])
    torch.set_num_threads(1)
    build.load_kernels(build.build_library(user_cache_path("parley")))
    run_app(create_app(settings, opens_tiny if model == "tiny" else FixedChat().opened), started)


async def echo(scope: Json, receive: Receive, send: Send) -> None:
    """Read a number n, and send it back n times at the rate."""
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        for _ in range(int(message["text"])):
            await asyncio.sleep(1 / RATE)
            await send({"type": "websocket.send", "text": message["text"]})


def serve_echo(started: Connection) -> None:
    """Serve the bare application."""
    logging.basicConfig(handlers=[Errors()])
    run_app(echo, started)


# The clients


@dataclass(frozen=True)
class Subject:
    """A server to be measured, the frame that requests a stream, and a text that each piece of the stream contains."""

    address: str
    request: str
    piece: str

    def connect(self, user: int) -> connect:
        """A connection of a user."""
        headers, protocols = {"Authorization": f"Bearer {secret(user)}"}, [Subprotocol("chat.v2")]
        url = f"ws://{self.address}/ws"
        return connect(url, subprotocols=protocols, additional_headers=headers, ping_interval=None, proxy=None)


def secret(user: int) -> str:
    return f"secret of user{user}"


async def gaps(subject: Subject, user: int, seconds: float) -> list[float]:
    """The seconds between the pieces of a stream, which is requested again when it ends."""
    found: list[float] = []
    async with subject.connect(user) as connection:
        await connection.send(subject.request)
        measured_from, last = time.perf_counter() + SETTLE, 0.0
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE + seconds):
                async for frame in connection:
                    now = time.perf_counter()
                    if subject.piece in str(frame):
                        found += [now - last] if last > measured_from else []
                        last = now
                    elif any(f'"{end}"' in str(frame) for end in ENDS):
                        await connection.send(subject.request)
                        last = 0.0
        connection.transport.abort()
    return found


async def streamed(subject: Subject, streams: int, seconds: float) -> list[float]:
    """The gaps of some streams at once."""
    each = await asyncio.gather(*(gaps(subject, user, seconds) for user in range(streams)))
    return [gap for found in each for gap in found]


def hold(subject: Subject, idle: int, parent: Connection) -> None:
    """Keep idle sockets open until the parent sends something. Sends their number at the start and at the end."""
    asyncio.run(_hold(subject, idle, parent))


async def _hold(subject: Subject, idle: int, parent: Connection) -> None:
    connections: list[ClientConnection] = []
    reading: list[asyncio.Task[None]] = []
    for user in range(idle // PER_USER):
        opened = await asyncio.gather(*(subject.connect(user) for _ in range(PER_USER)))
        connections += opened
        reading += [asyncio.create_task(_read(connection)) for connection in opened]
    parent.send(len(connections))
    await asyncio.to_thread(parent.recv)
    parent.send(sum(connection.state is State.OPEN for connection in connections))
    for connection in connections:
        connection.transport.abort()
    await asyncio.wait(reading)


async def _read(connection: ClientConnection) -> None:
    with suppress(Exception):  # `hold` looks whether it has ended
        async for _ in connection:
            pass


@contextmanager
def held(subject: Subject, idle: int) -> Iterator[Callable[[], int]]:
    """Hold idle sockets in another process. Yields a function that ends it and returns how many are still open."""

    def end() -> int:
        ours.send(None)
        return int(ours.recv())

    ours, theirs = processes.Pipe()
    process = processes.Process(target=hold, args=(subject, idle, theirs))
    process.start()
    ours.recv()
    try:
        yield end
    finally:
        process.terminate()
        process.join()


# What is measured


@dataclass(frozen=True)
class Measured:
    """A server without idle sockets and with them: memory in bytes, gaps in seconds."""

    memory: tuple[int, int]
    gaps: tuple[list[float], list[float]]
    still_open: int

    def lines(self, name: str, idle: int) -> Iterator[str]:
        """The lines of the report."""
        before, after = self.memory
        yield f"{name}: {before / 2**20:.1f} MiB, with {idle} idle sockets {after / 2**20:.1f} MiB,"
        yield f"    {(after - before) / idle:.0f} bytes each; {self.still_open} were still open at the end"
        medians = [1000 * statistics.median(found) for found in self.gaps]
        longest = [1000 * statistics.quantiles(found, n=100)[98] for found in self.gaps]
        for when, count, median, most in zip(("without", "with"), map(len, self.gaps), medians, longest, strict=True):
            yield f"    {count} gaps {when} them: median {median:.2f} ms, p99 {most:.2f} ms"
        yield f"    added: {medians[1] - medians[0]:+.2f} ms to the median, {longest[1] - longest[0]:+.2f} ms to p99"


async def measure(subject: Subject, process: int, plan: argparse.Namespace) -> Measured:
    """Measure one server."""
    without = await streamed(subject, plan.streams, plan.seconds)
    before = memory(process)
    with held(subject, plan.idle) as end:
        await asyncio.sleep(SETTLE)
        after = memory(process)
        beside = await streamed(subject, plan.streams, plan.seconds)
        return Measured((before, after), (without, beside), end())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure many idle sockets.")
    parser.add_argument("--idle", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30, help="uvicorn pings every 20")
    parser.add_argument("--model", choices=["fixed", "tiny"], default="fixed")
    plan = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for all processes that this one starts
    request = json.dumps({"type": "response.create", "input": "Hello", "temperature": 0, "store": False})
    users = {f"user{user}": secret(user) for user in range(max(plan.streams, plan.idle // PER_USER))}
    with tempfile.TemporaryDirectory() as data:
        settings = Settings(slots=plan.streams, linger=0, compile=False, data=Path(data), users=users)
        with in_process(serve_parley, settings, plan.model) as (process, address):
            parley = Subject(address, request, '"response.output_text.delta"')
            print("\n".join(asyncio.run(measure(parley, process, plan)).lines("Parley", plan.idle)), flush=True)
    with in_process(serve_echo) as (process, address):
        bare = Subject(address, "1000000", "1000000")
        print("\n".join(asyncio.run(measure(bare, process, plan)).lines("echo", plan.idle)))


if __name__ == "__main__":
    main()
