from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies

from models.errors import (
    ContextLengthExceededError,
    InvalidRequestError,
    InvalidValueError,
    ItemNotFoundError,
    NotStoredError,
    QueueFullError,
)
from models.generation.events import Created, Finished, Queued, Rejected, TextDelta, Warned
from models.messages import MAX_MESSAGES, Message
from models.options import Options
from models.protocols.chat_v1_events import (
    ClientEvent,
    InputMessage,
    ResponseCancel,
    ResponseCreate,
    ResponseResume,
    SessionUpdate,
    parse_event,
    parse_event_id,
    render,
    render_error,
    render_presence,
    render_session,
)
from models.store.item import Item, Status
from models.validation import Json, parse_object

HELLO: list[Message] = [{"role": "user", "content": "Hello"}]
MESSAGES = [InputMessage("user", "Hello")]
BAD_NUMBERS: list[Any] = [-1, 1.5, "1", True, None, []]


OPTION_NAMES = Options.__struct_fields__


def create(**response: Any) -> Json:
    return {"type": "response.create", "event_id": "event_1", "response": {"input": "Hello"} | response}


def update(**options: Any) -> Json:
    return {"type": "session.update", "event_id": "event_1", "session": options}


def resume(starting_after: Any) -> Json:
    return {"type": "response.resume", "response_id": "r", "starting_after": starting_after}


def parse(frame: str | bytes) -> tuple[str | None, ClientEvent | InvalidRequestError]:
    """The event id of a frame, where it is known, and the event or the error."""
    event_id = None
    try:
        fields = parse_object(frame, "the frame")
        event_id = parse_event_id(fields)
        return event_id, parse_event(fields)
    except InvalidRequestError as error:
        return event_id, error


def rejected(frame: str | bytes) -> tuple[str | None, InvalidRequestError]:
    """The event id of a bad frame, where it is known, and the error."""
    event_id, error = parse(frame)
    assert isinstance(error, InvalidRequestError)
    return event_id, error


# Client events


@pytest.mark.parametrize(
    ("event", "event_id", "parsed"),
    [
        ({"type": "session.update", "session": {}}, None, SessionUpdate({})),
        (update(temperature=0, stop="END"), "event_1", SessionUpdate({"temperature": 0, "stop": "END"})),
        ({"type": "response.create", "response": {"input": "Hello"}}, None, ResponseCreate("Hello")),
        (create(input=HELLO, conversation="none"), "event_1", ResponseCreate(MESSAGES, "none")),
        (create(conversation=None), "event_1", ResponseCreate("Hello")),
        (create(conversation="conv_1", seed=7), "event_1", ResponseCreate("Hello", "conv_1", None, {"seed": 7})),
        (create(after="item_1"), "event_1", ResponseCreate("Hello", None, "item_1")),
        ({"type": "response.resume", "response_id": "resp_1"}, None, ResponseResume("resp_1", 0)),
        (
            {"type": "response.resume", "event_id": "event_1", "response_id": "resp_1", "starting_after": 3},
            "event_1",
            ResponseResume("resp_1", 3),
        ),
        ({"type": "response.cancel"}, None, ResponseCancel(None)),
        ({"type": "response.cancel", "response_id": "resp_1"}, None, ResponseCancel("resp_1")),
        ({"type": "response.cancel", "event_id": "广州", "response_id": None}, "广州", ResponseCancel(None)),
        ({"type": "response.cancel", "colour": "red", "\ud800": 1}, None, ResponseCancel(None)),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else None,
)
def test_a_good_frame_is_a_client_event(event: Json, event_id: str | None, parsed: ClientEvent) -> None:
    assert parse(json.dumps(event)) == (event_id, parsed)
    assert parse(json.dumps(event).encode()) == (event_id, parsed)
    assert parse(json.dumps(event, ensure_ascii=False)) == (event_id, parsed)


def test_a_frame_of_bytes_is_utf_8() -> None:
    frame = json.dumps(create(input="广州"), ensure_ascii=False).encode()
    assert parse(frame) == ("event_1", ResponseCreate("广州"))


@pytest.mark.parametrize("input", ["Hello", HELLO], ids=["text", "list"])
def test_an_input_is_a_list_of_messages(input: Any) -> None:
    _, parsed = parse(json.dumps(create(input=input)))
    assert isinstance(parsed, ResponseCreate)
    assert parsed.messages == HELLO


def test_an_input_can_hold_a_whole_history() -> None:
    messages = [{"role": role, "content": f"{role} speaks"} for role in ("system", "user", "assistant", "user")]
    _, parsed = parse(json.dumps(create(input=messages, conversation="none")))
    assert isinstance(parsed, ResponseCreate)
    assert parsed.messages == messages


def test_an_input_has_a_thousand_messages_at_most() -> None:
    _, parsed = parse(json.dumps(create(input=HELLO * MAX_MESSAGES)))
    assert isinstance(parsed, ResponseCreate)
    assert len(parsed.messages) == 1000
    _, error = rejected(json.dumps(create(input=HELLO * (MAX_MESSAGES + 1))))
    assert (error.code, error.param) == ("invalid_value", "response.input")


# Bad frames


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
    ids=ascii,
)
def test_a_frame_that_is_no_json_object_is_rejected(frame: str | bytes) -> None:
    event_id, error = rejected(frame)
    assert (error.code, error.param, event_id) == ("invalid_json", None, None)
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
        (create(input=[{**HELLO[0], "name": "ann"}]), "invalid_value", "response.input[0]"),
        (create(input=[*HELLO, {"role": "tool", "content": "a"}]), "invalid_value", "response.input[1].role"),
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
        *((resume(number), "invalid_value", "starting_after") for number in BAD_NUMBERS),
        ({"type": "response.cancel", "response_id": "\udfff"}, "invalid_value", "response_id"),
    ],
    ids=lambda value: ascii(value)[:60] if isinstance(value, dict) else None,
)
def test_a_bad_field_is_named_with_the_event_id(event: Json, code: str, param: str) -> None:
    event_id, error = rejected(json.dumps(event | {"event_id": "event_1"}))
    assert (error.code, error.param, event_id) == (code, param, "event_1")
    assert str(error)


@pytest.mark.parametrize("text", ["", " ", "\ud800"])
def test_an_empty_input_is_rejected(text: str) -> None:
    event_id, error = rejected(json.dumps(create(input=text)))
    assert (error.code, error.param, event_id) == ("invalid_value", "response.input", "event_1")


@pytest.mark.parametrize("beginning", ["a", " ", "a ", " a"], ids=repr)
def test_a_long_bad_input_is_rejected_in_linear_time(beginning: str) -> None:
    frame = json.dumps(create(input=beginning * 200_000 + "\ud800"))
    _, error = rejected(frame)  # minutes, if the time were quadratic
    assert error.param == "response.input"


@pytest.mark.parametrize("event_id", [7, [], {}, True, "\ud800", "x" * 257])
def test_a_bad_event_id_is_rejected_and_not_sent_back(event_id: Any) -> None:
    sent_back, error = rejected(json.dumps(create() | {"event_id": event_id}))
    assert (error.code, error.param, sent_back) == ("invalid_value", "event_id", None)


@pytest.mark.parametrize("name", OPTION_NAMES)
@pytest.mark.parametrize(
    "value", [{}, {"a": 1}, [[]], True, -3, 10**4000, 1e308], ids=lambda value: str(value).replace("0" * 4000, "0...0")
)
def test_each_option_is_checked_in_both_events(name: str, value: Any) -> None:
    for event, where in ((update(**{name: value}), "session"), (create(**{name: value}), "response")):
        _, error = rejected(json.dumps(event))
        assert (error.code, error.param) == ("invalid_value", f"{where}.{name}")


names = strategies.sampled_from(
    [
        "type",
        "event_id",
        "session",
        "response",
        "response_id",
        "input",
        "conversation",
        "role",
        "content",
        *OPTION_NAMES,
    ]
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


@settings(max_examples=400, deadline=None)
@given(frames)
def test_any_frame_is_an_event_or_an_error_that_can_be_sent(frame: str | bytes) -> None:
    event_id, parsed = parse(frame)
    if isinstance(parsed, InvalidRequestError):
        assert parsed.code in ("invalid_json", "unknown_type", "missing_field", "invalid_value")
        answer = render_error(parsed, event_id)
    else:
        answer = msgspec.to_builtins(parsed)
    json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize(
    ("event", "param"),
    [(update(**{"\ud800": 1}), "session.?"), (create(**{"a\udfff": 1}), "response.a?")],
    ids=["session", "response"],
)
def test_a_name_with_surrogates_is_rejected_in_plain_text(event: Json, param: str) -> None:
    _, error = rejected(json.dumps(event))
    assert (error.code, error.param) == ("invalid_value", param)
    f"{error} {error.param}".encode()


@pytest.mark.parametrize("name", ["a", "\ud800"], ids=["ASCII", "surrogate"])
def test_a_deep_value_is_rejected_like_any_other(name: str) -> None:
    value: Any = []
    for _ in range(900):
        value = [value]
    _, error = rejected(json.dumps(update(**{name: value})))
    assert error.code == "invalid_value"


# Server events

USAGE = {"input_tokens": 3, "cached_tokens": 0, "output_tokens": 2, "total_tokens": 5}
REPLY = Item("r", "assistant", "Hi", 7.0, Status.COMPLETED, "stop", USAGE, {}, 0, "1 1", 0.5)


@pytest.mark.parametrize(
    ("rendered", "event"),
    [
        (render_session("created", {"id": "s"}), {"type": "session.created", "session": {"id": "s"}}),
        (render_session("updated", {"id": "s"}), {"type": "session.updated", "session": {"id": "s"}}),
        (render(Queued("r", 2)), {"type": "response.queued", "response_id": "r", "position": 2}),
        (
            render(Created("r", "c", 4), "e"),
            {
                "type": "response.created",
                "response": {"id": "r", "conversation": "c", "status": "in_progress", "left_out": 4},
                "event_id": "e",
            },
        ),
        (
            render(Created("r", None, 0)),
            {
                "type": "response.created",
                "response": {"id": "r", "conversation": None, "status": "in_progress", "left_out": 0},
                "event_id": None,
            },
        ),
        (
            render(TextDelta("r", 1, "Hi")),
            {"type": "response.output_text.delta", "response_id": "r", "sequence_number": 1, "delta": "Hi"},
        ),
        (
            render(Finished(None, REPLY)),
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
        (render_presence("joined", "ann"), {"type": "presence.joined", "user": "ann"}),
        (render_presence("left", "ann"), {"type": "presence.left", "user": "ann"}),
        (
            render_error(QueueFullError("sorry")),
            {
                "type": "error",
                "error": {"type": "rate_limit_error", "code": "queue_full", "message": "sorry", "retry_after": 5},
            },
        ),
        (
            render_error(InvalidValueError("no", "type"), "e"),
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
        (
            render(Rejected("r", ContextLengthExceededError("too long")), "e"),
            {
                "type": "error",
                "error": {
                    "type": "invalid_request_error",
                    "code": "context_length_exceeded",
                    "message": "too long",
                    "param": "response.input",
                    "event_id": "e",
                },
            },
        ),
        (
            render(Rejected("r", ItemNotFoundError())),
            {
                "type": "error",
                "error": {
                    "type": "invalid_request_error",
                    "code": "item_not_found",
                    "message": ItemNotFoundError.message,
                    "param": "response.after",
                },
            },
        ),
        (
            render(Warned("r", NotStoredError())),
            {
                "type": "error",
                "error": {
                    "type": "server_error",
                    "code": "not_kept",
                    "message": NotStoredError.message,
                    "response_id": "r",
                },
            },
        ),
    ],
    ids=[
        "session created",
        "session updated",
        "queued",
        "created",
        "created without a conversation",
        "text delta",
        "done",
        "joined",
        "left",
        "error",
        "error of an event",
        "rejected for its input",
        "rejected for its place",
        "warned",
    ],
)
def test_a_server_event_has_exactly_these_fields_in_order(rendered: Json, event: Json) -> None:
    assert json.dumps(rendered) == json.dumps(event)
