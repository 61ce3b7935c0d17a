"""The Responses API on its socket, `/v1/responses`: what differs from HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from openai.types.responses import ResponsesServerEvent
from pydantic import TypeAdapter
from starlette.testclient import TestClient, WebSocketDenialResponse

from models.protocols.responses.session import BAD_FRAMES, WAITING
from models.settings import Settings
from models.validation import Json
from models.web.session_socket import FRAME_BYTES
from server import create_app
from tests.support.client import (
    ANN,
    BOB,
    ENDS,
    ask,
    bearer,
    bearer_subprotocol,
    chat_v2,
    close_code,
    events_until,
    events_until_done,
    log_in,
    reply,
    text_of,
    until,
)
from tests.support.responses import PARTS, check_events, create, get, stream
from tests.support.running_app import RunningApp, start
from tests.support.scripted import ScriptedChat

SERVER_EVENT: TypeAdapter[Any] = TypeAdapter(ResponsesServerEvent)


@contextmanager
def responses(client: TestClient, secret: str = ANN) -> Iterator[Any]:
    """A connection to `/v1/responses`."""
    with client.websocket_connect("/v1/responses", headers=bearer(secret)) as socket:
        yield socket


def refusal(
    client: TestClient, *protocols: str, path: str = "/v1/responses", **headers: str
) -> WebSocketDenialResponse:
    """How a handshake is refused."""
    with (
        pytest.raises(WebSocketDenialResponse) as raised,
        client.websocket_connect(path, list(protocols), headers=dict(headers)),
    ):
        pass
    return raised.value


def error_to(socket: Any, **event: Any) -> Json:
    """The error that the server answers an event with."""
    socket.send_json(event)
    answer: Json = socket.receive_json()
    SERVER_EVENT.validate_python(answer)
    assert answer["type"] == "error"
    return answer


# The handshake


def test_a_handshake_without_valid_credentials_is_an_http_error(client: TestClient) -> None:
    for protocols, headers in (([], {}), ([], bearer("wrong")), ([bearer_subprotocol("wrong")], {})):
        denied = refusal(client, *protocols, **headers)
        assert (denied.status_code, denied.headers["www-authenticate"]) == (401, "Bearer")
        error = denied.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_credentials")


def test_a_secret_in_the_url_is_not_read(client: TestClient) -> None:
    assert refusal(client, path=f"/v1/responses?userid=ann&secret={ANN}").status_code == 401


def test_a_cookie_opens_the_socket_only_from_an_allowed_origin(client: TestClient) -> None:
    log_in(client)
    for headers in ({"Origin": "http://evil.example"}, {}):
        denied = refusal(client, **headers)
        assert (denied.status_code, denied.json()["error"]["code"]) == (403, "origin_not_allowed")
    with client.websocket_connect("/v1/responses", headers={"Origin": "http://testserver"}) as socket:
        assert text_of(reply(socket, "say it")) == "it"


def test_failed_logins_and_open_connections_are_limited(settings: Settings, scripted: ScriptedChat) -> None:
    with start(create_app(replace(settings, sockets_per_user=1), scripted.opened)) as running:
        client = running.client()
        with responses(client):
            denied = refusal(client, **bearer())
            assert (denied.status_code, denied.json()["error"]["code"]) == (429, "too_many_sockets")
        for _ in range(10):
            refusal(client, **bearer("wrong"))
        denied = refusal(client, **bearer())
        assert (denied.status_code, denied.json()["error"]["code"]) == (429, "too_many_failures")
        assert denied.headers["retry-after"] == "60"


@pytest.mark.parametrize(
    ("offered", "accepted"),
    [([], None), (["realtime"], "realtime"), ([bearer_subprotocol(ANN)], None), (["x", bearer_subprotocol(ANN)], "x")],
    ids=["none", "one", "the secret", "one and the secret"],
)
def test_the_first_subprotocol_that_is_no_secret_is_accepted(
    client: TestClient, offered: list[str], accepted: str | None
) -> None:
    headers = bearer() if bearer_subprotocol(ANN) not in offered else {}
    with client.websocket_connect("/v1/responses", offered or None, headers=headers) as socket:
        assert socket.accepted_subprotocol == accepted
        assert text_of(reply(socket, "say it")) == "it"


# Responses


def test_a_response_has_the_events_that_it_has_over_http(client: TestClient) -> None:
    with responses(client) as socket:
        ask(socket, f"perform {PARTS}")
        events = events_until_done(socket)
    response = check_events(events)
    for event in events:
        SERVER_EVENT.validate_python(event)
    assert [event["type"] for event in events] == [event["type"] for event in stream(client, f"perform {PARTS}")]
    assert get(client, response["id"]) == response


def test_nothing_comes_that_the_standard_does_not_have(own_client: TestClient) -> None:
    with responses(own_client) as socket, chat_v2(own_client, BOB), chat_v2(own_client) as other:
        ask(socket, "queue up")
        events = events_until_done(socket)
        ask(other, "queue up")
        assert "parley.queue" in [event["type"] for event in events_until_done(other)]
    assert not [event for event in events if event["type"].startswith("parley.")]
    check_events(events)


def test_it_does_not_matter_whether_a_request_says_that_it_is_streamed(client: TestClient) -> None:
    with responses(client) as socket:
        for streamed in (True, False):
            assert text_of(reply(socket, "say it", stream=streamed, background=False)) == "it"


def test_requests_without_a_lane_are_answered_one_after_the_other(
    own_client: TestClient, scripted: ScriptedChat
) -> None:
    with responses(own_client) as socket:
        for input in ("wait one", "say two", "say three"):
            ask(socket, input)
        until(socket, "response.output_text.delta")
        assert scripted.running == 1
        assert own_client.portal
        own_client.portal.call(scripted.release)
        texts = [text_of(events_until_done(socket)[-1]["response"]) for _ in range(3)]
    assert texts == ["one", "two", "three"]


def test_lanes_are_answered_at_the_same_time_and_each_in_its_order(
    own_client: TestClient, scripted: ScriptedChat
) -> None:
    with responses(own_client) as socket:
        ask(socket, "wait one", stream_id="slow")
        until(socket, "response.output_text.delta")
        ask(socket, "say later", stream_id="slow")
        for number in range(3):
            ask(socket, f"say {number}", stream_id="quick")
        ask(socket, "say none")
        ended = [until(socket, *ENDS) for _ in range(4)]
        assert own_client.portal
        own_client.portal.call(scripted.release)
        ended += [until(socket, *ENDS) for _ in range(2)]
    by_lane: dict[str | None, list[str]] = {}
    for event in ended:
        by_lane.setdefault(event.get("stream_id"), []).append(text_of(event["response"]))
    assert by_lane == {"quick": ["0", "1", "2"], None: ["none"], "slow": ["one", "later"]}


def test_each_event_names_its_lane(client: TestClient) -> None:
    with responses(client) as socket:
        for lane in ("a", "b"):
            ask(socket, f"perform {PARTS}", stream_id=lane)
        events: list[Json] = []
        while sum(event["type"] in ENDS for event in events) < 2:
            events.append(socket.receive_json())
        for lane in ("a", "b"):
            check_events([event for event in events if event["stream_id"] == lane])
        ask(socket, "say it")
        assert not [event for event in events_until_done(socket) if "stream_id" in event]


def test_a_tool_is_called_and_answered_without_storing_anything(own_app: RunningApp, scripted: ScriptedChat) -> None:
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
    with responses(own_app.client()) as socket:
        first = reply(socket, 'perform think hm | call f {"a": 1}', store=False, tools=tools)
        call = first["output"][1]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "say seven"}
        second = reply(socket, [output], store=False, tools=tools, previous_response_id=first["id"])
        assert (text_of(second), second["previous_response_id"]) == ("seven", first["id"])
        third = reply(socket, "say eight", store=False, previous_response_id=second["id"])
        assert text_of(third) == "eight"
    assert scripted.requests[-1].messages == [
        {"role": "user", "content": 'perform think hm | call f {"a": 1}'},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "hm",
            "tool_calls": [{"id": call["call_id"], "name": "f", "arguments": '{"a": 1}'}],
        },
        {"role": "tool", "content": "say seven", "tool_call_id": call["call_id"]},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "say eight"},
    ]
    conversations = own_app.client().get("/v1/conversations", headers=bearer()).json()["data"]
    assert conversations == []


def test_only_its_own_connection_continues_a_response_that_is_not_stored_for_long(
    settings: Settings, scripted: ScriptedChat
) -> None:
    with start(create_app(replace(settings, linger=0), scripted.opened)) as running:
        client = running.client()
        with responses(client) as socket:
            stored = reply(socket, "say one")
            first = reply(socket, "say two", store=False, previous_response_id=stored["id"])
            second = reply(socket, "say three", store=False, previous_response_id=first["id"])
            assert [message["content"] for message in scripted.requests[-1].messages] == [
                *("say one", "one", "say two", "two", "say three"),
            ]
            kept = reply(socket, "say four", previous_response_id=second["id"])
            assert len(scripted.requests[-1].messages) == 7
            with responses(client) as other:
                error = error_to(other, type="response.create", input="say it", previous_response_id=second["id"])
                assert (error["status"], error["error"]["code"]) == (400, "previous_response_not_found")
                assert text_of(reply(other, "say five", previous_response_id=kept["id"])) == "five"
                heard = [message["content"] for message in scripted.requests[-1].messages]
                assert heard[-4:] == ["three", "say four", "four", "say five"]
    assert heard[:4] == ["say one", "one", "say two", "two"]


def test_a_response_goes_on_when_its_connection_closes(own_client: TestClient, scripted: ScriptedChat) -> None:
    with responses(own_client) as socket:
        ask(socket, "wait here")
        id = until(socket, "response.created")["response"]["id"]
        until(socket, "response.output_text.delta")
    assert get(own_client, id)["status"] == "in_progress"
    with chat_v2(own_client) as socket:
        socket.send_json({"type": "parley.response.resume", "response_id": id})
        events = events_until(socket, "response.output_text.delta")
        assert own_client.portal
        own_client.portal.call(scripted.release)
        events += events_until_done(socket)
    assert text_of(check_events(events)) == "here"


def test_a_response_can_be_cancelled_over_http(own_client: TestClient) -> None:
    with responses(own_client) as socket:
        ask(socket, "wait here", stream_id="a")
        id = until(socket, "response.created")["response"]["id"]
        own_client.post(f"/v1/responses/{id}/cancel", headers=bearer())
        last = events_until_done(socket)[-1]
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
        assert text_of(reply(socket, "say next", stream_id="a")) == "next"


# Errors


BAD: list[tuple[Json, int, str, str | None]] = [
    ({"type": "response.create", "input": ""}, 400, "invalid_value", "input"),
    ({"type": "response.create", "input": "say it", "temperature": 7}, 400, "invalid_value", "temperature"),
    ({"type": "response.create", "input": "say it", "background": True}, 400, "invalid_value", "background"),
    ({"type": "response.create", "input": "say it", "colour": 1}, 400, "unknown_parameter", "colour"),
    ({"type": "response.create", "response": {"input": "say it"}}, 400, "unknown_parameter", "response"),
    ({"type": "response.create", "input": "say it", "model": "gpt-4"}, 404, "model_not_found", "model"),
    ({"type": "response.create", "input": "say it", "conversation": "conv_1"}, 404, "conversation_not_found", None),
    (
        {"type": "response.create", "input": "say it", "previous_response_id": "resp_1"},
        *(400, "previous_response_not_found", "previous_response_id"),
    ),
    (
        {"type": "response.create", "input": [{"type": "item_reference", "id": "msg_1"}]},
        *(404, "item_not_found", "input[0]"),
    ),
    ({"type": "response.cancel"}, 400, "unknown_type", "type"),
    ({"type": "parley.response.cancel"}, 400, "unknown_type", "type"),
    ({"type": "parley.response.resume", "response_id": "resp_1"}, 400, "unknown_type", "type"),
    ({"type": 5}, 400, "invalid_value", "type"),
    ({}, 400, "missing_field", "type"),
]


@pytest.mark.parametrize("lane", [{}, {"stream_id": "a"}], ids=["no lane", "lane"])
@pytest.mark.parametrize(
    ("event", "status", "code", "param"), BAD, ids=[f"{one[2]}-{number}" for number, one in enumerate(BAD)]
)
def test_a_bad_event_gets_an_error_and_the_connection_goes_on(
    client: TestClient, event: Json, status: int, code: str, param: str | None, lane: Json
) -> None:
    with responses(client) as socket:
        answer = error_to(socket, **event, **lane)
        error = answer["error"]
        assert (answer["status"], error["type"]) == (status, "invalid_request_error")
        assert (error["code"], error["param"]) == (code, param)
        assert answer.get("stream_id") == lane.get("stream_id")
        assert text_of(reply(socket, "say it", **lane)) == "it"


@pytest.mark.parametrize("frame", ["", "nonsense", "[]", "5", b"\xff\xfe"])
def test_a_frame_that_is_no_object_gets_an_error(client: TestClient, frame: str | bytes) -> None:
    with responses(client) as socket:
        if isinstance(frame, bytes):
            socket.send_bytes(frame)
        else:
            socket.send_text(frame)
        answer = socket.receive_json()
        assert (answer["type"], answer["status"], answer["error"]["code"]) == ("error", 400, "invalid_json")
        assert text_of(reply(socket, "say it")) == "it"


def test_an_error_says_when_to_come_again(own_client: TestClient, scripted: ScriptedChat) -> None:
    scripted.admission.close()
    with responses(own_client) as socket:
        error = error_to(socket, type="response.create", input="say it")
    assert (error["status"], error["error"]["code"]) == (503, "server_shutdown")
    assert int(error["error"]["headers"]["retry-after"]) > 0


def test_one_response_at_a_time_runs_in_a_conversation(own_client: TestClient) -> None:
    with responses(own_client) as socket:
        ask(socket, "wait here", conversation="new", stream_id="a")
        id = until(socket, "response.created")["response"]["conversation"]["id"]
        until(socket, "response.output_text.delta")
        error = error_to(socket, type="response.create", input="say it", conversation=id, stream_id="b")
        assert (error["status"], error["error"]["code"]) == (409, "conversation_locked")
        assert error["stream_id"] == "b"


def test_too_many_waiting_requests_are_refused_one_by_one(own_client: TestClient, scripted: ScriptedChat) -> None:
    with responses(own_client) as socket:
        ask(socket, "wait here")
        until(socket, "response.output_text.delta")
        for _ in range(WAITING):
            ask(socket, "say it")
        error = error_to(socket, type="response.create", input="say it")
        assert (error["status"], error["error"]["code"]) == (429, "too_many_responses")
        assert own_client.portal
        own_client.portal.call(scripted.release)
        for _ in range(1 + WAITING):
            assert events_until_done(socket)[-1]["type"] == "response.completed"


def test_twenty_bad_frames_in_a_row_close_with_4400(client: TestClient) -> None:
    with responses(client) as socket:
        for _ in range(BAD_FRAMES):
            socket.send_text("nonsense")
        assert close_code(socket) == 4400


def test_a_frame_over_the_limit_closes_with_1009(client: TestClient) -> None:
    with responses(client) as socket:
        socket.send_text("x" * (FRAME_BYTES + 1))
        assert close_code(socket) == 1009


def test_the_connections_of_a_removed_user_close(shared_app: RunningApp) -> None:
    users = shared_app.app.state.users
    secret = shared_app.call(users.create, "carol")
    with responses(shared_app.client(), secret) as socket:
        ask(socket, "wait here")
        until(socket, "response.output_text.delta")
        shared_app.call(users.remove, "carol")
        assert close_code(socket) == 4401


def test_a_response_of_http_is_continued_on_the_socket(client: TestClient) -> None:
    first = create(client, "say one")
    with responses(client) as socket:
        second = reply(socket, "say two", previous_response_id=first["id"])
    assert get(client, second["id"])["previous_response_id"] == first["id"]


# Input for running replies


@pytest.mark.parametrize("settings_of_request", [{}, {"store": False}, {"conversation": "new"}], ids=str)
def test_input_for_a_running_reply_ends_it_and_the_next_reply_answers_it(
    client: TestClient, settings_of_request: Json
) -> None:
    with responses(client) as socket:
        socket.send_json({"type": "response.create", "input": "wait on", **settings_of_request})
        first = events_until(socket, "response.output_text.delta")[0]["response"]["id"]
        socket.send_json({"type": "response.steer", "previous_response_id": first, "input": "say other"})
        accepted, *_, ended = events_until(socket, "response.incomplete")
        SERVER_EVENT.validate_python(accepted)
        assert accepted["type"] == "response.steer.accepted"
        assert ended["response"]["incomplete_details"] == {"reason": "steered"}
        events = events_until(socket, "response.completed")
        check_events(events)
        assert text_of(events[-1]["response"]) == "other"


def test_a_request_for_no_output_needs_no_input_and_can_be_continued(client: TestClient) -> None:
    with responses(client) as socket:
        socket.send_json({"type": "response.create", "generate": False, "instructions": "Be brief."})
        warm = events_until(socket, "response.completed")
        check_events(warm)
        socket.send_json(
            {"type": "response.create", "input": "say yes", "previous_response_id": warm[-1]["response"]["id"]}
        )
        assert text_of(until(socket, "response.completed")["response"]) == "yes"
