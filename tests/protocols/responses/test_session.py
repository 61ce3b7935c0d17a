from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from models.errors import PreviousResponseNotFoundError
from models.generation.interface import Branch, NewConversation, StoredConversation, Target, Unstored
from models.generation.response import ActiveResponse
from models.messages import Message
from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.protocols.client import Close
from models.protocols.responses.session import BAD_FRAMES, WAITING, WAITING_BYTES, ResponsesSession
from models.protocols.responses.steering import MAX_STEERS
from models.validation import Json
from tests.support.fake_client import FakeClient
from tests.support.fake_responses import FakeResponses, answer, conclude, perform
from tests.support.openai_types import SOCKET_EVENT, check_stream

pytestmark = pytest.mark.anyio

MODEL = ModelList([ModelInfo("tiny", 4096, Options())])
FINAL = ("response.completed", "response.incomplete", "response.failed")


class Connection:
    """A session and its client."""

    def __init__(self, fake: FakeResponses) -> None:
        self.client = FakeClient()
        self.session = ResponsesSession(fake, MODEL, "ann", self.client)

    def send(self, type: str, **fields: Any) -> Close | None:
        """Send a client event."""
        return self.session.receive(json.dumps({"type": type} | fields))

    def create(self, input: Any = "Hi", **fields: Any) -> None:
        """Send `response.create`."""
        assert self.send("response.create", input=input, **fields) is None

    async def events(self) -> list[Json]:
        """The events up to the end of a reply."""
        events = [await self.client.sent.get()]
        while events[-1]["type"] not in FINAL:
            events.append(await self.client.sent.get())
        return events

    async def error(self) -> Json:
        """The next event, which is an error."""
        event: Json = await self.client.sent.get()
        SOCKET_EVENT.validate_python(event)
        assert event["type"] == "error"
        return event


@pytest.fixture
async def connection(fake: FakeResponses) -> AsyncIterator[Connection]:
    connection = Connection(fake)
    yield connection
    connection.session.close()


def asked_last(fake: FakeResponses) -> tuple[Target, str | None]:
    """Where the last request goes, and what it continues."""
    return fake.asked[-1].target, fake.asked[-1].previous


async def turn(connection: Connection, fake: FakeResponses, script: str, input: Any = "Hi", **fields: Any) -> str:
    """A request and its whole reply; the id of the response."""
    connection.create(input, **fields)
    response = await fake.next()
    answer(response, script)
    await connection.events()
    return response.id


def heard(fake: FakeResponses) -> list[Any]:
    """The messages of the last request, in short."""
    shown = ("content", "reasoning", "tool_calls", "tool_call_id")
    return [[message[key] for key in shown if message.get(key)] for message in fake.asked[-1].chat.messages]  # type: ignore[literal-required]


# Requests and replies


async def test_a_request_is_answered_with_the_events_of_the_standard(
    connection: Connection, fake: FakeResponses
) -> None:
    connection.create(model="tiny", stream=True, temperature=0)
    answer(await fake.next(), "think hm | call f {} | say Hello!")
    events = await connection.events()
    check_stream(events)
    assert not any("stream_id" in event for event in events)
    assert fake.asked[0].user == "ann"
    assert fake.asked[0].chat.options.temperature == 0


async def test_requests_of_one_lane_are_answered_one_after_the_other(
    connection: Connection, fake: FakeResponses
) -> None:
    for text in ("one", "two", "three"):
        connection.create(text, stream_id="a")
    for text in ("one", "two", "three"):
        response = await fake.next()
        assert (heard(fake), fake.waiting) == ([[text]], 0)
        answer(response, f"say {text}")
        events = await connection.events()
        assert {event["stream_id"] for event in events} == {"a"}
        check_stream(events)


async def test_lanes_are_answered_at_the_same_time(connection: Connection, fake: FakeResponses) -> None:
    lanes: list[Json] = [{"stream_id": "a"}, {}, {"stream_id": ""}]
    for lane in lanes:
        connection.create(json.dumps(lane), **lane)
    responses = [await fake.next() for _ in lanes]
    for response in responses:
        response.announce()
    for response in responses:
        perform(response, "say x")
    for response in reversed(responses):
        conclude(response, "stop")
    events = [event for _ in lanes for event in await connection.events()]
    for lane, response in zip(lanes, responses, strict=True):
        own = [event for event in events if {k: v for k, v in event.items() if k == "stream_id"} == lane]
        check_stream(own)
        assert own[-1]["response"]["id"] == response.id


async def test_requests_without_a_lane_wait_for_each_other(connection: Connection, fake: FakeResponses) -> None:
    connection.create("one")
    connection.create("two")
    first = await fake.next()
    first.announce()
    perform(first, "say half")
    assert len(fake.asked) == 1
    conclude(first, "stop")
    answer(await fake.next(), "say ok")
    assert [(await connection.events())[-1]["type"] for _ in range(2)] == ["response.completed"] * 2


async def test_only_so_many_requests_wait(connection: Connection, fake: FakeResponses) -> None:
    connection.create("one")
    await fake.next()
    for _ in range(WAITING):
        connection.create("next")
    connection.create("one too many", stream_id="b")
    error = await connection.error()
    assert (error["status"], error["error"]["code"], error["stream_id"]) == (429, "too_many_responses", "b")
    assert error["error"]["headers"] == {"retry-after": "1"}


async def test_only_so_many_bytes_of_requests_wait(connection: Connection, fake: FakeResponses) -> None:
    connection.create("x" * WAITING_BYTES)
    (await fake.next()).announce()
    connection.create("y" * WAITING_BYTES)  # one may always wait
    connection.create("one too many", stream_id="b")
    error = await connection.client.sent.get()
    while error["type"] != "error":
        error = await connection.client.sent.get()
    assert (error["status"], error["error"]["code"], error["stream_id"]) == (429, "too_many_responses", "b")


async def test_requests_whose_items_are_being_read_wait_too() -> None:
    class Slow(FakeResponses):
        async def find_message(self, user: str, id: str) -> Message:
            await asyncio.Event().wait()
            raise AssertionError

    connection = Connection(Slow())
    for lane in range(WAITING):
        connection.create([{"type": "item_reference", "id": "msg_1"}], stream_id=str(lane))
        await asyncio.sleep(0)  # its lane begins
    connection.create("one too many", stream_id="b")
    error = await connection.error()
    assert (error["status"], error["error"]["code"], error["stream_id"]) == (429, "too_many_responses", "b")
    connection.session.close()


# Errors


@pytest.mark.parametrize(
    ("frame", "code", "param"),
    [
        ("Hi", "invalid_json", None),
        ("[]", "invalid_json", None),
        (b"\xff", "invalid_json", None),
        ("{}", "missing_field", "type"),
        ('{"type": 7}', "invalid_value", "type"),
        ('{"type": "session.update"}', "unknown_type", "type"),
        ('{"type": "response.cancel"}', "unknown_type", "type"),
        ('{"type": "parley.response.cancel"}', "unknown_type", "type"),
        ('{"type": "response.create"}', "invalid_value", "input"),
        ('{"type": "response.create", "input": "Hi", "event_id": "x"}', "unknown_parameter", "event_id"),
        ('{"type": "response.create", "input": "Hi", "background": true}', "invalid_value", "background"),
        ('{"type": "response.create", "input": "Hi", "stream_id": 7}', "invalid_value", "stream_id"),
        ('{"type": "response.create", "input": "Hi", "stream_id": "%s"}' % ("x" * 257), "invalid_value", "stream_id"),
        ('{"type": "response.create", "input": "Hi", "model": "gpt-9"}', "model_not_found", "model"),
    ],
)
async def test_a_bad_frame_gets_an_error_and_the_next_one_a_reply(
    connection: Connection, fake: FakeResponses, frame: str | bytes, code: str, param: str | None
) -> None:
    assert connection.session.receive(frame) is None
    error = await connection.error()
    assert (error["error"]["code"], error["error"]["param"]) == (code, param)
    assert error["status"] in (400, 404)
    await turn(connection, fake, "say ok")


async def test_an_error_comes_back_in_its_lane(connection: Connection) -> None:
    connection.send("response.create", stream_id="a", input=7)
    assert (await connection.error())["stream_id"] == "a"


async def test_bad_frames_in_a_row_close_the_connection(connection: Connection) -> None:
    for _ in range(BAD_FRAMES - 1):
        assert connection.session.receive("x") is None
    connection.create()  # from here on, they count anew
    for _ in range(BAD_FRAMES - 1):
        assert connection.session.receive("x") is None
    assert connection.session.receive("x") == Close(4400, "20 bad frames in a row")


async def test_what_is_not_found_or_too_much_is_no_bad_frame(connection: Connection) -> None:
    for _ in range(2 * BAD_FRAMES):
        assert connection.send("response.create", input="Hi", model="gpt-9") is None


async def test_a_rejected_request_gets_an_error_and_the_lane_goes_on(
    connection: Connection, fake: FakeResponses
) -> None:
    connection.create("one", stream_id="a", previous_response_id="resp_1")
    connection.create("two", stream_id="a")
    (await fake.next()).reject(PreviousResponseNotFoundError("resp_1"))
    error = await connection.error()
    assert (error["status"], error["stream_id"]) == (400, "a")
    assert (error["error"]["code"], error["error"]["param"]) == ("previous_response_not_found", "previous_response_id")
    answer(await fake.next(), "say ok")
    assert (await connection.events())[-1]["type"] == "response.completed"


async def test_a_reference_to_an_unknown_item_gets_an_error_and_the_lane_goes_on(
    connection: Connection, fake: FakeResponses
) -> None:
    fake.messages["msg_1"] = {"role": "user", "content": "stored"}
    connection.create([{"type": "item_reference", "id": "msg_2"}], stream_id="a")
    connection.create([{"type": "item_reference", "id": "msg_1"}, {"role": "user", "content": "new"}], stream_id="a")
    error = await connection.error()
    assert (error["status"], error["error"]["code"], error["stream_id"]) == (404, "item_not_found", "a")
    await fake.next()
    assert heard(fake) == [["stored"], ["new"]]


async def test_a_bug_in_one_request_leaves_the_others(fake: FakeResponses) -> None:
    class Broken(FakeResponses):
        def create(self, request: Any, listener: Any) -> str:
            if request.chat.messages[0]["content"] == "break":
                raise RuntimeError("a bug")
            return super().create(request, listener)

    broken = Broken()
    connection = Connection(broken)
    connection.create("break")
    error = await connection.error()
    assert (error["status"], error["error"]["code"]) == (500, "server_error")
    await turn(connection, broken, "say ok")


async def test_moments_without_an_event_of_the_standard_are_not_told(
    connection: Connection, fake: FakeResponses
) -> None:
    connection.create()
    response = await fake.next()
    response.announce()
    response.set_position(2)
    response.warn(PreviousResponseNotFoundError("x"))
    connection.session.presence_changed("joined", "bob")
    conclude(response, "stop")
    assert not any(event["type"].startswith("parley") for event in await connection.events())


# Conversations


async def test_a_stored_response_is_continued_where_it_is_stored(connection: Connection, fake: FakeResponses) -> None:
    first = await turn(connection, fake, "say one")
    assert isinstance(fake.asked[-1].target, NewConversation)
    await turn(connection, fake, "say two", "more", previous_response_id=first)
    assert asked_last(fake) == (Branch(first), first)
    assert heard(fake) == [["more"]]


async def test_responses_that_are_not_stored_are_continued_on_their_connection(
    connection: Connection, fake: FakeResponses
) -> None:
    stored = await turn(connection, fake, "say zero")
    first = await turn(connection, fake, "think hm | say one", "a", store=False, previous_response_id=stored)
    assert (fake.asked[-1].target, heard(fake)) == (Unstored(stored), [["a"]])
    second = await turn(connection, fake, "say two", "b", store=False, previous_response_id=first)
    assert asked_last(fake) == (Unstored(stored), first)
    assert heard(fake) == [["a"], ["one", "hm"], ["b"]]
    await turn(connection, fake, "say three", "c", store=False, previous_response_id=second)
    assert heard(fake) == [["a"], ["one", "hm"], ["b"], ["two"], ["c"]]
    await turn(connection, fake, "say fork", "d", store=False, previous_response_id=first)
    assert heard(fake) == [["a"], ["one", "hm"], ["d"]]


async def test_a_stored_response_can_continue_one_that_is_not(connection: Connection, fake: FakeResponses) -> None:
    stored = await turn(connection, fake, "say zero")
    first = await turn(connection, fake, "say one", "a", store=False, previous_response_id=stored)
    await turn(connection, fake, "say two", "b", previous_response_id=first)
    assert asked_last(fake) == (Branch(stored), first)
    assert heard(fake) == [["a"], ["one"], ["b"]]
    alone = await turn(connection, fake, "say one", "a", store=False)
    await turn(connection, fake, "say two", "b", previous_response_id=alone)
    assert isinstance(fake.asked[-1].target, NewConversation)
    assert heard(fake) == [["a"], ["one"], ["b"]]


async def test_calls_that_are_not_stored_are_answered_by_their_results(
    connection: Connection, fake: FakeResponses
) -> None:
    first = await turn(connection, fake, "call f {} | call g {}", store=False)
    calls = [part.call_id for part in fake._responses[first].item.output]
    outputs = [{"type": "function_call_output", "call_id": id, "output": "7"} for id in calls]
    await turn(connection, fake, "say ok", outputs, store=False, previous_response_id=first)
    messages = fake.asked[-1].chat.messages
    assert [call["id"] for call in messages[1]["tool_calls"]] == calls
    assert [message.get("tool_call_id") for message in messages[2:]] == calls


async def test_a_response_without_output_prepares_the_next_one(connection: Connection, fake: FakeResponses) -> None:
    connection.create([], generate=False, store=False, instructions="Be brief.")
    response = await fake.next()
    assert not fake.asked[-1].generate
    response.announce()
    conclude(response, "stop")
    events = await connection.events()
    check_stream(events)
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.completed"]
    await turn(connection, fake, "say ok", "Hi", previous_response_id=response.id, store=False)
    assert heard(fake)[-1] == ["Hi"]


async def test_another_connection_does_not_have_what_is_not_stored(fake: FakeResponses) -> None:
    one, other = Connection(fake), Connection(fake)
    first = await turn(one, fake, "say one", "a", store=False)
    other.create("b", previous_response_id=first, store=False)
    await fake.next()
    assert (fake.asked[-1].target, heard(fake)) == (Unstored(first), [["b"]])
    other.session.close()


# The end of a connection


async def test_a_closed_connection_leaves_its_responses_and_begins_no_more(
    connection: Connection, fake: FakeResponses
) -> None:
    connection.create("one")
    connection.create("two")
    response = await fake.next()
    response.announce()
    connection.session.close()
    assert fake.left == [connection.session]
    connection.client.rest()
    answer_rest(response)
    assert connection.client.rest() == []
    assert len(fake.asked) == 1


def answer_rest(response: ActiveResponse) -> None:
    perform(response, "say on")
    conclude(response, "stop")


# Steering


async def steered(connection: Connection, fake: FakeResponses, script: str, **fields: Any) -> ActiveResponse:
    """A reply that has said something, and gets more input of the user."""
    connection.create("first", **fields)
    response = await fake.next()
    response.announce()
    perform(response, script)
    connection.client.rest()
    connection.send("response.steer", previous_response_id=response.id, input="no, second")
    return response


async def test_input_for_a_running_reply_ends_it_and_is_answered_by_the_next(
    connection: Connection, fake: FakeResponses
) -> None:
    connection.create("waits", stream_id="b")
    waiting = await fake.next()
    response = await steered(connection, fake, "think hm | say Well", stream_id="a", temperature=0)
    connection.create("later", stream_id="a")
    accepted, *rest = await connection.events()
    SOCKET_EVENT.validate_python(accepted)
    assert (accepted["type"], accepted["stream_id"]) == ("response.steer.accepted", "a")
    assert accepted["steer"]["previous_response_id"] == response.id
    assert accepted["steer"]["id"].startswith("steer_")
    assert rest[-1]["type"] == "response.incomplete"
    assert rest[-1]["response"]["incomplete_details"] == {"reason": "steered"}
    assert accepted["sequence_number"] == rest[0]["sequence_number"] - 1
    successor = await fake.next()
    assert heard(fake) == [["no, second"]]
    assert asked_last(fake) == (Branch(response.id), response.id)
    assert fake.asked[-1].chat.options.temperature == 0
    answer(successor, "say ok")
    events = await connection.events()
    check_stream(events)
    assert events[0]["response"]["previous_response_id"] == response.id
    await fake.next()
    assert heard(fake) == [["later"]]
    answer(waiting, "say ok")


async def test_input_for_a_reply_that_is_not_stored_is_answered_too(
    connection: Connection, fake: FakeResponses
) -> None:
    await steered(connection, fake, "say Well", store=False)
    await fake.next()
    assert heard(fake) == [["first"], ["Well"], ["no, second"]]


async def test_input_for_a_reply_in_a_conversation_is_answered_behind_that_reply(
    connection: Connection, fake: FakeResponses
) -> None:
    response = await steered(connection, fake, "say Well", conversation={"id": "conv_1", "after": "msg_1"})
    answer(await fake.next(), "say ok")
    assert fake.asked[-1].target == StoredConversation("conv_1", response.id)
    response = await steered(connection, fake, "say Well", conversation="new")
    conversation = fake.asked[-1].target
    await fake.next()
    assert isinstance(conversation, NewConversation | StoredConversation)
    assert fake.asked[-1].target == StoredConversation(conversation.id, response.id)


async def test_input_for_a_reply_that_calls_tools_waits_for_their_results(
    connection: Connection, fake: FakeResponses
) -> None:
    response = await steered(connection, fake, "call f {", stream_id="a")
    perform(response, "call g {}")
    assert len(fake.asked) == 1
    conclude(response, "stop")
    accepted = await connection.client.sent.get()
    events = await connection.events()
    assert events[-1]["type"] == "response.completed"
    pending = await connection.client.sent.get()
    SOCKET_EVENT.validate_python(pending)
    assert (pending["type"], pending["steer"], pending["stream_id"]) == (
        "response.steer.pending",
        accepted["steer"],
        "a",
    )
    calls = [(part.call_id, part.name) for part in response.item.output]
    assert [(one["call_id"], one["name"]) for one in pending["required_input"]] == calls
    outputs = [{"type": "function_call_output", "call_id": id, "output": "7"} for id, _ in calls]
    connection.create(outputs, previous_response_id=response.id, stream_id="a")
    (await fake.next()).reject(PreviousResponseNotFoundError("x"))  # the input is still there for the next try
    await connection.error()
    for steers in (1, 0):
        connection.create(outputs, previous_response_id=response.id, stream_id="a")
        answer(await fake.next(), "say ok")
        contents = [message["content"] for message in fake.asked[-1].chat.messages]
        assert contents == [*["no, second"] * steers, "7", "7"]
        await connection.events()


async def test_input_for_a_reply_that_is_cancelled_or_fails_comes_back(
    connection: Connection, fake: FakeResponses
) -> None:
    response = await steered(connection, fake, "call f {}")
    await fake.cancel("ann", response.id)
    accepted, *_ = await connection.events()
    failed = await connection.client.sent.get()
    SOCKET_EVENT.validate_python(failed)
    assert (failed["type"], failed["error"]["code"]) == ("response.steer.failed", "response_not_active")
    assert failed["steer"] == accepted["steer"] | {"input": "no, second"}


async def test_input_that_no_reply_can_answer_comes_back(connection: Connection, fake: FakeResponses) -> None:
    response = await steered(connection, fake, "say Well", stream_id="a")
    accepted, *_ = await connection.events()
    (await fake.next()).reject(PreviousResponseNotFoundError(response.id))
    failed = await connection.client.sent.get()
    SOCKET_EVENT.validate_python(failed)
    assert (failed["type"], failed["error"]["code"]) == ("response.steer.failed", "successor_creation_failed")
    assert (failed["steer"]["id"], failed["stream_id"]) == (accepted["steer"]["id"], "a")


@pytest.mark.parametrize(
    ("input", "told"),
    [
        (7, ""),
        (None, ""),
        ("", ""),
        ([{"role": "system", "content": "x"}], None),
        ([{"type": "function_call_output", "call_id": "x", "output": "x"}], None),
        ([{"type": "item_reference", "id": "x"}], None),
        ("\ud800", ""),
        ([{"role": "user", "content": "x", "more": "\ud800"}], ""),  # it could not be sent back, if nothing answers it
    ],
)
async def test_bad_input_for_a_running_reply_is_refused_and_the_reply_goes_on(
    connection: Connection, fake: FakeResponses, input: Any, told: Any
) -> None:
    connection.create()
    response = await fake.next()
    response.announce()
    connection.client.rest()
    assert connection.send("response.steer", previous_response_id=response.id, input=input) is None
    failed = await connection.client.sent.get()
    SOCKET_EVENT.validate_python(failed | {"steer": {"previous_response_id": response.id, "input": ""}})
    assert (failed["type"], failed["error"]["code"]) == ("response.steer.failed", "invalid_input")
    assert failed["steer"] == {"previous_response_id": response.id, "input": input if told is None else told}
    answer_rest(response)
    assert (await connection.events())[-1]["type"] == "response.completed"


async def test_input_for_a_reply_that_is_not_running_here_is_refused(
    connection: Connection, fake: FakeResponses
) -> None:
    ended = await turn(connection, fake, "say ok")
    for id in (ended, "resp_1"):
        connection.send("response.steer", previous_response_id=id, input="more")
        failed = await connection.client.sent.get()
        SOCKET_EVENT.validate_python(failed)
        assert (failed["type"], failed["error"]["code"]) == ("response.steer.failed", "response_not_found")
        assert failed["steer"] == {"previous_response_id": id, "input": "more"}


async def test_only_so_much_input_waits_for_running_replies(connection: Connection, fake: FakeResponses) -> None:
    connection.create()
    response = await fake.next()
    response.announce()
    perform(response, "call f {")
    connection.client.rest()
    for _ in range(MAX_STEERS + 1):
        connection.send("response.steer", previous_response_id=response.id, input="more")
    *accepted, failed = connection.client.rest()
    assert {event["type"] for event in accepted} == {"response.steer.accepted"}
    assert (failed["type"], failed["error"]["code"]) == ("response.steer.failed", "too_many_pending_steers")
