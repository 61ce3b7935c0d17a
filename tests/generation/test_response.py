from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from models.errors import NotStoredError, ServerError
from models.generation.events import Created, Finished, Queued, Rejected, TextDelta, Warned
from models.generation.interface import (
    NewConversation,
    ResponseRequest,
    Stateless,
    StoredConversation,
    Target,
    Unstored,
)
from models.generation.response import BATCH, ActiveResponse, Phase, replay
from models.messages import FinishReason, Usage
from models.options import Options
from models.store.item import Status
from tests.support.fake_client import FakeListener

pytestmark = pytest.mark.anyio


def make_response(target: Target | None = None, options: Options | None = None) -> ActiveResponse:
    """A response of ann's, by default in the conversation conv_1."""
    target = target or StoredConversation("conv_1")
    request = ResponseRequest("ann", [{"role": "user", "content": "Hi"}], options or Options(), target)
    return ActiveResponse(request, Options())


@pytest.fixture
async def response() -> AsyncIterator[ActiveResponse]:
    """A response whose tasks never end by themselves."""
    response = make_response()
    response.start(wait_for_ever(), wait_for_ever())
    yield response
    tasks = [response._generating, response._concluding]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def wait_for_ever() -> None:
    await asyncio.Event().wait()


async def has_ended(response: ActiveResponse) -> bool:
    """Whether the generating task ends where the event loop runs all that is due."""
    for _ in range(3):
        await asyncio.sleep(0)
    return response._generating.done()


@pytest.fixture
def listener(response: ActiveResponse) -> FakeListener:
    """A listener that follows `response`."""
    listener = FakeListener()
    response.add_listener(listener)
    return listener


# Phases and statuses


async def test_a_new_response_reads_its_conversation_and_has_no_text(response: ActiveResponse) -> None:
    assert (response.phase, response.status, response.reason) == (Phase.READING, Status.IN_PROGRESS, None)
    assert (response.user, response.has_text) == ("ann", False)
    assert response.id.startswith("resp_")
    assert response.id != make_response().id


@pytest.mark.parametrize(
    ("target", "conversation"),
    [
        pytest.param(Stateless(), None, id="stateless"),
        pytest.param(Unstored(), None, id="unstored"),
        pytest.param(NewConversation("conv_2"), "conv_2", id="new conversation"),
        pytest.param(StoredConversation("conv_3"), "conv_3", id="stored conversation"),
    ],
)
async def test_an_announced_response_runs_and_tells_its_conversation(target: Target, conversation: str | None) -> None:
    response, listener = make_response(target), FakeListener()
    response.add_listener(listener)
    response.set_prompt(Usage(5), left_out=3)
    response.announce()
    assert (response.phase, response.status) == (Phase.ANNOUNCED, Status.IN_PROGRESS)
    assert listener.rest() == [Created(response.id, conversation, 3)]


@pytest.mark.parametrize(
    ("reason", "status"),
    [("stop", Status.COMPLETED), ("max_output_tokens", Status.INCOMPLETE), ("context_length", Status.INCOMPLETE)],
)
async def test_the_finish_reason_decides_between_completed_and_incomplete(
    response: ActiveResponse, reason: FinishReason, status: Status
) -> None:
    response.announce()
    response.end(reason)
    assert (response.status, response.reason) == (status, reason)
    assert response.phase is Phase.ANNOUNCED  # until its end is stored


async def test_a_finished_response_tells_its_reply(response: ActiveResponse, listener: FakeListener) -> None:
    response.announce()
    response.end("stop")
    response.finish()
    assert response.phase is Phase.FINISHED
    assert listener.rest()[1:] == [Finished("conv_1", response.item)]


async def test_a_failed_response_has_the_reason_server_error(response: ActiveResponse) -> None:
    response.announce()
    response.fail()
    assert (response.status, response.reason) == (Status.FAILED, "server_error")


async def test_a_rejected_response_is_finished(response: ActiveResponse, listener: FakeListener) -> None:
    error = ServerError()
    response.reject(error)
    assert response.phase is Phase.FINISHED
    assert listener.rest() == [Rejected(response.id, error)]


async def test_a_response_warns_only_once(response: ActiveResponse, listener: FakeListener) -> None:
    first, second = NotStoredError(), NotStoredError()
    response.warn(first)
    response.warn(second)
    assert listener.rest() == [Warned(response.id, first)]


# Cancellation


async def test_a_running_response_is_cancelled_at_once(response: ActiveResponse) -> None:
    response.announce()
    response.cancel(Status.CANCELLED, "client_cancelled")
    assert isinstance(await response.wait_generated(), asyncio.CancelledError)
    response.end_cancelled()
    assert (response.status, response.reason) == (Status.CANCELLED, "client_cancelled")


async def test_a_response_in_preparation_is_cancelled_once_it_is_announced(
    response: ActiveResponse, listener: FakeListener
) -> None:
    response.cancel(Status.CANCELLED, "client_cancelled")
    assert not await has_ended(response)
    response.announce()
    assert isinstance(await response.wait_generated(), asyncio.CancelledError)
    assert [type(event) for event in listener.rest()] == [Created]


async def test_the_first_cancellation_decides_the_status_and_reason(response: ActiveResponse) -> None:
    response.announce()
    response.cancel(Status.FAILED, "revoked")
    response.cancel(Status.CANCELLED, "client_cancelled")
    response.end_cancelled()
    assert (response.status, response.reason) == (Status.FAILED, "revoked")


async def test_a_response_that_ends_with_its_process_has_failed(response: ActiveResponse) -> None:
    response.announce()
    response.end_cancelled()
    assert (response.status, response.reason) == (Status.FAILED, "server_shutdown")


async def test_an_error_of_the_generating_task_is_returned() -> None:
    response = make_response()

    async def fail() -> None:
        raise ValueError("no")

    async def conclude() -> None:
        assert isinstance(await response.wait_generated(), ValueError)
        response.fail()

    response.start(fail(), conclude())
    await response.wait_concluded()
    assert response.status == Status.FAILED


# Text


async def test_text_deltas_are_numbered_from_1(response: ActiveResponse, listener: FakeListener) -> None:
    for text in ("Well", ", ", "hi"):
        response.add_text(text)
    assert response.has_text
    assert listener.rest() == [
        TextDelta(response.id, number, text) for number, text in enumerate(["Well", ", ", "hi"], 1)
    ]


async def test_the_item_has_the_reply_as_far_as_it_has_come() -> None:
    response = make_response(options=Options(temperature=1.5, seed=7))
    usage = Usage(5, cached_tokens=2)
    response.set_prompt(usage, left_out=1)
    for text in ("Well", ", ", "hi"):
        usage.output_tokens += 1
        response.add_text(text)
    item = response.item
    assert (item.id, item.role, item.content, item.deltas) == (
        response.id,
        "assistant",
        "Well, hi",
        ["Well", ", ", "hi"],
    )
    assert (item.status, item.reason, item.created) == (Status.IN_PROGRESS, None, response.created)
    assert item.usage == {"input_tokens": 5, "cached_tokens": 2, "output_tokens": 3, "total_tokens": 8}
    assert (item.options, item.left_out) == ({"temperature": 1.5, "seed": 7}, 1)
    assert item.decode_seconds is not None


async def test_an_item_without_text_has_no_deltas(response: ActiveResponse) -> None:
    assert (response.item.content, response.item.deltas, response.item.decode_seconds) == ("", [], 0)


# Listeners and followers


async def test_a_removed_listener_hears_nothing_more(response: ActiveResponse, listener: FakeListener) -> None:
    assert response.is_followed_by(listener)
    response.remove_listener(listener, linger=60)
    assert not response.is_followed_by(listener)
    response.announce()
    assert listener.rest() == []


async def test_a_response_ends_after_the_linger_time_of_its_last_listener(
    response: ActiveResponse, listener: FakeListener
) -> None:
    other = FakeListener()
    response.add_listener(other)
    response.announce()
    response.remove_listener(listener, linger=0)
    response.remove_listener(other, linger=0)
    assert isinstance(await response.wait_generated(), asyncio.CancelledError)
    response.end_cancelled()
    assert (response.status, response.reason) == (Status.CANCELLED, "client_disconnected")


async def test_a_listener_that_comes_back_keeps_the_response_running(
    response: ActiveResponse, listener: FakeListener
) -> None:
    response.announce()
    response.remove_listener(listener, linger=0)
    response.add_listener(listener)
    assert not await has_ended(response)


async def test_a_finished_response_is_not_cancelled_after_its_linger_time(
    response: ActiveResponse, listener: FakeListener
) -> None:
    response.announce()
    response.remove_listener(listener, linger=0)
    response.finish()
    assert not await has_ended(response)


async def test_the_removal_of_an_unknown_listener_changes_nothing(response: ActiveResponse) -> None:
    response.announce()
    response.remove_listener(FakeListener(), linger=0)
    assert not await has_ended(response)


async def test_a_follower_hears_past_deltas_then_new_ones(response: ActiveResponse) -> None:
    response.announce()
    for text in ("one", "two"):
        response.add_text(text)
    follower = FakeListener()
    await response.catch_up(follower, starting_after=1)
    response.add_text("three")
    assert follower.rest() == [TextDelta(response.id, 2, "two"), TextDelta(response.id, 3, "three")]


async def test_a_follower_of_a_waiting_response_hears_its_position(response: ActiveResponse) -> None:
    response.announce()
    for position in (3, 2):
        response.set_position(position)
    follower = FakeListener()
    await response.catch_up(follower, starting_after=0)
    assert follower.rest() == [Queued(response.id, 2)]


async def test_a_follower_hears_no_position_after_the_response_got_its_slot(response: ActiveResponse) -> None:
    response.announce()
    response.set_position(1)
    response.set_admitted()
    follower = FakeListener()
    await response.catch_up(follower, starting_after=0)
    assert follower.rest() == []


async def test_a_follower_that_catches_up_after_the_end_hears_it_once(response: ActiveResponse) -> None:
    response.announce()
    for _ in range(BATCH):
        response.add_text("x")
    follower = FakeListener()
    follower.reading.clear()
    catching_up = asyncio.create_task(response.catch_up(follower, 0))
    await follower.behind.wait()
    response.end("stop")
    response.finish()
    follower.reading.set()
    await catching_up
    assert follower.rest()[BATCH:] == [Finished("conv_1", response.item)]


@pytest.mark.parametrize(
    ("deltas", "pauses"),
    [(0, 0), (BATCH - 1, 0), (BATCH, 1), (2 * BATCH + 1, 2)],
    ids=["nothing", "less than a batch", "one batch", "more than two batches"],
)
async def test_a_replay_waits_for_its_follower_after_each_batch(deltas: int, pauses: int) -> None:
    class CountingListener(FakeListener):
        pauses = 0

        async def wait_sent(self) -> None:
            self.pauses += 1
            assert self.heard.qsize() == self.pauses * BATCH

    follower = CountingListener()
    await replay(follower, "resp_1", ["x"] * deltas, 0)
    assert (follower.heard.qsize(), follower.pauses) == (deltas, pauses)
