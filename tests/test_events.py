from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from models import events
from models.admission import QueueFull
from models.events import InvalidEvent, ResponseCancel, ResponseCreate, ResponseResume, SessionUpdate, parse
from models.item import Item, Message
from models.options import CHECKS
from models.refused import InvalidValue

ANN_SAYS: list[Message] = [{"role": "user", "content": "Hello"}]


def create(**response: Any) -> dict[str, Any]:
    return {"type": "response.create", "event_id": "event_1", "response": {"input": "Hello"} | response}


def update(**options: Any) -> dict[str, Any]:
    return {"type": "session.update", "event_id": "event_1", "session": options}


@pytest.mark.parametrize(
    ("event", "parsed"),
    [
        ({"type": "session.update", "session": {}}, SessionUpdate(None, {})),
        (update(temperature=0, stop="END"), SessionUpdate("event_1", {"temperature": 0, "stop": "END"})),
        ({"type": "response.create", "response": {"input": "Hello"}}, ResponseCreate(None, ANN_SAYS)),
        (create(input=ANN_SAYS, conversation="none"), ResponseCreate("event_1", ANN_SAYS, "none")),
        (create(conversation=None), ResponseCreate("event_1", ANN_SAYS)),
        (create(conversation="conv_1", seed=7), ResponseCreate("event_1", ANN_SAYS, "conv_1", None, {"seed": 7})),
        (create(after="item_1"), ResponseCreate("event_1", ANN_SAYS, None, "item_1")),
        ({"type": "response.resume", "response_id": "resp_1"}, ResponseResume(None, "resp_1", 0)),
        (
            {"type": "response.resume", "event_id": "event_1", "response_id": "resp_1", "starting_after": 3},
            ResponseResume("event_1", "resp_1", 3),
        ),
        ({"type": "response.cancel"}, ResponseCancel(None, None)),
        ({"type": "response.cancel", "response_id": "resp_1"}, ResponseCancel(None, "resp_1")),
        ({"type": "response.cancel", "event_id": "广州", "response_id": None}, ResponseCancel("广州", None)),
    ],
)
def test_a_good_frame_is_a_client_event(event: dict[str, Any], parsed: object) -> None:
    assert parse(json.dumps(event)) == parsed
    assert parse(json.dumps(event, ensure_ascii=False).encode()) == parsed


def test_a_list_of_turns_is_the_history() -> None:
    turns = [{"role": role, "content": f"{role} speaks"} for role in ("system", "user", "assistant", "user")]
    parsed = parse(json.dumps(create(input=turns, conversation="none")))
    assert isinstance(parsed, ResponseCreate)
    assert parsed.input == turns


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "Hello",
        b"\xff\xfe",
        "[]",
        '"response.cancel"',
        "null",
        "{",
        '{"type": "response.cancel"} {}',
        '\ufeff{"type": "response.cancel"}',
        '{"type": NaN}',
        '{"temperature": -Infinity}',
        pytest.param("[" * 100_000, id="deep list"),
        pytest.param('{"a":' * 100_000, id="deep object"),
        pytest.param("9" * 5_000, id="long number"),
        pytest.param(f'{{"seed": {"9" * 5_000}}}', id="long number inside"),
        '{"type": "a\nb"}',
    ],
)
def test_what_is_no_json_object_is_told(frame: str | bytes) -> None:
    with pytest.raises(InvalidEvent) as raised:
        parse(frame)
    error = raised.value
    assert (error.code, error.param, error.event_id) == ("invalid_json", None, None)
    assert str(error).startswith("the frame is n")
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    ("event", "code", "param"),
    [
        ({}, "missing_field", "type"),
        ({"type": None}, "invalid_value", "type"),
        ({"type": 7}, "invalid_value", "type"),
        ({"type": ["response.create"]}, "invalid_value", "type"),
        ({"type": "x" * 257}, "invalid_value", "type"),
        ({"type": "\ud800"}, "invalid_value", "type"),
        ({"type": ""}, "unknown_type", "type"),
        ({"type": "Response.create"}, "unknown_type", "type"),
        ({"type": "session.update"}, "missing_field", "session"),
        ({"type": "session.update", "session": None}, "invalid_value", "session"),
        ({"type": "session.update", "session": []}, "invalid_value", "session"),
        (update(temperature="hot"), "invalid_value", "session.temperature"),
        (update(voice="alto"), "invalid_value", "session.voice"),
        ({"type": "response.create"}, "missing_field", "response"),
        ({"type": "response.create", "response": "Hello"}, "invalid_value", "response"),
        ({"type": "response.create", "response": {}}, "missing_field", "response.input"),
        (create(input=None), "invalid_value", "response.input"),
        (create(input=7), "invalid_value", "response.input"),
        (create(input={"role": "user", "content": "Hello"}), "invalid_value", "response.input"),
        (create(input=[]), "invalid_value", "response.input"),
        (create(input=["Hello"]), "invalid_value", "response.input[0]"),
        (create(input=[{"role": "user"}]), "invalid_value", "response.input[0]"),
        (create(input=[ANN_SAYS[0] | {"name": "ann"}]), "invalid_value", "response.input[0]"),
        (create(input=[*ANN_SAYS, {"role": "tool", "content": "a"}]), "invalid_value", "response.input[1].role"),
        (create(input=[{"role": ["user"], "content": "a"}]), "invalid_value", "response.input[0].role"),
        (create(input=[{"role": "user", "content": None}]), "invalid_value", "response.input[0].content"),
        (create(input=[{"role": "user", "content": " \n"}]), "invalid_value", "response.input[0].content"),
        (create(input=[{"role": "user", "content": "\udc00"}]), "invalid_value", "response.input[0].content"),
        (create(conversation=1), "invalid_value", "response.conversation"),
        (create(conversation={}), "invalid_value", "response.conversation"),
        (create(conversation="c" * 257), "invalid_value", "response.conversation"),
        (create(after=1), "invalid_value", "response.after"),
        (create(after="a" * 257), "invalid_value", "response.after"),
        (create(after="item_1", conversation="none"), "invalid_value", "response.after"),
        ({"type": "response.cancel", "response_id": 1}, "invalid_value", "response_id"),
        ({"type": "response.resume"}, "missing_field", "response_id"),
        ({"type": "response.resume", "response_id": None}, "invalid_value", "response_id"),
        *(
            (
                {"type": "response.resume", "response_id": "r", "starting_after": number},
                "invalid_value",
                "starting_after",
            )
            for number in (-1, 1.5, "1", True, None, [])
        ),
        ({"type": "response.cancel", "response_id": "\udfff"}, "invalid_value", "response_id"),
    ],
)
def test_a_wrong_field_is_told_with_its_name_and_the_events_id(event: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(InvalidEvent) as raised:
        parse(json.dumps(event | {"event_id": "event_1"}))
    error = raised.value
    assert (error.code, error.param, error.event_id) == (code, param, "event_1")
    assert str(error)


@pytest.mark.parametrize("text", ["", " ", "\ud800"])
def test_an_input_that_says_nothing_is_told(text: str) -> None:
    with pytest.raises(InvalidEvent) as raised:
        parse(json.dumps(create(input=text)))
    assert (raised.value.code, raised.value.event_id) == ("invalid_value", "event_1")
    assert str(raised.value.param).startswith("response.input")


@pytest.mark.parametrize("event_id", [7, [], {}, True, "\ud800", "x" * 257])
def test_a_wrong_event_id_is_told_and_not_repeated(event_id: Any) -> None:
    with pytest.raises(InvalidEvent) as raised:
        parse(json.dumps(create() | {"event_id": event_id}))
    error = raised.value
    assert (error.code, error.param, error.event_id) == ("invalid_value", "event_id", None)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("value", [{}, {"a": 1}, [[]], True, -3, 10**4000, 1e308])
def test_each_option_is_checked_in_both_events(name: str, value: Any) -> None:
    for event, where in ((update(**{name: value}), "session"), (create(**{name: value}), "response")):
        with pytest.raises(InvalidEvent) as raised:
            parse(json.dumps(event))
        assert (raised.value.code, raised.value.param) == ("invalid_value", f"{where}.{name}")


names = strategies.sampled_from(
    ["type", "event_id", "session", "response", "response_id", "input", "conversation", "role", "content", *CHECKS]
)
kinds = strategies.sampled_from(["session.update", "response.create", "response.cancel", "user", "none"])
characters = strategies.text(strategies.characters(exclude_categories=[]))
leaves = strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | characters | kinds
values = strategies.recursive(
    leaves,
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(names | characters, inner, max_size=5),
    max_leaves=10,
)
shaped = strategies.fixed_dictionaries({"type": kinds}, optional={"session": values, "response": values})
frames = strategies.binary() | characters | (values | shaped).map(json.dumps)


def answered(frame: str | bytes) -> events.Json:
    """The client event, or the error event that tells what is wrong."""
    try:
        return dataclasses.asdict(parse(frame))
    except InvalidEvent as invalid:
        return events.error(invalid, invalid.event_id)


@settings(max_examples=400, deadline=None)
@given(frames)
def test_whatever_a_frame_holds_it_is_an_event_or_told_in_sendable_words(frame: str | bytes) -> None:
    answer = answered(frame)
    json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()
    if answer.get("type") == "error":
        assert answer["error"]["code"] in ("invalid_json", "unknown_type", "missing_field", "invalid_value")


@pytest.mark.parametrize("event", [update(**{"\ud800": 1}), create(**{"a\udfff": 1})])
def test_an_option_whose_name_cannot_be_sent_is_told_in_words_that_can(event: dict[str, Any]) -> None:
    with pytest.raises(InvalidEvent) as raised:
        parse(json.dumps(event))
    assert raised.value.code == "invalid_value"
    f"{raised.value} {raised.value.param}".encode()


USAGE = {"input_tokens": 3, "cached_tokens": 0, "output_tokens": 2, "total_tokens": 5}
REPLY = Item("r", "assistant", "Hi", 7.0, "completed", "stop", USAGE, {}, 0, "1 1", 0.5)


@pytest.mark.parametrize(
    ("built", "event"),
    [
        (events.session("created", {"id": "s"}), {"type": "session.created", "session": {"id": "s"}}),
        (events.session("updated", {"id": "s"}), {"type": "session.updated", "session": {"id": "s"}}),
        (events.response_queued("r", 2), {"type": "response.queued", "response_id": "r", "position": 2}),
        (
            events.response_created("r", "c", 4, "e"),
            {
                "type": "response.created",
                "response": {"id": "r", "conversation": "c", "status": "in_progress", "left_out": 4},
                "event_id": "e",
            },
        ),
        (
            events.output_text_delta("r", 1, "Hi"),
            {"type": "response.output_text.delta", "response_id": "r", "sequence_number": 1, "delta": "Hi"},
        ),
        (
            events.response_done(None, REPLY),
            {
                "type": "response.done",
                "response": {
                    "id": "r",
                    "conversation": None,
                    "status": "completed",
                    "status_details": {"reason": "stop"},
                    "output_text": "Hi",
                    "usage": USAGE,
                    "decode_seconds": 0.5,
                },
                "sequence_number": 3,
            },
        ),
        (events.presence("joined", "ann"), {"type": "presence.joined", "user": "ann"}),
        (events.presence("left", "ann"), {"type": "presence.left", "user": "ann"}),
        (
            events.error(QueueFull("sorry")),
            {
                "type": "error",
                "error": {"type": "rate_limit_error", "code": "queue_full", "message": "sorry", "retry_after": 5},
            },
        ),
        (
            events.error(InvalidValue("no", "type"), "e"),
            {
                "type": "error",
                "error": {
                    "type": "invalid_request_error",
                    "code": "invalid_value",
                    "message": "no",
                    "param": "type",
                    "event_id": "e",
                },
            },
        ),
    ],
)
def test_a_server_event_has_the_fields_of_the_wire_and_no_more(built: events.Json, event: events.Json) -> None:
    assert built == event
