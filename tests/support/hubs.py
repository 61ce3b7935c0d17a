"""A hub and workers in one event loop, with replies that a test writes itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from starlette.datastructures import State

from models.chat_request import ChatRequest
from models.generation.events import ResponseEvent
from models.generation.interface import ResponseRequest, Stateless, Target
from models.hub.client import HubClient
from models.hub.hub import Hub
from models.hub.link import Link
from models.hub.service import HubService, Opened
from models.hub.worker import Worker
from models.model_info import ModelInfo, ModelList
from models.ops.metrics import Metrics
from models.options import Options
from models.settings import Settings
from models.shared.shared_state import OwnState
from models.store.conversations import Conversation, Conversations
from models.users.connections import Change, ConnectionRegistry
from models.users.users import Logins, Users
from tests.support.fake_responses import FakeResponses
from tests.support.scripted import ScriptedChat
from tests.support.workers import Waiting

MODEL = ModelList([ModelInfo("scripted", 4096, Options(seed=7), ("*",), ("tools",))])
STARTED = 1700000000


class FakeFeed:
    """Keeps which conversations have changed."""

    def __init__(self) -> None:
        self.noted: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    def changed(self, user: str, id: str) -> None:
        self.noted.put_nowait((user, id))


class FakeManager(FakeResponses):
    """The responses of a hub, which can be in trouble."""

    trouble: str | None = None


def parts_of(settings: Settings, conversations: Conversations) -> Any:
    """What a hub needs of a server."""
    chat, manager = ScriptedChat(), FakeManager()
    return SimpleNamespace(
        settings=settings,
        started=STARTED,
        users=Users.open(settings, conversations._database),
        conversations=conversations,
        connections=ConnectionRegistry(announce=True, per_user=2),
        metrics=Metrics(),
        admission=chat.admission,
        chat=chat,
        shared=OwnState(),
        models=MODEL,
        feed=FakeFeed(),
        manager=manager,
        responses=manager,
    )


def new_request(message: str = "Hi", target: Target | None = None) -> ResponseRequest:
    """A request of ann for a reply to one message."""
    chat = ChatRequest("ann", [{"role": "user", "content": message}], Options())
    return ResponseRequest(chat, target or Stateless())


class BreakableHub(Hub):
    """A hub whose connections can be lost. `came` counts the workers that have connected."""

    def __init__(self, supervisor: int) -> None:
        super().__init__(supervisor)
        self.came = 0
        self._changed = asyncio.Event()

    @property
    def links(self) -> list[Link]:
        """The connections of the workers, in the order in which they have come."""
        return [*self._workers]

    def lose(self) -> None:
        """End all connections, as the end of the process does."""
        for link in self.links:
            link.close()

    async def wait_for(self, count: int) -> None:
        """Wait until some workers have connected, all in all."""
        while self.came < count:
            self._changed.clear()
            await self._changed.wait()

    async def wait_present(self, count: int) -> None:
        """Wait until some workers are connected, no more and no fewer."""
        while len(self.links) != count:
            self._changed.clear()
            await self._changed.wait()

    async def wait_alone(self) -> None:
        """Wait until all workers have left."""
        await self.wait_present(0)

    def _new_service(self, link: Link) -> HubService:
        self.came += 1
        self._changed.set()
        return super()._new_service(link)

    def _on_lost(self, link: Link) -> None:
        super()._on_lost(link)
        self._changed.set()


@asynccontextmanager
async def listening(settings: Settings, parts: Any = None) -> AsyncIterator[BreakableHub]:
    """A hub that listens; it is open if it gets its parts."""
    async with BreakableHub.listening(settings, Waiting.supervisor) as hub:
        assert isinstance(hub, BreakableHub)
        if parts:
            hub.open(parts)
        yield hub


class FakeWorker:
    """Notes what the hub calls, and when it comes and goes."""

    def __init__(self) -> None:
        self.notes: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        self.may_go_on = asyncio.Event()  # after the loss of the hub
        self.may_go_on.set()

    async def next(self, what: str) -> tuple[Any, ...]:
        """What comes with the next note of a kind; those before it are skipped."""
        while (note := await self.notes.get())[0] != what:
            pass
        return note[1:]

    def rest(self) -> list[tuple[Any, ...]]:
        """All notes that were not taken yet."""
        return [self.notes.get_nowait() for _ in range(self.notes.qsize())]

    def hub_opened(self, opened: Opened) -> None:
        self._note("hub opened", opened)

    async def hub_lost(self) -> None:
        self._note("hub lost")
        await self.may_go_on.wait()

    def on_event(self, listeners: list[int], event: ResponseEvent) -> None:
        self._note("event", listeners, event)

    async def wait_sent(self, listener: int) -> None:
        self._note("wait sent", listener)

    def presence_changed(self, connection: int, change: Change, user: str) -> None:
        self._note("presence", connection, change, user)

    def conversation_changed(self, connection: int, id: str, conversation: Conversation | None) -> None:
        self._note("conversation", connection, id, conversation)

    def close(self, connection: int, code: int, reason: str) -> None:
        self._note("close", connection, code, reason)

    def logins_changed(self, logins: Logins) -> None:
        self._note("logins", logins)

    def models_changed(self, models: tuple[ModelInfo, ...]) -> None:
        self._note("models", models)

    def _note(self, *note: Any) -> None:
        self.notes.put_nowait(note)


@asynccontextmanager
async def connected(
    settings: Settings, worker: FakeWorker | None = None
) -> AsyncIterator[tuple[HubClient, FakeWorker]]:
    """A worker that is connected to the hub, once that is ready."""
    client, worker = HubClient(settings.data, Waiting()), worker or FakeWorker()  # type: ignore[arg-type]
    async with client.kept(worker):
        yield client, worker


@asynccontextmanager
async def opened_worker(settings: Settings) -> AsyncIterator[tuple[Worker, Any]]:
    """A real worker of the hub, and the parts of its server."""
    state = State()
    async with Worker.opened(state, settings, Waiting()) as worker:  # type: ignore[arg-type]
        yield worker, state


class FakeConnection:
    """A connection that notes what it is told."""

    def __init__(self, login_session: str | None = None) -> None:
        self.login_session = login_session
        self.told: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()

    def presence_changed(self, change: Change, user: str) -> None:
        self.told.put_nowait((change, user))

    def conversation_changed(self, id: str, conversation: Conversation | None) -> None:
        self.told.put_nowait((id, conversation))

    def close(self, code: int, reason: str) -> None:
        self.told.put_nowait((code, reason))
