"""Apps to be run in a process of their own, and to be stopped and broken there."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from transformers import PreTrainedModel

from models.chat import Chat
from server import create_app, serve
from tests.scripted import ScriptedChat
from tests.tiny import tiny_llama, tiny_tokenizer

STDIN = 0


@asynccontextmanager
async def obeying(release: Callable[[], None]) -> AsyncIterator[None]:
    """While the context lasts, a byte on standard input releases what waits."""
    loop = asyncio.get_running_loop()

    def obey() -> None:
        if os.read(STDIN, 1):
            release()
        else:  # the test has ended
            loop.remove_reader(STDIN)

    loop.add_reader(STDIN, obey)
    try:
        yield
    finally:
        loop.remove_reader(STDIN)


@asynccontextmanager
async def opens_scripted(app: Starlette) -> AsyncIterator[Any]:
    chat = ScriptedChat()
    async with obeying(chat.release):
        yield chat


class Faults:
    """What a model does when it reads one of these characters, which it does not say itself where it is greedy.

    "~" fails each time, "^" wants too much memory the first time, "%" waits the first time until it is released, and
    after "@" nothing works any more.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        encode = tiny_tokenizer().encode
        acts = {"~": self.fail, "^": self.want_memory, "%": self.wait, "@": self.break_down}
        self.acts = {encode(character)[0]: act for character, act in acts.items()}
        self.no_memory = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")]
        self.released = threading.Event()
        self.broken = False
        with torch.no_grad():
            model.lm_head.weight[list(self.acts)] = 0
        model.get_input_embeddings().register_forward_pre_hook(self.read)

    def read(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        for id in {*inputs[0].flatten().tolist()} & {*self.acts}:
            self.acts[id]()
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
async def opens_faulty(app: Starlette) -> AsyncIterator[Chat]:
    torch.set_num_threads(1)
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    async with Chat.running(tokenizer, model, app.state.settings) as chat:
        faults = Faults(model)  # now that the engine has looked at the model
        async with obeying(faults.released.set):
            yield chat


scripted = create_app(open_chat=opens_scripted)
faulty = create_app(open_chat=opens_faulty)


def run(app: str, command: str, environment: dict[str, str], stdin: Connection, output: Connection) -> None:
    """Do what a command does, in the copy of a process that has imported everything."""
    for descriptor, end in enumerate((stdin, output, output)):
        os.dup2(end.fileno(), descriptor)
    stdin.close()
    output.close()
    os.environ |= environment
    try:
        if command == "python server.py":
            serve("127.0.0.1", 0, globals()[app])
        else:
            uvicorn.main([f"tests.breakable:{app}", "--port=0", "--timeout-graceful-shutdown=1"])
    finally:
        gc.collect()  # what was left behind complains
