"""Two hosts, one of which runs a reply that a client of the other one follows or ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from models.errors import ConversationNotFoundError, ResponseNotFoundError, ServerUnavailableError
from models.generation.events import (
    Created,
    Finished,
    OutputDelta,
    OutputItemDone,
    ResponseEvent,
)
from models.generation.interface import NewConversation, Unstored
from models.settings import Settings
from models.store.conversations import Conversations
from models.store.item import Status
from tests.support.fake_client import FakeListener
from tests.support.hosts import Host
from tests.support.owners import remove_owner, write_owner
from tests.support.trees import begin, growing, message

pytestmark = pytest.mark.anyio

Hosts = tuple[Host, Host]

TEXT = "Hello, how are you?"
WHOLE = ["Created", "OutputItemAdded", *["OutputDelta"] * 5, "OutputItemDone", "Finished"]  # the events of TEXT


@pytest.fixture
def shared(settings: Settings, empty_postgresql: str) -> Settings:
    return replace(settings, database_url=empty_postgresql)


@pytest.fixture
async def hosts(shared: Settings) -> AsyncIterator[Hosts]:
    """Two hosts that reach each other. The first one waits for nobody who could follow a reply."""
    async with Host.opened(shared, linger=0) as first, Host.opened(shared) as second:
        yield first, second


async def started(host: Host, order: str = f"wait {TEXT}", text: str = TEXT) -> tuple[str, FakeListener]:
    """A reply that has said its text, and waits for its end."""
    id, listener = host.ask(order)
    while text:
        text = text.removeprefix((await listener.next(OutputDelta)).text)
    return id, listener


async def followed(host: Host, id: str) -> FakeListener:
    """A follower of a reply, at some host."""
    follower = FakeListener()
    await host.responses.follow("ann", id, follower)
    return follower


async def store(host: Host, id: str) -> None:
    """Store what a host has of a reply, as it does every half second."""
    await host.conversations.update_replies([(await host.manager.find("ann", id))[1]])


def kinds(events: list[ResponseEvent]) -> list[str]:
    return [type(event).__name__ for event in events]


def texts(events: list[ResponseEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, OutputDelta))


# Following


async def test_a_reply_of_another_host_is_followed_from_its_beginning_to_its_end(hosts: Hosts) -> None:
    first, second = hosts
    id, listener = await started(first)
    follower = await followed(second, id)
    first.scripted.release()
    events = await follower.until(Finished)
    assert kinds(events) == WHOLE
    assert isinstance(events[0], Created)
    assert events[0].conversation == "conv_1"
    assert texts(events) == TEXT
    assert events[-1] == await listener.next(Finished)


async def test_all_that_was_said_is_there_when_follow_returns(hosts: Hosts) -> None:
    id, _ = await started(hosts[0])
    assert texts((await followed(hosts[1], id)).rest()) == TEXT


async def test_a_reply_with_several_parts_has_all_of_them(hosts: Hosts) -> None:
    id, _ = await started(hosts[0], "pause think Well | say Hello | call f {}", "WellHello{}")
    follower = await followed(hosts[1], id)
    hosts[0].scripted.release()
    events = await follower.until(Finished)
    assert [event.item.type for event in events if isinstance(event, OutputItemDone)] == [
        "reasoning",
        "message",
        "function_call",
    ]


async def test_many_followers_all_get_all(hosts: Hosts) -> None:
    id, _ = await started(hosts[0])
    followers = await asyncio.gather(*(followed(hosts[1], id) for _ in range(20)))
    hosts[0].scripted.release()
    for follower in followers:
        assert kinds(await follower.until(Finished)) == WHOLE


async def test_a_follower_that_begins_anew_gets_each_event_once_more_and_no_twice(hosts: Hosts) -> None:
    id, _ = await started(hosts[0])
    follower = await followed(hosts[1], id)
    follower.rest()
    await hosts[1].responses.follow("ann", id, follower)
    hosts[0].scripted.release()
    assert kinds(await follower.until(Finished)) == WHOLE
    await hosts[1].responses.wait_ended("ann", id)
    assert follower.rest() == []


async def test_a_reply_that_has_ended_is_read_from_the_database(hosts: Hosts) -> None:
    first, second = hosts
    id, listener = first.ask(f"say {TEXT}")
    end = await listener.next(Finished)
    first.cable.cut()
    events = (await followed(second, id)).rest()
    assert texts(events) == TEXT
    assert isinstance(events[-1], Finished)
    assert events[-1].reply.status is end.reply.status is Status.COMPLETED


async def test_a_reply_goes_on_while_somebody_follows_it_at_any_host(hosts: Hosts) -> None:
    first, second = hosts
    id, listener = await started(first)
    follower = await followed(second, id)
    first.responses.leave(listener)
    second.responses.leave(follower)
    watching = await followed(second, id)
    end = await watching.next(Finished)
    assert (end.reply.status, end.reply.reason) == (Status.CANCELLED, "client_disconnected")
    assert not any(isinstance(event, Finished) for event in follower.rest())


async def test_a_reply_that_is_not_stored_is_known_only_to_its_host(hosts: Hosts) -> None:
    first, second = hosts
    id, listener = first.ask(f"wait {TEXT}", Unstored())
    await listener.next(OutputDelta)
    with pytest.raises(ResponseNotFoundError):
        await followed(second, id)


async def test_other_users_cannot_find_a_reply_of_another_host(hosts: Hosts) -> None:
    first, second = hosts
    id, _ = await started(first)
    follower = FakeListener()
    with pytest.raises(ResponseNotFoundError):
        await second.responses.follow("bob", id, follower)
    with pytest.raises(ResponseNotFoundError):
        await second.responses.cancel("bob", id)
    with pytest.raises(ResponseNotFoundError):
        await second.responses.delete("bob", id)
    with pytest.raises(ConversationNotFoundError):
        await second.responses.delete_conversation("bob", "conv_1")
    assert (follower.rest(), first.manager.runs("ann", id)) == ([], True)


# Ending


async def test_a_reply_of_another_host_is_cancelled_there(hosts: Hosts) -> None:
    first, second = hosts
    id, listener = await started(first)
    await second.responses.cancel("ann", id)
    assert (await listener.next(Finished)).reply.status is Status.CANCELLED
    await second.responses.wait_ended("ann", id)
    assert (await second.responses.find("ann", id))[1].status is Status.CANCELLED


async def test_a_reply_that_is_steered_from_another_host_is_incomplete(hosts: Hosts) -> None:
    id, listener = await started(hosts[0])
    await hosts[1].responses.cancel("ann", id, steered=True)
    assert (await listener.next(Finished)).reply.status is Status.INCOMPLETE


async def test_a_reply_that_has_ended_cannot_be_cancelled(hosts: Hosts) -> None:
    id, listener = hosts[0].ask(f"say {TEXT}")
    await listener.next(Finished)
    with pytest.raises(ResponseNotFoundError, match="no such reply is running"):
        await hosts[1].responses.cancel("ann", id)


async def test_all_that_a_listener_follows_is_cancelled_wherever_it_runs(hosts: Hosts) -> None:
    first, second = hosts
    id, theirs = await started(first)
    own, listener = second.ask(f"wait {TEXT}", NewConversation("conv_2"))
    await listener.next(OutputDelta)
    await second.responses.follow("ann", id, listener)
    second.responses.cancel_all(listener)
    ends = [await listener.next(Finished), await listener.next(Finished)]
    assert {end.reply.id: end.reply.status for end in ends} == {id: Status.CANCELLED, own: Status.CANCELLED}
    assert (await theirs.next(Finished)).reply.status is Status.CANCELLED


async def test_a_reply_is_deleted_once_its_host_has_ended_it(hosts: Hosts) -> None:
    first, second = hosts
    id, listener = await started(first)
    await second.responses.delete("ann", id)
    end = await listener.next(Finished)
    assert (end.reply.status, end.reply.reason) == (Status.CANCELLED, "client_disconnected")
    with pytest.raises(ResponseNotFoundError):
        await second.responses.find("ann", id)


async def test_a_conversation_is_deleted_once_its_replies_have_ended(hosts: Hosts) -> None:
    first, second = hosts
    _, listener = await started(first)
    await second.responses.delete_conversation("ann", "conv_1")
    assert (await listener.next(Finished)).reply.status is Status.CANCELLED
    with pytest.raises(ConversationNotFoundError):
        await second.conversations.find("ann", "conv_1")


# The other host does not answer


async def test_a_reply_of_a_host_without_an_address_is_followed_through_the_database(shared: Settings) -> None:
    async with Host.opened(shared, reachable=False) as first, Host.opened(shared) as second:
        id, _ = await started(first)
        follower = await followed(second, id)
        with pytest.raises(ServerUnavailableError, match="PARLEY_PEER_ADDRESS"):
            await second.responses.cancel("ann", id)
        first.scripted.release()
        assert kinds(await follower.until(Finished))[-2:] == ["OutputItemDone", "Finished"]


async def test_a_reply_goes_on_through_the_database_while_its_host_does_not_answer(hosts: Hosts) -> None:
    first, second = hosts
    id, listener = await started(first)
    follower = await followed(second, id)
    first.cable.cut()
    with pytest.raises(ServerUnavailableError):
        await second.responses.cancel("ann", id)
    first.scripted.release()
    events = await follower.until(Finished)
    assert texts(events) == TEXT
    assert kinds(events).count("OutputItemAdded") == kinds(events).count("OutputItemDone") == 1
    assert (await listener.next(Finished)).reply.status is Status.COMPLETED


async def test_a_host_that_answers_again_is_followed_again(hosts: Hosts) -> None:
    first, second = hosts
    id, _ = await started(first)
    first.cable.cut()
    follower = await followed(second, id)
    first.cable.mend()
    await second.responses.cancel("ann", id)
    assert (await follower.next(Finished)).reply.status is Status.CANCELLED


async def test_a_reply_whose_host_was_given_up_has_failed_as_far_as_it_was_stored(hosts: Hosts) -> None:
    first, second = hosts
    id, _ = await started(first)
    await store(first, id)
    first.cable.cut()
    follower = await followed(second, id)
    await remove_owner(first.conversations._database, first.ownership.owner.id)
    await second.conversations.fail_unfinished()
    events = await follower.until(Finished)
    assert texts(events) == TEXT
    assert isinstance(events[-1], Finished)
    assert (events[-1].reply.status, events[-1].reply.reason) == (Status.FAILED, "server_error")


async def test_a_reply_of_an_earlier_process_at_this_address_fails_once_that_is_given_up(shared: Settings) -> None:
    async with Host.opened(shared) as host:
        database = host.conversations._database
        await write_owner(database, id="earlier", address=host.cable.address)
        earlier = Conversations(database, "earlier")
        await begin(earlier, "conv_1", message("msg_1"), growing("resp_1", "half"))
        follower = await followed(host, "resp_1")
        assert texts(follower.rest()) == "half"
        with pytest.raises(ResponseNotFoundError, match="no such reply is running"):
            await host.responses.cancel("ann", "resp_1")
        await remove_owner(database, "earlier")
        await host.conversations.fail_unfinished()
        assert (await follower.next(Finished)).reply.status is Status.FAILED


async def test_what_a_host_runs_that_does_not_answer_can_be_deleted(hosts: Hosts) -> None:
    first, second = hosts
    id, _ = await started(first)
    follower = await followed(second, id)
    first.cable.cut()
    await second.responses.delete_conversation("ann", "conv_1")
    assert (await follower.next(Finished)).reply.status is Status.CANCELLED
    with pytest.raises(ResponseNotFoundError):
        await followed(second, id)


async def test_a_follower_that_leaves_hears_nothing_more(hosts: Hosts) -> None:
    first, second = hosts
    id, listener = await started(first)
    follower = await followed(second, id)
    follower.rest()
    second.responses.leave(follower)
    first.scripted.release()
    await listener.next(Finished)
    await second.responses.wait_ended("ann", id)
    assert follower.rest() == []
    assert second.responses._relays == {}


async def test_a_host_that_stops_leaves_what_it_followed(shared: Settings) -> None:
    async with Host.opened(shared, linger=0) as first:
        async with Host.opened(shared) as second:
            id, listener = await started(first)
            await followed(second, id)
            first.responses.leave(listener)
            assert first.manager.runs("ann", id)
        await first.responses.wait_ended("ann", id)
        assert (await first.responses.find("ann", id))[1].status is Status.CANCELLED
