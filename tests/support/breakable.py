"""Apps that run in a process of their own, and can be stopped and broken there."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import runpy
import signal
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import uvicorn
from platformdirs import user_cache_path
from starlette.applications import Starlette
from transformers import PreTrainedModel

from models.engine.native import build
from models.language.engine_chat import EngineChat
from models.language.events import Event, TextDelta
from models.web.serving import serve
from server import create_app
from tests.support.scripted import ScriptedChat, ScriptedReply
from tests.support.tiny import opens_tiny, tiny_llama, tiny_tokenizer

STDIN = 0
SERVER = Path(__file__).parents[2] / "server.py"


@asynccontextmanager
async def releasable(release: Callable[[], None]) -> AsyncIterator[None]:
    """While the context lasts, a byte on standard input calls `release`."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        if os.read(STDIN, 1):
            release()
        else:  # the test has ended
            loop.remove_reader(STDIN)

    loop.add_reader(STDIN, read)
    try:
        yield
    finally:
        loop.remove_reader(STDIN)


# A scripted app


@asynccontextmanager
async def opens_scripted(app: Starlette) -> AsyncIterator[Any]:
    async with ScriptedChat().opened(app) as chat, releasable(chat.release):
        yield chat


def scripted() -> Starlette:
    """An app that answers what it is asked to."""
    return create_app(open_chat=opens_scripted)


def crowded() -> Starlette:
    """The same, with few descriptors."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))
    return scripted()


# A scripted app that is stopped while it starts


@asynccontextmanager
async def opens_stopped(app: Starlette) -> AsyncIterator[Any]:
    for _ in range(app.state.settings.slots):
        signal.raise_signal(signal.SIGTERM)
    async with ScriptedChat().opened(app) as chat:
        yield chat


def stopped() -> Starlette:
    """An app that gets as many SIGTERM as it has slots, when its model has just been loaded."""
    return create_app(open_chat=opens_stopped)


# A scripted app with a clock that jumps


class JumpingChat(ScriptedChat):
    """Sets the clock by the number in the message, between two deltas of the reply."""

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        from tests.support.jumping_clock import clock  # not earlier: only the fork server may replace its clock

        async for event in super().events(reply):
            yield event
            if isinstance(event, TextDelta):
                clock.offset = float(reply.messages[-1]["content"].split()[1])


@asynccontextmanager
async def opens_jumping(app: Starlette) -> AsyncIterator[Any]:
    async with JumpingChat().opened(app) as chat:
        yield chat


def jumping() -> Starlette:
    """An app whose messages set the clock."""
    return create_app(open_chat=opens_jumping)


# A tiny model with faults


class Faults:
    """Makes a model fail at some characters of the prompt. A greedy reply never has them.

    "~" fails each time, "^" wants too much memory the first time, "%" waits the first time until it is released, and
    after "@" nothing works any more.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        encode = tiny_tokenizer().encode
        faults = {"~": self.fail, "^": self.want_memory, "%": self.wait, "@": self.break_down}
        self.faults = {encode(character)[0]: fault for character, fault in faults.items()}
        self.no_memory = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")]
        self.released = threading.Event()
        self.broken = False
        with torch.no_grad():
            model.lm_head.weight[list(self.faults)] = 0
        model.get_input_embeddings().register_forward_pre_hook(self.before_forward)

    def before_forward(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        for id in {*inputs[0].flatten().tolist()} & {*self.faults}:
            self.faults[id]()
        if self.broken:
            raise RuntimeError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`")

    def fail(self) -> None:
        raise ValueError("the model chokes")

    def want_memory(self) -> None:
        if self.no_memory:
            raise self.no_memory.pop()

    def wait(self) -> None:
        self.released.wait()

    def break_down(self) -> None:
        self.broken = True


@asynccontextmanager
async def opens_faulty(app: Starlette) -> AsyncIterator[EngineChat]:
    torch.set_num_threads(1)
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    async with EngineChat.opened(tokenizer, model, app.state.settings, app.state.admission.shrink) as chat:
        faults = Faults(model)  # not earlier, since the engine runs the model when it starts
        async with releasable(faults.released.set):
            yield chat


def faulty() -> Starlette:
    """An app over a tiny model with faults."""
    return create_app(open_chat=opens_faulty)


# A tiny model that is compiled


def compiled() -> Starlette:
    """An app over a tiny model that is compiled in the background, or whose program is loaded."""
    build.load_kernels(build.build_library(user_cache_path("parley")))
    return create_app(open_chat=opens_tiny)


# In a process of its own


def run(app: str, command: str, environment: dict[str, str], stdin: Connection, output: Connection) -> None:
    """Run one of the apps above by a command, in a fork of a process that has imported everything.

    The app "server" is that of server.py itself.
    """
    gc.freeze()  # what was there before the fork
    for descriptor, end in enumerate((stdin, output, output)):
        os.dup2(end.fileno(), descriptor)
    stdin.close()
    output.close()
    os.environ |= environment
    try:
        if command == "python server.py":
            run_server(app)
        else:
            run_uvicorn(app, command.split()[2:])
    finally:
        gc.collect()  # what was left behind complains


def run_server(app: str) -> None:
    if app != "server":
        return serve(globals()[app](), "127.0.0.1", 0)
    sys.argv = [str(SERVER), "--port=0"]
    runpy.run_path(str(SERVER), run_name="__main__")


def run_uvicorn(app: str, options: list[str]) -> None:
    arguments = [f"tests.support.breakable:{app}", "--factory"]
    if app == "server":
        del sys.modules["server"]  # to be imported again, with the new environment
        arguments = ["server:app"]
    uvicorn.main([*arguments, "--port=0", "--timeout-graceful-shutdown=1", *options])
