"""A chat that answers what a test wants, when the test wants it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
from starlette.applications import Starlette

from models.chat_request import ChatRequest
from models.generation.admission import Admission, Ticket
from models.generation.manager import ResponseManager
from models.language.events import ArgumentsDelta, Done, Event, ReasoningDelta, TextDelta, ToolCallStarted
from models.messages import Message, Usage
from models.model_info import ModelInfo, ModelList
from models.ops.metrics import Metrics
from models.options import Options
from models.settings import Settings
from models.store.conversations import Conversations
from tests.support.stores import silent_feed

DELTAS: dict[str, type[ReasoningDelta | TextDelta | ArgumentsDelta]] = {
    "think": ReasoningDelta,
    "say": TextDelta,
    "call": ArgumentsDelta,
}
SCRIPTED_POSITIONS = {"queue": [2, 1], "hold": [3]}


class ScriptedChat:
    """A `Chat` that obeys the first word of a message: the reply to "say X" is X, in pieces of four characters.

    The reply to "wait X" is X and then nothing until `release`. "queue X" waits in second and first place before it is
    said; "hold X" waits in third place until `release`, and is "wait X" from then on. "break X" fails after X.
    "perform X" has several parts, with " | " between them: "think A", "say B", and "call f {}", which calls the tool f.
    "pause X" performs X, and then nothing until `release`. `requests` and `heard` have every request, `running` counts
    the replies that are running, `idle` is set when the last of them ends.
    """

    model_name = "scripted"
    other_models: tuple[str, ...] = ()
    context = 4096
    capabilities: tuple[str, ...] = ("tools", "reasoning")
    trouble: str | None = None
    warning: str | None = None
    cache_usage = 0.0

    def __init__(self) -> None:
        self.defaults = Options()
        self.arguments: dict[str, Any] = {"model": self.model_name}
        self.models = ModelList([self._info(self.model_name)])
        self.admission: Admission = ScriptedAdmission(self)
        self.heard: list[tuple[list[Message], Options]] = []
        self.requests: list[ChatRequest] = []
        self.running = 0
        self.died = asyncio.Event()
        self.idle = anyio.Event()
        self._released = anyio.Event()
        self._orders: dict[asyncio.Task[Any] | None, str] = {}  # the first word of the message, by the reply's task

    @asynccontextmanager
    async def opened(self, app: Starlette) -> AsyncIterator[Any]:
        """What `create_app` takes as `open_chat`."""
        app.state.admission = self.admission
        settings: Settings = app.state.settings
        names = [self.model_name, *self.other_models]
        self.models.replace([self._info(name, settings.aliases_of(name, self.model_name)) for name in names])
        yield self

    def _info(self, name: str, aliases: tuple[str, ...] = ()) -> ModelInfo:
        return ModelInfo(name, self.context, self.defaults, aliases, self.capabilities)

    def release(self) -> None:
        """Let the replies to "wait X" and "hold X" go on. To be called in the event loop."""
        self._released.set()
        self._released = anyio.Event()

    async def prepare(self, request: ChatRequest) -> ScriptedReply:
        self.requests.append(request)
        self.heard.append((list(request.messages), request.options))
        asked = request.messages[-1]["content"] if request.prompt is None else request.prompt
        order, _, text = asked.partition(" ")
        task = asyncio.current_task()
        assert task
        self._orders[task] = order
        self.running += 1
        self.idle = anyio.Event()
        task.add_done_callback(self._ended)
        return ScriptedReply(self, list(request.messages), order, text)

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        """What comes of a reply that is admitted; for kinds of chats to do otherwise."""
        for event in reply.script():
            reply.usage.output_tokens += 1
            yield event
        if reply.order in ("wait", "hold", "pause"):
            await self.released()
        if reply.order == "break":
            raise RuntimeError("the script says so")
        yield Done("stop")

    async def positions(self) -> AsyncIterator[int]:
        """The scripted positions of the reply that the current task runs."""
        order = self._orders.get(asyncio.current_task(), "")
        for position in SCRIPTED_POSITIONS.get(order, ()):
            yield position
        if order == "hold":
            await self.released()

    async def released(self) -> None:
        """Wait until the next `release`."""
        await self._released.wait()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        del self._orders[task]
        self.running -= 1
        if not self.running:
            self.idle.set()


class ScriptedReply:
    """A reply of a `ScriptedChat`, to one message."""

    def __init__(self, chat: ScriptedChat, messages: list[Message], order: str, text: str) -> None:
        self.messages = messages
        self.order = order
        self.text = text
        self.usage = Usage(input_tokens=len(messages))
        self.left_out = 0
        self._chat = chat

    def events(self) -> AsyncGenerator[Event, None]:
        return self._chat.events(self)

    def script(self) -> Iterator[Event]:
        """The events of all parts, in pieces of four characters."""
        for part in self.text.split(" | ") if self.order in ("perform", "pause") else [f"say {self.text}"]:
            kind, _, text = part.partition(" ")
            if kind == "call":
                name, _, text = text.partition(" ")
                yield ToolCallStarted(name)
            for start in range(0, len(text), 4):
                yield DELTAS[kind](text[start : start + 4])


class ScriptedAdmission(Admission):
    """Has room for everybody, but some replies wait in places that the script names."""

    def __init__(self, chat: ScriptedChat) -> None:
        super().__init__(slots=100, queue=0, per_user=100)
        self._chat = chat

    async def enter(self, user: str) -> Ticket:
        ticket = await super().enter(user)
        ticket.wait = self._wait(ticket.wait)  # type: ignore[method-assign]
        return ticket

    def _wait(self, wait: Callable[[], AsyncIterator[int]]) -> Callable[[], AsyncIterator[int]]:
        async def scripted() -> AsyncIterator[int]:
            async for position in self._chat.positions():
                yield position
            async for position in wait():
                yield position

        return scripted


def keeping_in(kind: type[Conversations], open_chat: Any) -> Any:
    """`open_chat`, in an app whose conversations are of a test's own kind."""

    @asynccontextmanager
    async def opened(app: Starlette) -> AsyncIterator[Any]:
        own = kind(app.state.conversations._database)
        own.owner = app.state.conversations.owner
        app.state.conversations = own
        async with open_chat(app) as chat:
            yield chat

    return opened


@asynccontextmanager
async def running(
    scripted: ScriptedChat, conversations: Conversations, settings: Settings, **changes: int
) -> AsyncIterator[ResponseManager]:
    """A manager for the replies of a scripted chat, with some settings changed."""
    changed = replace(settings, **changes)  # type: ignore[arg-type]
    admission = scripted.admission
    feed = silent_feed(conversations)
    async with ResponseManager.opened(scripted, admission, conversations, feed, changed, Metrics()) as responses:
        yield responses
