from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from models.errors import (
    APIError,
    InvalidValueError,
    ItemNotFoundError,
    QueueFullError,
    ResponseNotFoundError,
    ServerError,
    ServerUnavailableError,
)
from models.generation.events import (
    Created,
    Finished,
    OutputDelta,
    OutputItemAdded,
    OutputItemDone,
    Rejected,
    ResponseEvent,
)
from models.generation.interface import Follower, Listener, NewConversation, ResponseRequest
from models.generation.response import BATCH, ActiveResponse
from models.hub.remote_responses import RemoteResponses
from models.messages import Message
from models.output_item import OutputItem
from models.settings import Settings
from models.store.conversations import Conversations
from models.store.item import Item, Status
from models.store.place import Place
from tests.support.fake_client import FakeListener
from tests.support.fake_responses import answer, conclude, perform
from tests.support.hubs import (
    BreakableHub,
    FakeManager,
    FakeWorker,
    connected,
    listening,
    new_request,
    opened_worker,
    parts_of,
)
from tests.support.owners import owned_store
from tests.support.stores import AwayConversations

pytestmark = pytest.mark.anyio


@dataclass
class Setup:
    """A hub with replies that the test writes, and one worker of it."""

    hub: BreakableHub
    manager: FakeManager
    worker: Any
    responses: RemoteResponses

    async def start(self, listener: Listener, request: ResponseRequest | None = None) -> ActiveResponse:
        """The hub's side of a new response, which is announced."""
        self.responses.create(request or new_request(), listener)
        response = await self.manager.next()
        response.announce()
        return response

    async def answered(self) -> None:
        """Wait until the hub has acted on everything, and until its events are here."""
        with pytest.raises(ResponseNotFoundError):
            await self.responses.find("ann", "none")


@pytest.fixture
def parts(settings: Settings, conversations: Conversations) -> Any:
    return parts_of(settings, conversations)


@pytest.fixture
async def setup(settings: Settings, parts: Any) -> AsyncIterator[Setup]:
    async with listening(settings, parts) as hub, opened_worker(settings) as (worker, state):
        yield Setup(hub, parts.responses, worker, state.responses)


@pytest.fixture
def responses(setup: Setup) -> RemoteResponses:
    return setup.responses


@pytest.fixture
def listener() -> FakeListener:
    return FakeListener()


class BrokenListener(FakeListener):
    """A listener that fails at each event."""

    def on_event(self, event: ResponseEvent) -> None:
        super().on_event(event)
        raise RuntimeError("it is broken")


class RefusingManager(FakeManager):
    """Refuses every request."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def create(self, request: ResponseRequest, listener: Listener | None) -> str:
        raise self.error


class NotingManager(FakeManager):
    """Keeps what is asked about responses."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()

    def abandon(self, user: str, id: str) -> None:
        self.notes.put_nowait(("abandon", user, id))

    async def wait_ended(self, user: str, id: str) -> None:
        self.notes.put_nowait(("wait_ended", user, id))

    async def delete(self, user: str, id: str) -> None:
        self.notes.put_nowait(("delete", user, id))

    async def set_leaf(self, user: str, id: str, item: str) -> None:
        self.notes.put_nowait(("set_leaf", user, id, item))

    async def delete_conversation(self, user: str, id: str) -> None:
        self.notes.put_nowait(("delete_conversation", user, id))


# The events of a response


async def test_a_response_tells_its_events_in_order(setup: Setup, listener: FakeListener) -> None:
    request = new_request()
    assert setup.responses.create(request, listener) == request.id
    answer(await setup.manager.next(), "say yes or no")
    created, added, *deltas, done, finished = await listener.until(Finished)
    assert [type(event) for event in (created, added, done)] == [Created, OutputItemAdded, OutputItemDone]
    assert [event.text for event in deltas if isinstance(event, OutputDelta)] == ["yes ", "or n", "o"]
    assert isinstance(finished, Finished)
    assert (finished.response_id, finished.reply.content, finished.reply.status) == (
        request.id,
        "yes or no",
        Status.COMPLETED,
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [(QueueFullError("full", 7), QueueFullError), (KeyError("a bug"), ServerError)],
    ids=["ours", "bug"],
)
async def test_a_request_that_the_hub_refuses_is_rejected(
    setup: Setup, parts: Any, listener: FakeListener, error: Exception, kind: type[APIError]
) -> None:
    parts.responses = RefusingManager(error)
    id = setup.responses.create(new_request(), listener)
    rejected = await listener.next(Rejected)
    assert (rejected.response_id, type(rejected.error)) == (id, kind)
    await setup.responses.wait_idle()


async def test_a_request_that_cannot_be_sent_is_rejected_at_once(
    setup: Setup, responses: RemoteResponses, listener: FakeListener
) -> None:
    request = replace(new_request(), details={"metadata": 2**64})
    responses.create(request, listener)
    (rejected,) = listener.rest()
    assert isinstance(rejected, Rejected)
    assert isinstance(rejected.error, InvalidValueError)
    answer(await setup.start(listener), "say the link goes on")
    assert (await listener.next(Finished)).reply.content == "the link goes on"


async def test_a_listener_that_fails_keeps_no_other_from_the_event(
    setup: Setup, listener: FakeListener, caplog: pytest.LogCaptureFixture
) -> None:
    broken = BrokenListener()
    setup.responses.create(new_request(), broken)
    response = await setup.manager.next()
    await setup.responses.follow("ann", response.id, listener)
    answer(response, "say it")
    assert (await listener.next(Finished)).reply.content == "it"
    assert [type(event) for event in broken.rest()] == [Created, OutputItemAdded, OutputDelta, OutputItemDone, Finished]
    assert "unexpected error in a listener" in caplog.text


async def test_a_listener_can_follow_several_responses(setup: Setup, listener: FakeListener) -> None:
    first, second = await setup.start(listener), await setup.start(listener)
    perform(first, "say 1")
    conclude(first, "stop")
    assert (await listener.next(Finished)).response_id == first.id
    perform(second, "say 2")
    conclude(second, "stop")
    assert (await listener.next(Finished)).response_id == second.id


async def test_the_hub_forgets_a_listener_whose_responses_have_ended(setup: Setup, listener: FakeListener) -> None:
    first, second = await setup.start(listener), await setup.start(listener)
    conclude(first, "stop")
    await setup.answered()
    assert setup.manager.left == []
    conclude(second, "stop")
    await setup.answered()
    await setup.answered()  # what the worker has said about the last event
    assert len(setup.manager.left) == 1


# Followers


async def test_a_follower_gets_past_and_future_events(setup: Setup, listener: FakeListener) -> None:
    response = await setup.start(FakeListener())
    perform(response, "say so far")
    await setup.responses.follow("ann", response.id, listener)
    perform(response, "say  and on")
    conclude(response, "stop")
    assert "".join(await listener.deltas()) == "so far and on"


async def test_a_response_of_another_user_cannot_be_followed(setup: Setup, listener: FakeListener) -> None:
    response = await setup.start(FakeListener())
    with pytest.raises(ResponseNotFoundError):
        await setup.responses.follow("bob", response.id, listener)
    conclude(response, "stop")
    await setup.responses.wait_idle()
    assert listener.rest() == []


async def test_the_hub_waits_for_a_follower_that_is_behind(setup: Setup, listener: FakeListener) -> None:
    response = await setup.start(FakeListener())
    perform(response, "say " + "abcd" * (BATCH + 1))
    listener.reading.clear()
    following = asyncio.create_task(setup.responses.follow("ann", response.id, listener))
    await listener.behind.wait()
    await setup.answered()
    assert len([event for event in listener.rest() if isinstance(event, OutputDelta)]) == BATCH
    listener.reading.set()
    await following
    assert len([event for event in listener.rest() if isinstance(event, OutputDelta)]) == 1


async def test_a_follower_that_gives_up_while_it_catches_up_has_left(setup: Setup, listener: FakeListener) -> None:
    response = await setup.start(FakeListener())
    perform(response, "say " + "abcd" * (BATCH + 1))
    listener.reading.clear()
    following = asyncio.create_task(setup.responses.follow("ann", response.id, listener))
    await listener.behind.wait()
    following.cancel()
    await asyncio.wait([following])
    await setup.answered()
    assert not response.is_followed_by(setup.manager.left[0])
    listener.rest()
    conclude(response, "stop")
    await setup.answered()
    assert listener.rest() == []


async def test_a_listener_that_has_left_gets_no_more_events(setup: Setup, listener: FakeListener) -> None:
    response = await setup.start(listener)
    await listener.next(Created)
    perform(response, "say it")  # on its way
    setup.responses.leave(listener)
    await setup.answered()
    conclude(response, "stop")
    await setup.answered()
    assert listener.rest() == []
    assert not response.is_followed_by(setup.manager.left[0])


async def test_a_listener_that_follows_nothing_can_leave(setup: Setup, listener: FakeListener) -> None:
    setup.responses.leave(listener)
    setup.responses.cancel_all(listener)
    await setup.responses.wait_sent(1)
    await setup.answered()
    assert setup.manager.left == []


async def test_a_listener_that_has_left_can_come_back(setup: Setup, listener: FakeListener) -> None:
    response = await setup.start(listener)
    setup.responses.leave(listener)
    await setup.responses.follow("ann", response.id, listener)
    conclude(response, "stop")
    assert (await listener.next(Finished)).response_id == response.id


# What else can be asked


async def test_a_response_can_be_found_and_cancelled(setup: Setup, listener: FakeListener) -> None:
    response = await setup.start(listener, new_request(target=NewConversation("conv_1")))
    perform(response, "say so far")
    conversation, reply = await setup.responses.find("ann", response.id)
    assert (conversation, reply.content) == ("conv_1", "so far")
    await setup.responses.cancel("ann", response.id, steered=True)
    finished = await listener.next(Finished)
    assert (finished.reply.status, finished.reply.reason) == (Status.INCOMPLETE, "steered")
    with pytest.raises(ResponseNotFoundError, match="no such reply is running"):
        await setup.responses.cancel("ann", response.id)


async def test_all_responses_of_a_listener_can_be_cancelled(setup: Setup, listener: FakeListener) -> None:
    other = FakeListener()
    first, second, untouched = await setup.start(listener), await setup.start(listener), await setup.start(other)
    setup.responses.cancel_all(listener)
    ended = {(await listener.next(Finished)).response_id, (await listener.next(Finished)).response_id}
    assert (ended, untouched.status) == ({first.id, second.id}, Status.IN_PROGRESS)


async def test_a_message_can_be_found(setup: Setup) -> None:
    message: Message = {"role": "user", "content": "Hi"}
    setup.manager.messages["msg_1"] = message
    assert await setup.responses.find_message("ann", "msg_1") == message
    with pytest.raises(ItemNotFoundError):
        await setup.responses.find_message("ann", "msg_2")


async def test_all_else_is_asked_of_the_hub(setup: Setup, parts: Any) -> None:
    parts.responses = noting = NotingManager()
    setup.responses.abandon("ann", "resp_1")
    await setup.responses.wait_ended("ann", "resp_1")
    await setup.responses.delete("ann", "resp_1")
    await setup.responses.set_leaf("ann", "conv_1", "msg_1")
    await setup.responses.delete_conversation("ann", "conv_1")
    assert [noting.notes.get_nowait() for _ in range(noting.notes.qsize())] == [
        ("abandon", "ann", "resp_1"),
        ("wait_ended", "ann", "resp_1"),
        ("delete", "ann", "resp_1"),
        ("set_leaf", "ann", "conv_1", "msg_1"),
        ("delete_conversation", "ann", "conv_1"),
    ]


# The hub is lost


async def store(conversations: Conversations, id: str, status: Status, content: str) -> None:
    """Store a reply as far as it is, in conv_1 of ann."""
    begun = Item.of_reply(id, 1.0, [], status=Status.IN_PROGRESS)
    await conversations.begin_turn("ann", "conv_1", Place(new=True), [], begun)
    await conversations.update_replies([Item.of_reply(id, 1.0, [OutputItem("message", [content])], status=status)])


async def test_a_response_that_was_not_created_is_rejected_when_the_hub_is_lost(
    setup: Setup, listener: FakeListener
) -> None:
    id = setup.responses.create(new_request(), listener)
    await setup.manager.next()
    setup.hub.lose()
    rejected = await listener.next(Rejected)
    assert (rejected.response_id, type(rejected.error)) == (id, ServerUnavailableError)


@pytest.mark.parametrize(
    ("stored", "status", "reason"),
    [
        pytest.param(None, Status.FAILED, "server_error", id="not stored"),
        pytest.param((Status.IN_PROGRESS, "so far"), Status.FAILED, "server_error", id="stored so far"),
        pytest.param((Status.COMPLETED, "all of it"), Status.COMPLETED, None, id="stored to the end"),
    ],
)
async def test_a_created_response_ends_as_far_as_it_is_stored_when_the_hub_is_lost(
    setup: Setup,
    conversations: Conversations,
    listener: FakeListener,
    stored: tuple[Status, str] | None,
    status: Status,
    reason: str | None,
) -> None:
    response = await setup.start(listener, new_request(target=NewConversation("conv_1")))
    await listener.next(Created)
    if stored:
        await store(conversations, response.id, *stored)
    setup.hub.lose()
    finished = await listener.next(Finished)
    assert (finished.conversation, finished.response_id) == ("conv_1", response.id)
    assert (finished.reply.content, finished.reply.status) == (stored[1] if stored else "", status)
    assert finished.reply.reason == reason
    await setup.responses.wait_idle()


async def test_a_response_of_another_host_ends_with_it_although_the_hub_is_lost(
    setup: Setup, conversations: Conversations, listener: FakeListener
) -> None:
    response = await setup.start(listener, new_request(target=NewConversation("conv_1")))
    await listener.next(Created)
    other = await owned_store(conversations._database, "other")
    await store(other, response.id, Status.IN_PROGRESS, "so far")
    setup.hub.lose()
    await setup.hub.wait_alone()
    whole = [OutputItem("message", ["all of it"])]
    await other.update_replies([Item.of_reply(response.id, 1.0, whole, status=Status.COMPLETED)])
    finished = await listener.next(Finished)
    assert (finished.conversation, finished.response_id) == ("conv_1", response.id)
    assert (finished.reply.content, finished.reply.status) == ("all of it", Status.COMPLETED)
    await setup.responses.wait_idle()


class ResponsesWorker(FakeWorker):
    """A worker that has only responses."""

    responses: RemoteResponses

    async def hub_lost(self) -> None:
        await self.responses.end_all()
        await super().hub_lost()

    def on_event(self, listeners: list[int], event: ResponseEvent) -> None:
        self.responses.on_event(listeners, event)


async def test_a_created_response_fails_when_hub_and_database_are_lost(
    settings: Settings, parts: Any, conversations: Conversations, listener: FakeListener
) -> None:
    away, worker = AwayConversations(conversations._database), ResponsesWorker()
    away.unreadable = True
    async with listening(settings, parts) as hub, connected(settings, worker) as (client, _):
        worker.responses = RemoteResponses(client, away)
        response = await Setup(hub, parts.responses, worker, worker.responses).start(listener)
        await listener.next(Created)
        hub.lose()
        finished = await listener.next(Finished)
    assert (finished.response_id, finished.reply.status) == (response.id, Status.FAILED)


async def test_a_follower_that_has_begun_gets_the_end_when_the_hub_is_lost(
    setup: Setup, listener: FakeListener
) -> None:
    response = await setup.start(FakeListener())
    perform(response, "say " + "abcd" * (BATCH + 1))
    listener.reading.clear()
    following = asyncio.create_task(setup.responses.follow("ann", response.id, listener))
    await listener.behind.wait()
    setup.hub.lose()
    await following
    created, *_, finished = await listener.until(Finished)
    assert isinstance(created, Created)
    assert isinstance(finished, Finished)
    assert finished.reply.status == Status.FAILED
    listener.reading.set()


class SilentManager(FakeManager):
    """Finds no response until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_for, self.may_find = asyncio.Event(), asyncio.Event()

    async def follow(self, user: str, id: str, follower: Follower) -> None:
        self.asked_for.set()
        await self.may_find.wait()


async def test_a_follower_that_has_not_begun_gets_an_error_when_the_hub_is_lost(
    setup: Setup, parts: Any, listener: FakeListener
) -> None:
    parts.responses = manager = SilentManager()
    following = asyncio.create_task(setup.responses.follow("ann", "resp_1", listener))
    await manager.asked_for.wait()
    [link] = setup.hub.links
    setup.hub.lose()
    with pytest.raises(ServerUnavailableError):
        await following
    await setup.responses.wait_idle()
    assert listener.rest() == []
    manager.may_find.set()
    await link.wait_answered()


async def test_a_listener_that_has_left_hears_nothing_of_the_loss(setup: Setup, listener: FakeListener) -> None:
    other = FakeListener()
    response = await setup.start(listener)
    await setup.responses.follow("ann", response.id, other)
    await listener.next(Created)
    setup.responses.leave(listener)
    setup.hub.lose()
    await other.next(Finished)
    assert listener.rest() == []


async def test_a_request_without_a_hub_is_rejected_at_once(settings: Settings, parts: Any) -> None:
    listener = FakeListener()
    async with listening(settings, parts) as hub, connected(settings, worker := ResponsesWorker()) as (client, _):
        worker.responses = responses = RemoteResponses(client, parts.conversations)
        worker.may_go_on.clear()
        hub.lose()
        await worker.next("hub lost")
        responses.create(new_request(), listener)
        (rejected,) = listener.rest()
        assert isinstance(rejected, Rejected)
        assert isinstance(rejected.error, ServerUnavailableError)
        with pytest.raises(ServerUnavailableError):
            await responses.find("ann", "resp_1")
        worker.may_go_on.set()


async def test_the_next_hub_runs_responses_of_the_same_listener(
    settings: Settings, parts: Any, listener: FakeListener
) -> None:
    async with listening(settings, parts) as hub, connected(settings, worker := ResponsesWorker()) as (client, _):
        worker.responses = RemoteResponses(client, parts.conversations)
        setup = Setup(hub, parts.responses, worker, worker.responses)
        await worker.next("hub opened")
        await setup.start(listener)
        await listener.next(Created)
        hub.lose()
        await listener.next(Finished)
        await worker.next("hub opened")
        answer(await setup.start(listener), "say it again")
        assert (await listener.next(Finished)).reply.content == "it again"


# The end of the worker


async def test_a_drain_waits_until_all_responses_have_ended(setup: Setup, listener: FakeListener) -> None:
    first, second = await setup.start(listener), await setup.start(FakeListener())
    draining = asyncio.create_task(setup.responses.wait_idle())
    conclude(first, "stop")
    await listener.next(Finished)
    await setup.answered()
    assert not draining.done()
    conclude(second, "stop")
    await draining


async def test_a_drain_ends_when_all_listeners_have_left(setup: Setup, listener: FakeListener) -> None:
    await setup.start(listener)
    draining = asyncio.create_task(setup.responses.wait_idle())
    await setup.answered()
    setup.responses.leave(listener)
    await draining


async def test_the_last_worker_that_drains_waits_for_the_end_of_the_hub(setup: Setup) -> None:
    draining = asyncio.create_task(setup.worker.drain(3600))
    await setup.hub.unused.wait()
    await asyncio.sleep(0)
    assert not draining.done()
    setup.hub.lose()
    await draining
