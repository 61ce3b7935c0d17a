"""A chat that says what a test wants, when the test wants it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
from starlette.applications import Starlette

from models.admission import Admission, Ticket
from models.conversations import Conversations
from models.item import Message
from models.metrics import Metrics
from models.options import Options
from models.reply import Delta, Done, Event, Queued, Started, Usage
from models.responses import Responses
from models.settings import Settings


class ScriptedChat:
    """Stands in for `Chat`: the reply to "say X" is X, and to "wait X" is X and then nothing until `release`.

    "queue" waits in second and first place before it answers, "hold X" waits in third until `release` and then is
    "wait X", "break" fails in the middle. `heard` has every call, `running` counts replies that are being made, `idle`
    is set when the last of them ends.
    """

    model_name = "scripted"
    context = 4096
    trouble: str | None = None
    cache_usage = 0.0

    def __init__(self) -> None:
        self.defaults = Options()
        self.arguments: dict[str, Any] = {"model": self.model_name}
        self.admission = Admission(slots=100, queue=0, per_user=100)
        self.heard: list[tuple[list[Message], Options]] = []
        self.running = 0
        self.died = asyncio.Event()
        self.idle = anyio.Event()
        self._released = anyio.Event()

    @asynccontextmanager
    async def opened(self, app: Starlette) -> AsyncIterator[Any]:
        """What `create_app` takes as `open_chat`."""
        yield self

    def release(self) -> None:
        """Let the replies to "wait ..." and "hold ..." go on. Call it in the event loop."""
        self._released.set()
        self._released = anyio.Event()

    async def reply(
        self, ticket: Ticket, messages: Sequence[Message], options: Options, whole: bool = False
    ) -> AsyncGenerator[Event, None]:
        self.running += 1
        self.idle = anyio.Event()
        self.heard.append((list(messages), options))
        order, _, text = messages[-1]["content"].partition(" ")
        usage = Usage(input_tokens=len(messages))
        try:
            yield Started(usage)
            if order == "queue":
                yield Queued(2)
                yield Queued(1)
            if order == "hold":
                yield Queued(3)
                await self._released.wait()
            for start in range(0, len(text), 4):
                usage.output_tokens += 1
                yield Delta(text[start : start + 4])
            if order in ("wait", "hold"):
                await self._released.wait()
            if order == "break":
                raise RuntimeError("the script says so")
            yield Done("stop")
        finally:
            self.running -= 1
            if not self.running:
                self.idle.set()


def keeping_in(kind: type[Conversations], open_chat: Any) -> Any:
    """`open_chat`, in an app whose conversations are of a test's own kind."""

    @asynccontextmanager
    async def opened(app: Starlette) -> AsyncIterator[Any]:
        app.state.conversations = kind(app.state.conversations._database)
        async with open_chat(app) as chat:
            yield chat

    return opened


@asynccontextmanager
async def running(
    scripted: ScriptedChat, conversations: Conversations, settings: Settings, **changes: int
) -> AsyncIterator[Responses]:
    """The replies of a scripted chat, with some settings changed."""
    changed = replace(settings, **changes)  # type: ignore
    async with Responses.running(scripted, conversations, changed, Metrics()) as responses:  # type: ignore
        yield responses
