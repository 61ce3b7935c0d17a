from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings, strategies as st

from models.errors import APIError, PreviousResponseNotFoundError, TooManyResponsesError
from models.generation.events import Queued, ResponseEvent, Warned
from models.generation.response import ActiveResponse
from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.output_item import TokenLogprob
from models.protocols.responses.events import (
    EventRenderer,
    render_error_event,
    render_parley,
    render_presence,
    render_session,
)
from models.store.item import Status
from models.validation import Json
from tests.support.fake_client import FakeListener
from tests.support.fake_responses import answer, conclude, new_response, perform
from tests.support.openai_types import SOCKET_EVENT, check_stream

pytestmark = pytest.mark.anyio

MODEL = ModelList([ModelInfo("tiny", 4096, Options())])


def rendered(events: list[ResponseEvent]) -> list[Json]:
    """The events of a response on the wire."""
    renderer = EventRenderer(MODEL)
    return [one for event in events for one in renderer.render(event)]


def heard(response: ActiveResponse) -> FakeListener:
    listener = FakeListener()
    response.add_listener(listener)
    return listener


async def replayed(response: ActiveResponse) -> list[Json]:
    follower = FakeListener()
    await response.catch_up(follower)
    return rendered(follower.rest())


async def test_the_events_of_a_message_are_those_of_the_standard_in_its_order() -> None:
    response = new_response()
    listener = heard(response)
    answer(response, "say Hello!")
    events = rendered(listener.rest())
    check_stream(events)
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event["delta"] for event in events if "delta" in event] == ["Hell", "o!"]
    assert events[6]["text"] == events[7]["part"]["text"] == events[8]["item"]["content"][0]["text"] == "Hello!"
    assert events[2]["item"]["content"] == []
    assert events[3]["part"]["text"] == ""
    assert events[-1]["response"]["output"] == [events[8]["item"]]


async def test_reasoning_calls_and_text_are_items_with_ids_and_places_of_their_own() -> None:
    response = new_response()
    listener = heard(response)
    answer(response, 'think Let me | call f {"a": 1} | call g {} | say So.')
    events = rendered(listener.rest())
    check_stream(events)
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["item"]["type"] for event in done] == ["reasoning", "function_call", "function_call", "message"]
    assert [event["output_index"] for event in done] == [0, 1, 2, 3]
    assert [event["item"] for event in done] == events[-1]["response"]["output"]
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == done[event["output_index"]]["item"]["id"]
    types = [event["type"] for event in events if "delta" in event["type"]]
    assert types == [
        *["response.reasoning_text.delta"] * 2,
        *["response.function_call_arguments.delta"] * 3,
        "response.output_text.delta",
    ]
    named = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [(event["name"], event["arguments"]) for event in named] == [("f", '{"a": 1}'), ("g", "{}")]


async def test_a_response_in_the_background_is_queued_first() -> None:
    response = new_response(details={"background": True}, background=True)
    listener = heard(response)
    answer(response, "say yes")
    events = rendered(listener.rest())
    check_stream(events)
    assert [(event["type"], event["response"]["status"]) for event in events[:3]] == [
        ("response.created", "queued"),
        ("response.queued", "queued"),
        ("response.in_progress", "in_progress"),
    ]


@pytest.mark.parametrize(
    ("status", "reason", "type"),
    [
        (Status.COMPLETED, "stop", "response.completed"),
        (Status.INCOMPLETE, "max_output_tokens", "response.incomplete"),
        (Status.INCOMPLETE, "steered", "response.incomplete"),
        (Status.CANCELLED, "client_cancelled", "response.incomplete"),
        (Status.FAILED, "server_error", "response.failed"),
    ],
)
async def test_each_status_has_one_final_event(status: Status, reason: str, type: str) -> None:
    response = new_response()
    listener = heard(response)
    response.announce()
    perform(response, "say half")
    response.status, response.reason = status, reason
    conclude(response)
    events = rendered(listener.rest())
    check_stream(events)
    assert (events[-1]["type"], events[-1]["response"]["status"]) == (type, status)
    item_status = "completed" if status == Status.COMPLETED else "incomplete"
    assert events[-2]["item"]["status"] == item_status


async def test_probabilities_come_with_the_delta_and_with_the_whole_text() -> None:
    response = new_response()
    listener = heard(response)
    response.announce()
    response.add_text("message", "Hi", [TokenLogprob(b"H", -1.0, [(b"H", -1.0)]), TokenLogprob(b"i", -0.5)])
    response.add_text("message", "!", [TokenLogprob(b"!", 0.0)])
    conclude(response, "stop")
    events = rendered(listener.rest())
    check_stream(events)
    told = [[one["token"] for one in event["logprobs"]] for event in events if "logprobs" in event]
    assert told == [["H", "i"], ["!"], ["H", "i", "!"]]
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == events[-4]["logprobs"]


def test_moments_of_a_response_take_no_number() -> None:
    renderer = EventRenderer(MODEL)
    assert renderer.render(Queued("resp_1", 2)) == []
    assert renderer.render(Warned("resp_1", TooManyResponsesError("no"))) == []
    assert renderer.last == 0


STEPS = st.lists(st.sampled_from(["think a", "say bcdefg", "call f {}", "call g "]), max_size=12)


@given(steps=STEPS, background=st.booleans(), reason=st.sampled_from(["stop", "max_output_tokens"]), data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_replay_after_any_number_is_the_rest_of_the_live_stream(
    steps: list[str], background: bool, reason: str, data: st.DataObject
) -> None:
    async def compare() -> None:
        response = new_response(details={"background": background})
        listener = heard(response)
        response.announce()
        live: list[Json] = []
        renderer = EventRenderer(MODEL)
        for step in steps:
            perform(response, step)
            live += [one for event in listener.rest() for one in renderer.render(event)]
            assert await replayed(response) == live
        conclude(response, reason)  # type: ignore[arg-type]
        live += [one for event in listener.rest() for one in renderer.render(event)]
        replay = await replayed(response)
        after = data.draw(st.integers(-1, len(live)))
        assert [one for one in replay if one["sequence_number"] > after] == live[after + 1 :]
        check_stream(replay)
        assert json.loads(json.dumps(replay)) == replay

    asyncio.run(compare())


# Errors, and what only /ws has


@pytest.mark.parametrize("stream_id", [None, "", "main"])
def test_an_error_on_a_socket_has_the_form_of_the_standard(stream_id: str | None) -> None:
    event = render_error_event(PreviousResponseNotFoundError("resp_1"), stream_id)
    parsed = SOCKET_EVENT.validate_python(event)
    assert (event["type"], event["status"], parsed.stream_id) == ("error", 400, stream_id)
    assert ("stream_id" in event) == (stream_id is not None)
    assert event["error"]["type"] == "invalid_request_error"
    assert event["error"]["code"] == "previous_response_not_found"
    assert event["error"]["param"] == "previous_response_id"
    assert "resp_1" in event["error"]["message"]


def test_an_error_says_in_a_header_when_to_try_again() -> None:
    error: APIError = TooManyResponsesError("too many")
    parsed = SOCKET_EVENT.validate_python(render_error_event(error))
    assert (parsed.status, parsed.error.headers) == (429, {"retry-after": str(error.retry_after)})


def test_the_events_of_the_page_carry_its_prefix_and_no_number() -> None:
    events = [
        render_parley(Queued("resp_1", 2)),
        render_parley(Warned("resp_1", TooManyResponsesError("no"))),
        render_presence("joined", "bob"),
        render_presence("left", "bob"),
        render_session({"id": "sess_1"}),
    ]
    assert [event["type"] for event in events] == [
        "parley.queue",
        "parley.warning",
        "parley.presence.joined",
        "parley.presence.left",
        "parley.session.created",
    ]
    assert not any("sequence_number" in event for event in events)
    assert (events[0]["response_id"], events[0]["position"]) == ("resp_1", 2)
