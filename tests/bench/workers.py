"""Measure how many tokens a second one process, or a hub and its workers, pass on to sockets, and what a token costs.

    python tests/bench/workers.py --sockets 200 --rate 100 --seconds 10 --workers 0 --workers 1 --workers 2
    python tests/bench/workers.py --real --sockets 32 --tokens 256 --workers 0 --workers 1

A scripted engine gives each reply `rate` tokens a second, all replies in the same moment, as a step of the engine does.
Each token is the time at which it was made. 0 workers is one process. The clients have a process of their own. With
`--real`, the embedded model gives each reply so many tokens as fast as it can.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(ROOT := Path(__file__).parents[2]))

import click
import httpx2
from starlette.applications import Starlette
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from models.hub.launcher import Launcher
from models.hub.program import run_hub
from models.language.events import Done, Event, TextDelta
from models.web.serving import serve
from server import create_app, lifespan
from tests.support.client import ANN, ENDS, bearer
from tests.support.scripted import ScriptedChat, ScriptedReply

TICKS = os.sysconf("SC_CLK_TCK")


class PacedChat(ScriptedChat):
    """Gives all replies one token at a time, some times a second. The message says how many in all, and how many a
    second."""

    def __init__(self) -> None:
        super().__init__()
        self._step = asyncio.Event()

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        for _ in range(int(reply.text.split()[0])):
            await self._step.wait()
            reply.usage.output_tokens += 1
            yield TextDelta(f"{time.perf_counter():.6f} ")
        yield Done("stop")

    async def run(self, rate: float) -> None:
        """Make steps."""
        due = time.perf_counter()
        while True:
            due = max(due + 1 / rate, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
            self._step.set()
            self._step = asyncio.Event()


@asynccontextmanager
async def opens_paced(app: Starlette) -> AsyncIterator[Any]:
    async with PacedChat().opened(app) as chat:
        app.state.admission.per_user = app.state.admission.slots = app.state.admission.free = 10_000
        stepping = asyncio.create_task(chat.run(float(os.environ["RATE"])))
        yield chat
        stepping.cancel()


def served() -> Starlette:
    """The app of one process, or of the hub."""
    return create_app() if os.environ["RATE"] == "real" else create_app(open_chat=opens_paced)


def worker() -> Starlette:
    """The app of a worker."""
    app = create_app()
    first = os.getpid() if os.environ["WORKERS"] == "1" else os.getppid()  # uvicorn has no supervisor for one worker
    app.state.hub_command = [sys.executable, __file__, "hub"]
    app.state.launcher = Launcher.of(app.state.settings, app.state.hub_command, first)
    return app


# The clients


async def listen(url: str, tokens: int, real: bool, delays: list[float], all_there: asyncio.Barrier) -> int:
    """Ask for a reply, and note how long each token of a scripted one was on its way; returns how many came."""
    asked = {"input": "Count.", "max_output_tokens": tokens, "ignore_eos": True} if real else {"input": f"say {tokens}"}
    url = url.replace("http", "ws", 1) + "/ws"
    async with connect(url, subprotocols=[Subprotocol("chat.v2")], additional_headers=bearer()) as connection:
        await connection.recv()
        await all_there.wait()
        await connection.send(json.dumps({"type": "response.create", "store": False, **asked}))
        async for frame in connection:
            now = time.perf_counter()
            event = json.loads(frame)
            if event["type"] == "response.output_text.delta" and not real:
                delays += [now - float(made) for made in event["delta"].split()]
            elif event["type"] in (*ENDS, "error"):
                return int(event["response"]["usage"]["output_tokens"])
    return 0


async def load(url: str, sockets: int, tokens: int, real: bool) -> dict[str, float]:
    """Listen on all sockets at once."""
    delays: list[float] = []
    all_there = asyncio.Barrier(sockets + 1)
    listening = []
    for _ in range(sockets):
        listening.append(asyncio.create_task(listen(url, tokens, real, delays, all_there)))
        await asyncio.sleep(0.02)  # few strangers of one address may connect at once
    await all_there.wait()
    started = time.perf_counter()
    counts = await asyncio.gather(*listening)
    seconds = time.perf_counter() - started
    measured = {"tokens/s": sum(counts) / seconds, "tokens": sum(counts)}
    if delays:
        measured |= {"p50 ms": 1000 * statistics.median(delays)}
        measured |= {"p99 ms": 1000 * statistics.quantiles(delays, n=100)[-1]}
    return measured


# The server


@contextmanager
def server(workers: int, rate: str) -> Iterator[tuple[str, int]]:
    """The URL of a server, and the id of its first process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["one", str(port)]
    command = [sys.executable, __file__, *arguments]
    if workers:
        options = ["--factory", f"--workers={workers}", f"--port={port}", "--log-level=warning"]
        flags = ["--http=models.web.http_protocol:HTTPProtocol", "--ws-per-message-deflate=false"]
        command = [sys.executable, "-m", "uvicorn", "tests.bench.workers:worker", *options, *flags]
    with tempfile.TemporaryDirectory() as data:
        settings = {"PARLEY_DATA": f"{data}/data", "PARLEY_USERS": f"ann:{ANN}", "PARLEY_SOCKETS_PER_USER": "10000"}
        settings |= {"PARLEY_RESPONSES_PER_USER": "10000"}
        environment = os.environ | settings | {"RATE": rate, "WORKERS": str(workers), "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
            url = f"http://127.0.0.1:{port}"
            while not is_ready(url):
                time.sleep(0.1)
            yield url, process.pid
            process.send_signal(signal.SIGTERM)


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/ready").status_code == 200
    except httpx2.HTTPError:
        return False


def cpu_seconds(root: int) -> dict[str, float]:
    """The CPU time of the processes of a server, by what they are."""
    found: dict[str, float] = {}
    for line in subprocess.check_output(["ps", "-eo", "pid,ppid,args"], text=True).splitlines()[1:]:
        pid, parent, command = line.split(maxsplit=2)
        is_hub = f"--supervisor {root}" in command
        if is_hub or int(pid) == root or (int(parent) == root and "resource_tracker" not in command):
            name = "hub" if is_hub else "one process" if "workers.py one" in command else "worker"
            if int(pid) == root and "--workers=1" not in command and name == "worker":
                continue  # the supervisor
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[name] = found.get(name, 0) + (int(fields[11]) + int(fields[12])) / TICKS
    return found


def clients(url: str, sockets: int, tokens: int, real: bool, results: Any) -> None:
    results.send(asyncio.run(load(url, sockets, tokens, real)))


def measure(workers: int, sockets: int, rate: str, tokens: int) -> dict[str, float]:
    """One round."""
    with server(workers, rate) as (url, root):
        before = cpu_seconds(root)
        receiving, sending = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=clients, args=(url, sockets, tokens, rate == "real", sending))
        process.start()
        measured: dict[str, float] = receiving.recv()
        process.join()
        for name, spent in cpu_seconds(root).items():
            measured[f"{name} µs/token"] = 1e6 * (spent - before[name]) / measured["tokens"]
    return measured


@click.group(invoke_without_command=True)
@click.option("--sockets", default=200)
@click.option("--rate", default=100.0, help="Tokens a second of each scripted reply.")
@click.option("--seconds", default=10.0)
@click.option("--real", is_flag=True, help="Use the embedded model.")
@click.option("--tokens", default=256, help="Of each of its replies.")
@click.option("--workers", multiple=True, type=int, default=[0, 1, 2])
@click.pass_context
def main(
    context: click.Context, sockets: int, rate: float, seconds: float, real: bool, tokens: int, workers: list[int]
) -> None:
    """Measure, and print a line for each number of workers."""
    if context.invoked_subcommand is None:
        for count in workers:
            measured = measure(count, sockets, *(("real", tokens) if real else (str(rate), int(rate * seconds))))
            figures = ", ".join(f"{name} {value:,.1f}" for name, value in measured.items())
            print(f"{count or 'no'} workers: {figures}", flush=True)


@main.command()
@click.argument("port", type=int)
def one(port: int) -> None:
    """Run one process."""
    serve(served(), "127.0.0.1", port)


@main.command()
@click.option("--supervisor", type=int)
@click.argument("lock", type=int)
def hub(supervisor: int, lock: int) -> None:
    """Run the hub."""
    app = served()
    asyncio.run(run_hub(app.state, lifespan(app), supervisor))


if __name__ == "__main__":
    main()
