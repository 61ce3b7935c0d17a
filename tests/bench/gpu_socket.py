"""What `gpu.py` measures of the whole server: its own app and uvicorn, over a model with random weights.

The server runs in a thread of this process, and the load in a process of its own (`gpu_client.py`).
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from os import sysconf
from pathlib import Path

import torch
from starlette.applications import Starlette
from transformers import PreTrainedTokenizerBase

from models.language.engine_chat import EngineChat
from models.settings import Settings
from server import create_app
from tests.bench.gpu import Load
from tests.bench.gpu_client import secret
from tests.bench.gpu_engine import configuration, join, random_model
from tests.bench.gpu_report import Report
from tests.support.serving import Served, serve
from tests.support.tiny import SHAPE, tiny_tokenizer

TEMPLATE_TOKENS = 19  # of the template, around a message
EVERY = 0.05  # seconds between two looks at the threads
TICKS = sysconf("SC_CLK_TCK")

Results = dict[str, float]


def wide_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """A token for each byte, and a word for each other id that the model may choose."""
    known = SHAPE["vocab_size"]
    return tiny_tokenizer([f"\u0120w{token_id}" for token_id in range(known, vocabulary)])  # U+0120 stands for a space


class Steps:
    """The engine's steps: when each ended, and the seconds it took."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, float]] = []

    def observe(self, seconds: float) -> None:
        self._steps.append((time.perf_counter(), seconds))

    def told(self, start: float, end: float) -> str:
        inside = [seconds for moment, seconds in self._steps if start < moment <= end]
        if not inside:
            return "no steps"
        pace, took = (1000 * total / len(inside) for total in (end - start, sum(inside)))
        return f"a step every {pace:.2f} ms, of which {took:.2f} in the step"


@contextmanager
def opened_server(report: Report, device: torch.device, load: Load, smoke: bool, steps: Steps) -> Iterator[Served]:
    """Parley's app over the 8B shape; nothing limits the clients but the slots."""

    @asynccontextmanager
    async def opens(app: Starlette) -> AsyncIterator[EngineChat]:
        state, model = app.state, random_model(configuration("8b", smoke), device)
        if device.type == "cuda":  # as the loader does
            join(model)
        state.tokenizer, state.model = wide_tokenizer(model.config.vocab_size), model
        arguments = state.tokenizer, model, state.settings, state.admission.shrink
        async with EngineChat.opened(*arguments, on_step=steps.observe) as chat:
            yield chat

    streams = max(load.streams)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            device=str(device),
            context=load.context,
            slots=streams,
            compile=device.type == "cuda",
            users={f"user-{number}": secret(number) for number in range(streams)},
            data=Path(folder),
        )
        began = time.perf_counter()
        with serve(create_app(settings, opens), access_log=False) as served:
            loop = type(served.loop).__module__.partition(".")[0]
            logging.getLogger("parley").setLevel(logging.WARNING)  # no line for each reply
            report.say(f"ready in {time.perf_counter() - began:.1f} s, with the event loop of {loop}")
            yield served


@dataclass
class Client:
    """The process that loads the server."""

    process: subprocess.Popen[str]

    @classmethod
    @contextmanager
    def opened(cls, served: Served) -> Iterator[Client]:
        command = [sys.executable, str(Path(__file__).with_name("gpu_client.py")), served.ws]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            yield cls(process)
        finally:
            process.kill()
            process.wait()

    def ask(self, streams: int, letters: int, tokens: int) -> Results:
        """So many replies at once; each prompt is another one."""
        assert self.process.stdin
        assert self.process.stdout
        load = {"streams": streams, "letters": letters, "tokens": tokens}
        print(json.dumps(load), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise RuntimeError("the client has ended")
        results: Results = json.loads(line)
        return results


class ThreadTimes:
    """Looks again and again at the processor time that some threads have used."""

    def __init__(self, threads: dict[str, int]) -> None:
        self._threads = threads  # the system's id of each
        self._looks: list[tuple[float, dict[str, float]]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="thread times", daemon=True)

    @classmethod
    @contextmanager
    def watched(cls, threads: dict[str, int]) -> Iterator[ThreadTimes]:
        times = cls(threads)
        times._thread.start()
        try:
            yield times
        finally:
            times._stopped.set()
            times._thread.join()

    def shares(self, start: float, end: float) -> dict[str, float]:
        """The share of a core that each has used between two moments."""
        first, last = (min(self._looks, key=lambda look: abs(look[0] - moment)) for moment in (start, end))
        wall = last[0] - first[0]
        return {name: (last[1][name] - first[1][name]) / wall for name in self._threads} if wall > 0 else {}

    def _run(self) -> None:
        while True:
            self._looks.append((time.perf_counter(), {name: _used(id) for name, id in self._threads.items()}))
            if self._stopped.wait(EVERY):
                return


def _used(thread: int) -> float:
    """Seconds of the processor that a thread of this process has used."""
    numbers = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / TICKS


def _threads(served: Served) -> dict[str, int]:
    """The system's ids of the event loop's thread and of the engine's."""
    ids, known = (
        {"engine": next(t.native_id or 0 for t in threading.enumerate() if t.name == "engine")},
        threading.Event(),
    )

    def note() -> None:
        ids["event loop"] = threading.get_native_id()
        known.set()

    served.in_loop(note)
    known.wait()
    return ids


def socket(report: Report, device: torch.device, load: Load, smoke: bool) -> None:
    """Tokens per second and first tokens over sockets, after the layers are compiled."""
    steps = Steps()
    letters = max(load.prompt - TEMPLATE_TOKENS, 4)
    with opened_server(report, device, load, smoke, steps) as served, Client.opened(served) as client:
        with ThreadTimes.watched(_threads(served)) as times:
            client.ask(1, letters, 4)
            report.attempt("compile", lambda: _compiled(served, client, letters), needs=10)
            report.keep("compiled", served.app.state.chat.arguments["compiled"])
            for streams in (load.streams[0], *load.streams[2:]):
                measure = _measure(report, client, steps, times, streams, letters, load.socket_reply)
                report.attempt(f"{streams} sockets", measure)


def _compiled(served: Served, client: Client, letters: int) -> None:
    """Wait until the engine uses compiled layers, which it takes over in a step."""
    chat, deadline = served.app.state.chat, time.monotonic() + 60
    while served.app.state.settings.compile and not chat.arguments["compiled"]:
        if time.monotonic() > deadline or not any(thread.name == "compile" for thread in threading.enumerate()):
            client.ask(1, letters, 4)
            if not chat.arguments["compiled"]:
                raise RuntimeError("the layers are not compiled")
        time.sleep(0.1)


def _measure(
    report: Report, client: Client, steps: Steps, times: ThreadTimes, streams: int, letters: int, tokens: int
) -> Callable[[], None]:
    def measure() -> None:
        warming = client.ask(streams, letters, tokens)  # its steps have sizes that come for the first time
        results = client.ask(streams, letters, tokens)
        joined = results["tokens"] / results["pieces"]
        report.say(f"{streams} sockets, prompts of {results['prompt']}, {joined:.2f} tokens a piece")
        report.keep(f"decode {streams}", results["decode"], f"tokens/s, {warming['decode']:,.0f} the first time")
        report.keep(f"whole {streams}", results["whole"], f"tokens/s, {warming['whole']:,.0f} the first time")
        report.keep(f"first token {streams}", 1000 * results["first"], "ms in the median")
        report.keep(f"last first token {streams}", 1000 * results["last first"], "ms")
        report.say(steps.told(results["start"], results["end"]))
        shares = times.shares(results["start"], results["end"]) | {"client": results["client"]}
        report.keep(f"shares {streams}", {name: round(share, 2) for name, share in shares.items()})

    return measure
