from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings, strategies as st
from msgspec.structs import replace

from models.errors import FormatFailedError, NotStoredError, ServerError, UpstreamRefusedError
from models.generation.events import (
    Created,
    Finished,
    OutputDelta,
    OutputItemAdded,
    OutputItemDone,
    Queued,
    Rejected,
    ResponseEvent,
    Warned,
)
from models.generation.interface import (
    Branch,
    NewConversation,
    Stateless,
    StoredConversation,
    Target,
    Unstored,
)
from models.generation.response import BATCH, ActiveResponse, Phase, replay
from models.messages import FinishReason, Usage
from models.options import Options
from models.output_item import OutputItem, TokenLogprob
from models.store.item import Status
from tests.support.fake_client import FakeListener
from tests.support.fake_responses import conclude, new_response, perform

pytestmark = pytest.mark.anyio

SCRIPT = 'think Let me see | call weather {"city": "Bonn"} | call time {} | say It is sunny.'


def make_response(target: Target | None = None, options: Options | None = None) -> ActiveResponse:
    """A response of ann's, by default in the conversation conv_1."""
    return new_response(target or StoredConversation("conv_1"), options)


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


async def test_a_new_response_reads_its_conversation_and_has_no_output(response: ActiveResponse) -> None:
    assert (response.phase, response.status, response.reason) == (Phase.READING, Status.IN_PROGRESS, None)
    assert (response.user, response.has_output) == ("ann", False)
    assert response.id.startswith("resp_")
    assert response.id != make_response().id


@pytest.mark.parametrize(
    ("target", "conversation"),
    [
        pytest.param(Stateless(), None, id="stateless"),
        pytest.param(Unstored(), None, id="unstored"),
        pytest.param(NewConversation("conv_2"), "conv_2", id="new conversation"),
        pytest.param(NewConversation("conv_2", listed=False), None, id="new conversation that is not listed"),
        pytest.param(StoredConversation("conv_3"), "conv_3", id="stored conversation"),
        pytest.param(Branch("resp_1"), None, id="branch"),
    ],
)
async def test_an_announced_response_runs_and_tells_its_conversation(target: Target, conversation: str | None) -> None:
    response, listener = make_response(target), FakeListener()
    response.add_listener(listener)
    response.set_prompt(Usage(5), left_out=3)
    response.announce()
    assert (response.phase, response.status) == (Phase.ANNOUNCED, Status.IN_PROGRESS)
    (created,) = listener.rest()
    assert isinstance(created, Created)
    assert (created.response_id, created.conversation, created.reply.left_out) == (response.id, conversation, 3)
    assert (created.reply.status, created.reply.output, created.reply.usage) == (Status.IN_PROGRESS, (), None)


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


async def test_a_failed_response_has_its_reason(response: ActiveResponse) -> None:
    response.announce()
    response.fail(FormatFailedError())
    assert (response.status, response.reason, response.failure) == (Status.FAILED, "format_failed", None)


async def test_a_failed_response_tells_what_its_class_of_errors_does_not(response: ActiveResponse) -> None:
    response.announce()
    response.fail(UpstreamRefusedError("no pictures"))
    assert (response.reason, response.item.failure) == ("upstream_refused", "no pictures")


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
        response.fail(ServerError())

    response.start(fail(), conclude())
    await response.wait_concluded()
    assert response.status == Status.FAILED


# Output


async def test_a_part_begins_before_its_first_piece_and_ends_before_the_next_part(
    response: ActiveResponse, listener: FakeListener
) -> None:
    perform(response, "think abcdef | call f {} | say ok")
    assert [(type(event), event.index) for event in listener.rest()] == [  # type: ignore[union-attr]
        (OutputItemAdded, 0),
        (OutputDelta, 0),
        (OutputDelta, 0),
        (OutputItemDone, 0),
        (OutputItemAdded, 1),
        (OutputDelta, 1),
        (OutputItemDone, 1),
        (OutputItemAdded, 2),
        (OutputDelta, 2),
    ]
    assert [(part.type, part.text, part.complete) for part in response.item.output] == [
        ("reasoning", "abcdef", True),
        ("function_call", "{}", True),
        ("message", "ok", False),
    ]


async def test_two_calls_in_a_row_are_two_parts_with_ids_of_their_own(response: ActiveResponse) -> None:
    perform(response, "call f {} | call f {}")
    first, second = response.item.output
    assert first.name == second.name == "f"
    assert first.call_id != second.call_id
    assert first.call_id.startswith("call_")


async def test_a_call_without_arguments_has_no_piece(response: ActiveResponse, listener: FakeListener) -> None:
    response.begin_call("f")
    response.begin_call("g")
    kinds = [type(event) for event in listener.rest()]
    assert kinds == [OutputItemAdded, OutputItemDone, OutputItemAdded]


async def test_each_piece_keeps_the_probabilities_of_its_tokens(
    response: ActiveResponse, listener: FakeListener
) -> None:
    first, second = [TokenLogprob(b"H", -1.0), TokenLogprob(b"i", -0.5)], [TokenLogprob(b"!", 0.0)]
    response.add_text("message", "Hi", first)
    response.add_text("message", "!", second)
    assert response.item.output[0].logprobs == [first, second]
    assert [event.logprobs for event in listener.rest() if isinstance(event, OutputDelta)] == [first, second]


@pytest.mark.parametrize(
    ("reason", "complete"), [("stop", True), ("max_output_tokens", False), ("context_length", False)]
)
async def test_the_last_part_is_complete_if_the_model_has_ended_it(
    response: ActiveResponse, listener: FakeListener, reason: FinishReason, complete: bool
) -> None:
    response.announce()
    perform(response, SCRIPT)
    conclude(response, reason)
    assert [part.complete for part in response.item.output] == [True, True, True, complete]
    done, finished = listener.rest()[-2:]
    assert isinstance(done, OutputItemDone)
    assert (done.index, done.item.complete) == (3, complete)
    assert finished == Finished("conv_1", response.item)


async def test_a_cancelled_reply_ends_its_last_part_as_incomplete(
    response: ActiveResponse, listener: FakeListener
) -> None:
    response.announce()
    perform(response, "say half a")
    response.cancel(Status.CANCELLED, "client_cancelled")
    response.end_cancelled()
    conclude(response)
    kinds = [type(event) for event in listener.rest()]
    assert kinds == [Created, OutputItemAdded, OutputDelta, OutputDelta, OutputItemDone, Finished]
    assert [part.complete for part in response.item.output] == [False]


async def test_a_completed_reply_that_says_nothing_has_one_empty_message(
    response: ActiveResponse, listener: FakeListener
) -> None:
    response.announce()
    conclude(response, "stop")
    assert [type(event) for event in listener.rest()] == [Created, OutputItemAdded, OutputItemDone, Finished]
    assert response.item.output == [OutputItem("message", complete=True)]


async def test_a_reply_that_was_only_thought_gets_no_empty_message(response: ActiveResponse) -> None:
    response.announce()
    perform(response, "think hm")
    conclude(response, "stop")
    assert [part.type for part in response.item.output] == ["reasoning"]


@pytest.mark.parametrize("reason", ["max_output_tokens", "context_length"])
async def test_an_incomplete_reply_that_says_nothing_has_no_output(
    response: ActiveResponse, reason: FinishReason
) -> None:
    response.announce()
    conclude(response, reason)
    assert response.item.output == []


async def test_a_request_that_generates_nothing_has_no_output() -> None:
    response, listener = new_response(generate=False), FakeListener()
    response.add_listener(listener)
    response.announce()
    conclude(response, "stop")
    assert [type(event) for event in listener.rest()] == [Created, Finished]
    assert (response.item.output, response.status) == ([], Status.COMPLETED)


async def test_the_item_has_the_reply_as_far_as_it_has_come() -> None:
    response = make_response(options=Options(temperature=1.5, seed=7))
    usage = Usage(5, cached_tokens=2)
    response.set_prompt(usage, left_out=1)
    usage.output_tokens = 3
    perform(response, "think so | say Well, hi")
    item = response.item
    assert (item.id, item.role, item.content) == (response.id, "assistant", "Well, hi")
    assert [part.pieces for part in item.output] == [["so"], ["Well", ", hi"]]
    assert (item.status, item.reason, item.created, item.ended) == (
        Status.IN_PROGRESS,
        None,
        response.created,
        None,
    )
    assert item.usage == usage.counts()
    assert (item.options, item.left_out) == ({"temperature": 1.5, "seed": 7}, 1)
    assert item.decode_seconds is not None


async def test_an_item_does_not_change_when_the_reply_grows(response: ActiveResponse) -> None:
    perform(response, "say one")
    before = response.item
    perform(response, "say two")
    assert (before.content, response.item.content) == ("one", "onetwo")
    assert [part.pieces for part in before.output] == [["one"]]


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


async def test_a_response_in_the_background_goes_on_without_listeners() -> None:
    response, listener = new_response(background=True), FakeListener()
    response.start(wait_for_ever(), wait_for_ever())
    response.add_listener(listener)
    response.announce()
    response.remove_listener(listener, linger=0)
    assert not await has_ended(response)
    response.cancel(Status.CANCELLED, "client_cancelled")
    assert isinstance(await response.wait_generated(), asyncio.CancelledError)


# Replays


def repeatable(listener: FakeListener) -> list[ResponseEvent]:
    """What a listener has heard, as a replay has it too: without what tells of a moment."""
    events = [event for event in listener.rest() if not isinstance(event, Queued | Warned)]
    return [replace(event, usage=None) if isinstance(event, OutputDelta) else event for event in events]


async def caught_up(response: ActiveResponse) -> FakeListener:
    follower = FakeListener()
    await response.catch_up(follower)
    return follower


async def test_a_replay_at_any_point_has_the_events_that_came_live(
    response: ActiveResponse, listener: FakeListener
) -> None:
    live: list[ResponseEvent] = []

    async def compare() -> None:
        live.extend(repeatable(listener))
        assert repeatable(await caught_up(response)) == live

    response.announce()
    await compare()
    for type, text in [("reasoning", "hm"), ("reasoning", ", yes"), ("message", "so"), ("message", "!")]:
        response.add_text(type, text)  # type: ignore[arg-type]
        await compare()
    for name in ("f", "g"):
        response.begin_call(name)
        await compare()
    response.add_text("function_call", "{}")
    await compare()
    response.end("max_output_tokens")
    response.close()
    await compare()
    response.finish()
    await compare()
    assert isinstance(live[-1], Finished)


async def test_a_follower_hears_what_comes_after_it_has_caught_up(
    response: ActiveResponse, listener: FakeListener
) -> None:
    follower = FakeListener()
    response.announce()
    perform(response, "think one | say two")
    await response.catch_up(follower)
    perform(response, "say three | call f {}")
    conclude(response, "stop")
    assert repeatable(follower) == repeatable(listener)


PARTS = st.sampled_from(["reasoning", "message", "call", "pause"])


@given(steps=st.lists(PARTS, max_size=24), joins=st.integers(0, 24), ended=st.booleans())
@settings(deadline=None, max_examples=100)
def test_a_follower_hears_the_same_events_whenever_it_comes(steps: list[str], joins: int, ended: bool) -> None:
    async def follow() -> None:
        response, listener, follower = make_response(), FakeListener(), FakeListener()
        response.add_listener(listener)
        response.announce()
        for number, step in enumerate([*steps, "end" if ended else "pause"]):
            if number == joins:
                await response.catch_up(follower)
            match step:
                case "call":
                    response.begin_call("f")
                    response.add_text("function_call", "{}")
                case "reasoning" | "message":
                    response.add_text(step, f"{number} ")
                case "end":
                    conclude(response, "stop")
        if joins > len(steps):
            await response.catch_up(follower)
        assert repeatable(follower) == repeatable(listener)

    asyncio.run(follow())


async def test_a_slow_follower_hears_each_event_once_while_the_reply_grows(
    response: ActiveResponse, listener: FakeListener
) -> None:
    response.announce()
    for _ in range(BATCH):
        response.add_text("message", "x")
    follower = FakeListener()
    follower.reading.clear()
    catching_up = asyncio.create_task(response.catch_up(follower))
    await follower.behind.wait()
    perform(response, "say more | think hm | call f {}")
    follower.reading.set()
    await catching_up
    perform(response, "call g {}")
    conclude(response, "stop")
    assert repeatable(follower) == repeatable(listener)


async def test_a_follower_that_catches_up_after_the_end_hears_it_once(
    response: ActiveResponse, listener: FakeListener
) -> None:
    response.announce()
    for _ in range(BATCH):
        response.add_text("message", "x")
    follower = FakeListener()
    follower.reading.clear()
    catching_up = asyncio.create_task(response.catch_up(follower))
    await follower.behind.wait()
    conclude(response, "stop")
    follower.reading.set()
    await catching_up
    assert repeatable(follower) == repeatable(listener)


async def test_a_follower_that_comes_between_the_last_piece_and_the_end_hears_the_part_end_once(
    response: ActiveResponse, listener: FakeListener
) -> None:
    response.announce()
    perform(response, "say so")
    response.end("stop")
    response.close()
    follower = FakeListener()
    await response.catch_up(follower)
    response.finish()
    assert repeatable(follower) == repeatable(listener)


async def test_a_follower_of_a_response_that_is_not_announced_hears_it_from_the_start(
    response: ActiveResponse, listener: FakeListener
) -> None:
    follower = FakeListener()
    await response.catch_up(follower)
    assert follower.rest() == []
    response.announce()
    assert repeatable(follower) == repeatable(listener)


async def test_a_follower_of_a_waiting_response_hears_its_position(response: ActiveResponse) -> None:
    response.announce()
    for position in (3, 2):
        response.set_position(position)
    assert (await caught_up(response)).rest()[1:] == [Queued(response.id, 2)]


async def test_a_follower_hears_no_position_after_the_response_got_its_slot(response: ActiveResponse) -> None:
    response.announce()
    response.set_position(1)
    response.set_admitted()
    assert [type(event) for event in (await caught_up(response)).rest()] == [Created]


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
            assert sum(isinstance(event, OutputDelta) for event in self.heard._queue) == self.pauses * BATCH  # type: ignore[attr-defined]

    response, follower = make_response(), CountingListener()
    created = Created(None, response.item)
    await replay(follower, created, [OutputItem("message", ["x"] * deltas, complete=True)])
    assert (follower.heard.qsize(), follower.pauses) == (deltas + 3, pauses)
