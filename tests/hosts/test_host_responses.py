"""Two hosts, one of which runs a reply that a client of the other one follows or ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from models.errors import ResponseNotFoundError, ServerUnavailableError
from models.generation.events import Created, Finished, OutputDelta
from models.settings import Settings
from models.store.item import Status
from tests.support.fake_client import FakeListener
from tests.support.hosts import Host

pytestmark = pytest.mark.anyio

Hosts = tuple[Host, Host]


@pytest.fixture
def shared(settings: Settings, empty_postgresql: str) -> Settings:
    return replace(settings, database_url=empty_postgresql)


@pytest.fixture
async def hosts(shared: Settings) -> AsyncIterator[Hosts]:
    async with Host.opened(shared) as first, Host.opened(shared) as second:
        yield first, second


async def started(host: Host, message: str = "wait Hello, how are you?") -> tuple[str, FakeListener]:
    """A reply that has said its text, and waits for its end."""
    id, listener = host.ask(message)
    text = message.partition(" ")[2]
    while text:
        text = text.removeprefix((await listener.next(OutputDelta)).text)
    return id, listener


async def test_a_reply_of_another_host_is_followed_from_its_beginning_to_its_end(hosts: Hosts) -> None:
    first, second = hosts
    id, listener = await started(first)
    follower = FakeListener()
    await second.responses.follow("ann", id, follower)
    first.scripted.release()
    events = await follower.until(Finished)
    assert [type(event).__name__ for event in events] == [
        "Created",
        "OutputItemAdded",
        *["OutputDelta"] * 5,
        "OutputItemDone",
        "Finished",
    ]
    assert isinstance(events[0], Created)
    assert events[0].conversation == "conv_1"
    assert "".join(event.text for event in events if isinstance(event, OutputDelta)) == "Hello, how are you?"
    assert events[-1] == await listener.next(Finished)


async def test_a_reply_of_another_host_is_cancelled_there(hosts: Hosts) -> None:
    first, second = hosts
    id, listener = await started(first)
    await second.responses.cancel("ann", id)
    assert (await listener.next(Finished)).reply.status is Status.CANCELLED
    await second.responses.wait_ended("ann", id)
    assert (await second.responses.find("ann", id))[1].status is Status.CANCELLED


async def test_another_user_cannot_find_a_reply_of_another_host(hosts: Hosts) -> None:
    first, second = hosts
    id, _ = await started(first)
    follower = FakeListener()
    with pytest.raises(ResponseNotFoundError):
        await second.responses.follow("bob", id, follower)
    with pytest.raises(ResponseNotFoundError):
        await second.responses.cancel("bob", id)
    assert follower.rest() == []


async def test_a_reply_of_a_host_without_an_address_is_followed_through_the_database(shared: Settings) -> None:
    async with Host.opened(shared, None) as first, Host.opened(shared) as second:
        id, _ = await started(first)
        follower = FakeListener()
        await second.responses.follow("ann", id, follower)
        with pytest.raises(ServerUnavailableError, match="PARLEY_PEER_ADDRESS"):
            await second.responses.cancel("ann", id)
        first.scripted.release()
        assert "".join(await follower.deltas()) == "Hello, how are you?"


async def test_a_reply_goes_on_in_the_database_when_the_connection_to_its_host_is_lost(hosts: Hosts) -> None:
    first, second = hosts
    id, listener = await started(first)
    follower = FakeListener()
    await second.responses.follow("ann", id, follower)
    for link in [*first.peers._guests]:
        link.abort()
    first.scripted.release()
    assert "".join(await follower.deltas()) == "Hello, how are you?"
    assert await asyncio.wait_for(listener.next(Finished), 10)
