from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack
from typing import Any

import pytest

from models.errors import ServerUnavailableError, StartError
from models.generation.parts import Readiness
from models.hub.client import HubClient
from models.hub.launcher import SOCKET
from models.hub.service import HubService, Opened
from models.settings import Settings
from models.store.conversations import Conversations
from models.store.database import make_data_folder
from tests.support.hubs import MODEL, STARTED, FakeWorker, connected, listening, parts_of

pytestmark = pytest.mark.anyio


class Noting:
    """A launcher that only notes that it was asked for a hub."""

    supervisor = os.getpid()

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    def launch(self) -> None:
        self.asked.set()


class Failing(Noting):
    """A launcher that cannot start anything."""

    def launch(self) -> None:
        super().launch()
        raise BlockingIOError("too many processes")


class Logged(logging.Handler):
    """Sets an event when Parley logs something."""

    def __init__(self) -> None:
        super().__init__()
        self.event = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.event.set()


@pytest.fixture
def parts(settings: Settings, conversations: Conversations) -> Any:
    return parts_of(settings, conversations)


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


def new_client(settings: Settings, launcher: Noting) -> HubClient:
    make_data_folder(settings)
    return HubClient(settings.data, launcher, pause=0)  # type: ignore[arg-type]


# The first hub


async def test_a_worker_waits_until_the_hub_is_open(settings: Settings, parts: Any, worker: FakeWorker) -> None:
    async with AsyncExitStack() as stack, listening(settings) as hub:
        client = new_client(settings, Noting())
        entering = asyncio.create_task(stack.enter_async_context(client.kept(worker)))
        await hub.wait_for(1)
        with pytest.raises(ServerUnavailableError):
            await client.call(HubService.ready)
        assert not entering.done()
        hub.open(parts)
        await entering
        assert await worker.next("hub opened") == (Opened(MODEL.all, STARTED, ""),)
        assert await client.call(HubService.ready) == Readiness()


async def test_a_hub_that_does_not_run_is_asked_for(settings: Settings, parts: Any, worker: FakeWorker) -> None:
    launcher = Noting()
    client = new_client(settings, launcher)
    async with AsyncExitStack() as stack:
        entering = asyncio.create_task(stack.enter_async_context(client.kept(worker)))
        await launcher.asked.wait()
        async with listening(settings, parts):
            await entering
            await client.call(HubService.ready)


async def test_a_hub_that_runs_is_not_asked_for(settings: Settings, parts: Any, worker: FakeWorker) -> None:
    launcher = Noting()
    async with listening(settings, parts), new_client(settings, launcher).kept(worker):
        assert not launcher.asked.is_set()


@pytest.mark.parametrize("early", [True, False], ids=["before a worker connects", "while a worker waits"])
async def test_a_hub_that_cannot_start_says_why(settings: Settings, worker: FakeWorker, early: bool) -> None:
    async with AsyncExitStack() as stack, listening(settings) as hub:
        if early:
            hub.fail("there is no model")
        client = new_client(settings, Noting())
        entering = asyncio.create_task(stack.enter_async_context(client.kept(worker)))
        await hub.wait_for(1)
        if not early:
            hub.fail("there is no model")
        with pytest.raises(StartError, match="there is no model"):
            await entering
        await hub.wait_alone()
    assert worker.rest() == []


async def test_a_hub_that_ends_while_it_starts_is_an_error(settings: Settings, worker: FakeWorker) -> None:
    async with AsyncExitStack() as stack, listening(settings) as hub:
        entering = asyncio.create_task(stack.enter_async_context(new_client(settings, Noting()).kept(worker)))
        await hub.wait_for(1)
        await hub.links[0].wait_greeted()
        hub.lose()
        with pytest.raises(StartError, match="has ended"):
            await entering


async def test_a_start_that_is_interrupted_leaves_no_connection(settings: Settings, worker: FakeWorker) -> None:
    async with AsyncExitStack() as stack, listening(settings) as hub:
        entering = asyncio.create_task(stack.enter_async_context(new_client(settings, Noting()).kept(worker)))
        await hub.wait_for(1)
        entering.cancel()
        await hub.wait_alone()
        assert entering.cancelled()


async def test_the_end_of_a_worker_closes_its_connection(settings: Settings, parts: Any, worker: FakeWorker) -> None:
    async with listening(settings, parts) as hub:
        async with connected(settings, worker):
            assert len(hub.links) == 1
        await hub.wait_alone()


# A hub that ends


async def test_a_worker_hears_of_the_loss_then_of_the_next_hub(
    settings: Settings, parts: Any, worker: FakeWorker
) -> None:
    async with listening(settings, parts) as hub, connected(settings, worker) as (client, _):
        await worker.next("hub opened")
        hub.lose()
        await worker.next("hub opened")
        assert await client.call(HubService.ready) == Readiness()
    assert hub.came == 2


async def test_calls_fail_between_two_hubs(settings: Settings, parts: Any, worker: FakeWorker) -> None:
    worker.may_go_on.clear()
    async with listening(settings, parts) as hub, connected(settings, worker) as (client, _):
        await worker.next("hub opened")
        hub.lose()
        assert await worker.next("hub lost") == ()
        with pytest.raises(ServerUnavailableError):
            await client.call(HubService.ready)
        with pytest.raises(ServerUnavailableError):
            client.start(HubService.count, "slow_clients")
        client.try_tell(HubService.count, "slow_clients")
        assert worker.rest() == []
        worker.may_go_on.set()
        await worker.next("hub opened")
        assert await client.call(HubService.ready) == Readiness()


async def test_the_next_hub_is_asked_for(settings: Settings, parts: Any, worker: FakeWorker) -> None:
    launcher = Noting()
    client = new_client(settings, launcher)
    async with AsyncExitStack() as stack:
        async with listening(settings, parts):
            await stack.enter_async_context(client.kept(worker))
        await launcher.asked.wait()
        await worker.next("hub lost")
        async with listening(settings, parts):
            await worker.next("hub opened")
            await client.call(HubService.ready)


async def test_a_next_hub_that_cannot_start_is_not_the_last(
    settings: Settings, parts: Any, worker: FakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    client = new_client(settings, Noting())
    async with AsyncExitStack() as stack:
        async with listening(settings, parts):
            await stack.enter_async_context(client.kept(worker))
            await worker.next("hub opened")
        async with listening(settings) as failing:
            failing.fail("there is no model")
            await failing.wait_for(2)  # it comes again
        async with listening(settings, parts):
            await worker.next("hub opened")
    assert "there is no model" in caplog.text


async def test_a_launcher_that_fails_is_asked_again(settings: Settings, parts: Any, worker: FakeWorker) -> None:
    launcher = Failing()
    client = new_client(settings, launcher)
    async with AsyncExitStack() as stack:
        async with listening(settings, parts):
            await stack.enter_async_context(client.kept(worker))
            await worker.next("hub opened")
        await launcher.asked.wait()
        launcher.asked.clear()
        await launcher.asked.wait()
        async with listening(settings, parts):
            await worker.next("hub opened")


async def test_a_socket_that_cannot_be_used_for_a_while_is_tried_again(
    settings: Settings, parts: Any, worker: FakeWorker
) -> None:
    logger, logged, path = logging.getLogger("parley"), Logged(), settings.data / SOCKET
    worker.may_go_on.clear()
    async with listening(settings, parts) as hub, AsyncExitStack() as stack:
        await stack.enter_async_context(new_client(settings, Noting()).kept(worker))
        await worker.next("hub opened")
        hub.lose()
        await worker.next("hub lost")
        path.rename(moved := settings.data / "moved")
        path.symlink_to(path)  # a loop
        logger.addHandler(logged)
        worker.may_go_on.set()
        await logged.event.wait()  # that the hub has ended
        logged.event.clear()
        await logged.event.wait()  # that it cannot be reached
        logger.removeHandler(logged)
        path.unlink()
        moved.rename(path)
        await worker.next("hub opened")


async def test_a_worker_that_stops_does_not_connect_again(settings: Settings, parts: Any, worker: FakeWorker) -> None:
    async with listening(settings, parts) as hub, connected(settings, worker) as (client, _):
        client.stopping = True
        hub.lose()
        await worker.next("hub lost")
        for _ in range(2):  # others connect meanwhile
            async with connected(settings):
                pass
        assert hub.came == 3
        with pytest.raises(ServerUnavailableError):
            await client.call(HubService.ready)


async def test_a_worker_that_stops_asks_for_no_hub(settings: Settings, parts: Any, worker: FakeWorker) -> None:
    launcher = Noting()
    client = new_client(settings, launcher)
    async with AsyncExitStack() as stack:
        async with listening(settings, parts):
            await stack.enter_async_context(client.kept(worker))
        await launcher.asked.wait()
        client.stopping = True
        launcher.asked.clear()
        others = Noting()
        other = asyncio.create_task(stack.enter_async_context(new_client(settings, others).kept(FakeWorker())))
        for _ in range(3):  # the first worker, which tries as often, has tried again too
            await others.asked.wait()
            others.asked.clear()
        assert not launcher.asked.is_set()
        other.cancel()
