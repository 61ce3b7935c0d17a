from __future__ import annotations

import asyncio
import socket
import stat
from contextlib import AsyncExitStack
from typing import Any

import pytest

from models.errors import ServerUnavailableError, StartError, TooManyConnectionsError
from models.generation.events import Created, OutputDelta
from models.hub.launcher import SOCKET
from models.hub.service import HubService
from models.settings import Settings
from models.store.conversations import Conversations
from models.store.database import make_data_folder
from models.users.sessions import Session
from models.users.users import User
from tests.support.fake_responses import perform
from tests.support.hubs import FakeWorker, connected, listening, new_request, parts_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def parts(settings: Settings, conversations: Conversations) -> Any:
    return parts_of(settings, conversations)


# Start and end


async def test_workers_that_come_early_are_told_when_the_hub_opens(settings: Settings, parts: Any) -> None:
    workers = FakeWorker(), FakeWorker()
    async with AsyncExitStack() as stack, listening(settings) as hub:
        entering = [asyncio.create_task(stack.enter_async_context(connected(settings, worker))) for worker in workers]
        await hub.wait_for(2)
        assert [worker.rest() for worker in workers] == [[], []]
        hub.open(parts)
        await asyncio.gather(*entering)


async def test_a_worker_that_comes_late_is_told_at_once(settings: Settings, parts: Any) -> None:
    async with listening(settings, parts), connected(settings) as (_, worker):
        assert [kind for kind, *_ in worker.rest()] == ["logins", "hub opened"]


async def test_a_hub_that_fails_tells_all_workers_why(settings: Settings) -> None:
    async with AsyncExitStack() as stack, listening(settings) as hub:
        entering = [asyncio.create_task(stack.enter_async_context(connected(settings))) for _ in range(2)]
        await hub.wait_for(2)
        hub.fail("there is no model")
        for each in entering:
            with pytest.raises(StartError, match="there is no model"):
                await each
        with pytest.raises(StartError, match="there is no model"):
            await stack.enter_async_context(connected(settings))
        await hub.wait_alone()


async def test_only_its_owner_can_use_the_socket_and_it_is_gone_in_the_end(settings: Settings) -> None:
    path = settings.data / SOCKET
    async with listening(settings):
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


async def test_the_socket_of_a_hub_that_was_killed_is_replaced(settings: Settings, parts: Any) -> None:
    make_data_folder(settings)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(settings.data / SOCKET))
    async with listening(settings, parts), connected(settings) as (client, _):
        await client.call(HubService.ready)


async def test_calls_that_run_are_answered_before_the_hub_ends(settings: Settings, parts: Any) -> None:
    async with AsyncExitStack() as stack:
        async with listening(settings, parts):
            client, _ = await stack.enter_async_context(connected(settings))
            parts.users.log_in = SlowLogin()
            calling = asyncio.create_task(client.call(HubService.log_in, b"secret", None, "address", ""))
            await parts.users.log_in.begun.wait()
            asyncio.get_running_loop().call_soon(parts.users.log_in.may_end.set)
        assert await calling == User("ann", b"")


class SlowLogin:
    """A login that takes as long as a test wants."""

    def __init__(self) -> None:
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def __call__(self, *arguments: object) -> User:
        self.begun.set()
        await self.may_end.wait()
        return User("ann", b"")


# Workers that end


async def test_a_hub_is_unused_once_all_workers_are_stopping(settings: Settings, parts: Any) -> None:
    async with listening(settings, parts) as hub, connected(settings) as (first, _), connected(settings) as (second, _):
        await first.call(HubService.stopping, False)
        assert not hub.unused.is_set()
        await second.call(HubService.stopping, False)
        assert hub.unused.is_set()


async def test_a_worker_that_is_replaced_does_not_make_the_hub_unused(settings: Settings, parts: Any) -> None:
    async with listening(settings, parts) as hub, connected(settings):
        async with connected(settings) as (replaced, _):
            await replaced.call(HubService.stopping, False)
        await hub.wait_present(1)
        assert not hub.unused.is_set()


async def test_a_hub_is_unused_once_the_last_worker_that_stops_has_left(settings: Settings, parts: Any) -> None:
    async with listening(settings, parts) as hub:
        async with connected(settings) as (stopping, _), connected(settings):
            await stopping.call(HubService.stopping, False)
            hub.links[1].close()  # a crash
            await hub.wait_for(3)  # its worker is connected again
            assert not hub.unused.is_set()
        await hub.wait_alone()
        assert hub.unused.is_set()


async def test_a_hub_whose_workers_have_crashed_waits_for_new_ones(settings: Settings, parts: Any) -> None:
    async with listening(settings, parts) as hub:
        async with connected(settings):
            pass
        await hub.wait_alone()
        assert not hub.unused.is_set()


async def test_the_connections_of_a_worker_that_ends_leave_and_others_hear_of_it(
    settings: Settings, parts: Any
) -> None:
    async with listening(settings, parts), connected(settings) as (staying, worker):
        await staying.call(HubService.join, "bob", 1, None)
        async with connected(settings) as (dying, _):
            await dying.call(HubService.join, "ann", 1, None)
            await dying.call(HubService.join, "ann", 2, None)
            assert await worker.next("presence") == (1, "joined", "ann")
            assert parts.connections.count("ann") == 2
        assert await worker.next("presence") == (1, "left", "ann")
        assert (parts.connections.count("ann"), parts.connections.count("bob")) == (0, 1)


async def test_what_a_worker_followed_is_left_when_it_ends(settings: Settings, parts: Any) -> None:
    async with listening(settings, parts) as hub:
        async with connected(settings) as (client, worker):
            await client.start(HubService.create, new_request("Hi"), 7)
            response = await parts.responses.next()
            response.announce()
            assert (await worker.next("event"))[0] == [7]
        await hub.wait_alone()
        assert [(listener.number, response.is_followed_by(listener)) for listener in parts.responses.left] == [
            (7, False)
        ]


async def test_a_listener_that_has_left_is_forgotten(settings: Settings, parts: Any) -> None:
    async with listening(settings, parts) as hub:
        async with connected(settings) as (client, _):
            await client.start(HubService.create, new_request("Hi"), 7)
            await client.start(HubService.leave, 7)
        await hub.wait_alone()
        assert [listener.number for listener in parts.responses.left] == [7]


async def test_a_worker_that_is_lost_while_it_catches_up_follows_nothing(settings: Settings, parts: Any) -> None:
    async with listening(settings, parts) as hub:
        async with connected(settings) as (client, worker):
            await client.start(HubService.create, new_request("Hi"), 7)
            response = await parts.responses.next()
            response.announce()
            perform(response, "say " + "x" * 4 * 300)
            following = asyncio.create_task(client.call(HubService.follow, "ann", response.id, 8))
            assert await worker.next("wait sent") == (8,)
            [link] = hub.links
        with pytest.raises(ServerUnavailableError):
            await following
        await hub.wait_alone()
        await link.wait_answered()
        assert {listener.number for listener in parts.responses.left} == {7, 8}
        assert not any(response.is_followed_by(listener) for listener in parts.responses.left)


# What reaches all workers


async def test_new_logins_reach_all_workers(settings: Settings, parts: Any) -> None:
    async with listening(settings, parts), connected(settings) as (_, one), connected(settings) as (_, other):
        await parts.users.create("carol")
        for worker in (one, other):
            before, after = await worker.next("logins"), await worker.next("logins")
            assert [user.id for user in before[0].users] == ["ann", "bob"]
            assert [user.id for user in after[0].users] == ["ann", "bob", "carol"]


async def test_a_session_that_ends_in_one_worker_has_ended_in_all(settings: Settings, parts: Any) -> None:
    session = Session("s1", "ann", 2e9)
    async with listening(settings, parts), connected(settings) as (client, one), connected(settings) as (_, other):
        await client.call(HubService.end_session, session)
        for worker in (one, other):
            before, after = await worker.next("logins"), await worker.next("logins")
            assert (before[0].ended, after[0].ended) == ((), (session,))


async def test_an_event_for_listeners_of_two_workers_reaches_both(settings: Settings, parts: Any) -> None:
    async with listening(settings, parts), connected(settings) as (client, one), connected(settings) as (second, other):
        await client.start(HubService.create, new_request("Hi"), 1)
        response = await parts.responses.next()
        await client.call(HubService.follow, "ann", response.id, 2)
        await second.call(HubService.follow, "ann", response.id, 1)
        response.announce()
        perform(response, "say Hi")
        for worker, numbers in ((one, [1, 2]), (other, [1])):
            (listeners, created), (_, _), (_, delta) = [await worker.next("event") for _ in range(3)]
            assert (listeners, type(created)) == (numbers, Created)
            assert isinstance(delta, OutputDelta)
            assert delta.text == "Hi"


async def test_the_limits_of_a_user_hold_for_all_workers(settings: Settings, parts: Any) -> None:
    async with listening(settings, parts), connected(settings) as (first, _), connected(settings) as (second, _):
        await first.call(HubService.join, "ann", 1, None)
        await second.call(HubService.join, "ann", 1, None)
        with pytest.raises(TooManyConnectionsError):
            await first.call(HubService.join, "ann", 2, None)
        first.try_tell(HubService.leave_connection, 1)
        await first.call(HubService.join, "ann", 3, None)
        assert parts.connections.count("ann") == 2
