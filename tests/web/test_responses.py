"""The Responses API over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from models.settings import Settings
from models.validation import Json
from server import create_app
from tests.support.client import ENDS, bearer, chat_v2, events_until, text_of
from tests.support.openai_types import check_response
from tests.support.responses import PARTS, check_events, create, follow, get, stream
from tests.support.running_app import RunningApp, start
from tests.support.scripted import ScriptedChat

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a place",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}


@pytest.fixture
def app(scripted: ScriptedChat, shared_settings: Settings, tmp_path_factory: Any) -> Iterator[RunningApp]:
    """An app whose chat the test knows."""
    settings = replace(shared_settings, data=tmp_path_factory.mktemp("own") / "data")
    with start(create_app(settings, scripted.opened)) as running:
        yield running


@pytest.fixture
def known(app: RunningApp) -> TestClient:
    """A client of the app whose chat the test knows."""
    return app.client()


def release(client: TestClient, scripted: ScriptedChat) -> None:
    """Let the replies go on that wait for it."""
    assert client.portal
    client.portal.call(scripted.release)


def user(text: str) -> Json:
    return {"type": "message", "role": "user", "content": text}


# Whole and streamed


def test_a_response_is_one_object(client: TestClient) -> None:
    response = create(client, "say hello there", temperature=0.5, metadata={"topic": "greetings"}, user="eve")
    check_response(response)
    assert (response["object"], response["status"], response["model"]) == ("response", "completed", "scripted")
    (message,) = response["output"]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    assert message["content"] == [{"type": "output_text", "text": "hello there", "annotations": [], "logprobs": []}]
    assert (response["temperature"], response["metadata"], response["user"]) == (0.5, {"topic": "greetings"}, "eve")
    assert response["completed_at"] >= response["created_at"]
    assert response["usage"] == {
        "input_tokens": 1,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 4,
    }
    assert get(client, response["id"]) == response


def test_a_response_has_an_item_for_each_part(client: TestClient) -> None:
    response = create(client, f"perform {PARTS}")
    check_response(response)
    reasoning, look, f, g, done = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm, so"}]
    assert (look["content"][0]["text"], done["content"][0]["text"]) == ("I look", "done")
    assert [(call["name"], call["arguments"]) for call in (f, g)] == [("f", '{"a": 1}'), ("g", "{}")]
    assert len({f["call_id"], g["call_id"]}) == 2
    ids = [item["id"].split("_") for item in response["output"]]
    assert [id[0] for id in ids] == ["rs", "msg", "fc", "fc", "msg"]
    assert len({item["id"] for item in response["output"]}) == 5
    assert {item["status"] for item in response["output"]} == {"completed"}


MESSAGE = ["response.output_text.delta", "response.output_text.done"]
REASONING = ["response.reasoning_text.delta", "response.reasoning_text.done"]
CALL = ["response.function_call_arguments.delta", "response.function_call_arguments.done"]
ADDED = ["response.output_item.added", "response.content_part.added"]
DONE = ["response.content_part.done", "response.output_item.done"]


def types_of_part(deltas: int, kinds: list[str]) -> list[str]:
    """The types of the events of a part with some deltas."""
    if kinds is CALL:
        return [ADDED[0], *deltas * [kinds[0]], kinds[1], DONE[1]]
    return [*ADDED, *deltas * [kinds[0]], kinds[1], *DONE]


def test_a_streamed_response_has_the_events_of_the_standard_in_order(client: TestClient) -> None:
    events = stream(client, f"perform {PARTS}")
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        *types_of_part(2, REASONING),
        *types_of_part(2, MESSAGE),
        *types_of_part(2, CALL),
        *types_of_part(1, CALL),
        *types_of_part(1, MESSAGE),
        "response.completed",
    ]
    response = check_events(events)
    assert get(client, response["id"]) == response
    assert [event["response"]["status"] for event in events if "response" in event] == [
        *2 * ["in_progress"],
        "completed",
    ]
    assert [event["response"]["output"] for event in events[:2]] == [[], []]
    for kind, status in (("response.output_item.added", "in_progress"), ("response.output_item.done", "completed")):
        items = [event["item"] for event in events if event["type"] == kind]
        assert [item["status"] for item in items] == 5 * [status]
        assert [item["id"] for item in items] == [item["id"] for item in response["output"]]
    assert items == response["output"]
    for event in events:
        if "item_id" in event:
            assert response["output"][event["output_index"]]["id"] == event["item_id"]


def test_a_reply_that_says_nothing_is_one_empty_message(client: TestClient) -> None:
    events = stream(client, "say ")
    response = check_events(events)
    assert (response["status"], len(response["output"]), text_of(response)) == ("completed", 1, "")


def test_text_of_any_script_is_streamed_as_it_is(client: TestClient) -> None:
    text = '广州 😀 "quotes" \\ \u2028 \x00 </script>'
    events = stream(client, f"say {text}")
    assert "".join(event.get("delta", "") for event in events) == text
    assert get(client, check_events(events)["id"])["output"][0]["content"][0]["text"] == text.replace("\0", "\ufffd")


@pytest.mark.parametrize("store", [True, False])
def test_a_reply_that_fails_is_a_failed_response(client: TestClient, store: bool) -> None:
    whole = create(client, "break it", store=store)
    streamed = check_events(stream(client, "break it", store=store))
    for response in (whole, streamed):
        check_response(response)
        assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
        assert response["completed_at"] is None
    assert text_of(streamed) == "it"
    assert streamed["output"][0]["status"] == "incomplete"


# Requests


def test_the_model_hears_the_whole_input(known: TestClient, scripted: ScriptedChat) -> None:
    create(
        known,
        [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "7"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "seven", "annotations": []}]},
            {"role": "user", "content": "say it"},
        ],
        tools=[WEATHER],
        instructions="you are a poet",
    )
    (request,) = scripted.requests
    assert request.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "", "reasoning": "hm"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "name": "f", "arguments": "{}"}]},
        {"role": "tool", "content": "7", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "say it"},
    ]
    assert request.options.instructions == "you are a poet"
    assert [tool.name for tool in request.tools.tools] == ["get_weather"]


def test_a_response_tells_its_request(client: TestClient) -> None:
    asked: Json = {
        "instructions": "be brief",
        "max_output_tokens": 50,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "key",
        "safety_identifier": "someone",
        "temperature": 0.7,
        "text": {"format": {"type": "json_object"}},
        "tool_choice": "auto",
        "top_p": 0.5,
        "truncation": "auto",
    }
    response = create(client, "say it", tools=[WEATHER], reasoning={"effort": "low"}, **asked)
    check_response(response)
    assert asked.items() <= response.items()
    assert response["tools"] == [WEATHER | {"strict": False}]
    assert response["reasoning"]["effort"] == "low"
    assert get(client, response["id"]) == response


IGNORED: list[Json] = [
    {"include": ["reasoning.encrypted_content"]},
    {"max_tool_calls": 3},
    {"prompt_cache_retention": "24h"},
    {"service_tier": "flex"},
    {"stream_options": {"include_obfuscation": False}},
    {"model": "scripted"},
    {"temperature": None, "tools": None, "previous_response_id": None},
    {"context_management": []},
]


@pytest.mark.parametrize("fields", IGNORED, ids=[next(iter(one)) for one in IGNORED])
def test_what_cannot_change_the_reply_is_accepted(client: TestClient, fields: Json) -> None:
    assert text_of(create(client, "say it", **fields)) == "it"


BAD: list[tuple[Json, int, str, str]] = [
    ({"input": ""}, 400, "invalid_value", "input"),
    ({"input": []}, 400, "invalid_value", "input"),
    ({"input": 5}, 400, "invalid_value", "input"),
    ({"input": [], "conversation": "new"}, 400, "invalid_value", "input"),
    ({"input": [{"role": "king", "content": "x"}]}, 400, "invalid_value", "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA=="}]}]},
     400, "unsupported_parameter", "input[0].content[0]"),
    ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, 400, "unsupported_parameter", "input[0]"),
    ({"tools": [{"type": "web_search"}]}, 400, "unsupported_parameter", "tools[0]"),
    ({"tools": [WEATHER | {"name": "a b"}]}, 400, "invalid_value", "tools[0].name"),
    ({"tool_choice": "required"}, 400, "invalid_value", "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, 400, "invalid_value", "tool_choice"),
    ({"temperature": 3}, 400, "invalid_value", "temperature"),
    ({"max_output_tokens": 0}, 400, "invalid_value", "max_output_tokens"),
    ({"metadata": {"a": 1}}, 400, "invalid_value", "metadata"),
    ({"truncation": "some"}, 400, "invalid_value", "truncation"),
    ({"reasoning": {"effort": "huge"}}, 400, "invalid_value", "reasoning.effort"),
    ({"prompt": {"id": "pmpt_1"}}, 400, "unsupported_parameter", "prompt"),
    ({"colour": "red"}, 400, "unknown_parameter", "colour"),
    ({"stream": "yes"}, 400, "invalid_value", "stream"),
    ({"background": True, "store": False}, 400, "invalid_value", "store"),
    ({"conversation": "new", "store": False}, 400, "invalid_value", "store"),
    ({"conversation": "new", "previous_response_id": "resp_1"}, 400, "invalid_value", "previous_response_id"),
    ({"previous_response_id": "resp_1"}, 400, "previous_response_not_found", "previous_response_id"),
    ({"model": "gpt-4"}, 404, "model_not_found", "model"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, 404, "item_not_found", "input[0]"),
]  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("fields", "status", "code", "param"), BAD, ids=[f"{one[3]}-{i}" for i, one in enumerate(BAD)])
def test_a_bad_request_is_refused_by_name(
    client: TestClient, fields: Json, status: int, code: str, param: str, streamed: bool
) -> None:
    error = create(client, status=status, **{"input": "say it", "stream": streamed, **fields})["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    assert error["message"]


def test_an_unknown_conversation_is_not_found(client: TestClient) -> None:
    for streamed in (False, True):
        error = create(client, "say it", 404, conversation="conv_unknown", stream=streamed)["error"]
        assert error["code"] == "conversation_not_found"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff"])
def test_a_body_that_is_no_object_is_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/responses", content=body, headers=bearer())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


# Continuing


def test_a_response_continues_another_one(known: TestClient, scripted: ScriptedChat) -> None:
    first = create(known, "perform think hm | call f {}", instructions="be brief", tools=[WEATHER])
    call = first["output"][1]["call_id"]
    output = {"type": "function_call_output", "call_id": call, "output": "7"}
    second = create(known, [output, user("say two")], previous_response_id=first["id"])
    assert (second["previous_response_id"], text_of(second)) == (first["id"], "two")
    heard = scripted.requests[-1]
    assert heard.messages == [
        {"role": "user", "content": "perform think hm | call f {}"},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "hm",
            "tool_calls": [{"id": call, "name": "f", "arguments": "{}"}],
        },
        {"role": "tool", "content": "7", "tool_call_id": call},
        {"role": "user", "content": "say two"},
    ]
    assert heard.options.instructions is None, "instructions are those of one request"


def test_a_response_is_continued_more_than_once(known: TestClient, scripted: ScriptedChat) -> None:
    first = create(known, "say one")
    for text in ("two", "three"):
        create(known, f"say {text}", previous_response_id=first["id"])
        assert [message["content"] for message in scripted.requests[-1].messages] == ["say one", "one", f"say {text}"]


def test_a_response_that_still_runs_is_not_continued(known: TestClient) -> None:
    running = create(known, "wait here", background=True)
    error = create(known, "say two", 409, previous_response_id=running["id"])["error"]
    assert error["code"] == "conversation_locked"


def test_a_response_without_generation_is_continued(known: TestClient, scripted: ScriptedChat) -> None:
    first = create(known, [user("say one")], generate=False)
    check_response(first)
    assert (first["status"], first["output"]) == ("completed", [])
    second = create(known, "say two", previous_response_id=first["id"])
    assert text_of(second) == "two"
    assert [message["content"] for message in scripted.requests[-1].messages if message["content"]] == [
        "say one",
        "say two",
    ]


def test_a_response_can_be_in_a_conversation(known: TestClient, scripted: ScriptedChat) -> None:
    first = create(known, "say one", conversation="new")
    id = first["conversation"]["id"]
    second = create(known, "say two", conversation={"id": id})
    assert second["conversation"] == {"id": id}
    assert len(scripted.requests[-1].messages) == 3
    branch = create(known, "say three", previous_response_id=first["id"])
    assert len(scripted.requests[-1].messages) == 3
    leaf = known.get(f"/v1/conversations/{id}", headers=bearer()).json()["leaf"]
    assert leaf == second["id"], "a branch does not move the conversation on"
    assert get(known, branch["id"]) == branch


def test_one_response_at_a_time_runs_in_a_conversation(known: TestClient, scripted: ScriptedChat) -> None:
    running = create(known, "wait here", background=True, conversation="new")
    id = running["conversation"]["id"]
    for streamed in (False, True):
        error = create(known, "say two", 409, conversation=id, stream=streamed)["error"]
        assert error["code"] == "conversation_locked"
    release(known, scripted)
    follow(known, running["id"])
    assert text_of(create(known, "say two", conversation=id)) == "two"


def test_an_item_is_referred_to_by_its_id(known: TestClient, scripted: ScriptedChat) -> None:
    first = create(known, "perform say one | call f {}")
    items = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    asked = {"type": "item_reference", "id": get(known, f"{first['id']}/input_items")["data"][0]["id"]}
    create(known, [asked, *items, user("say two")])
    call = {"id": first["output"][1]["call_id"], "name": "f", "arguments": "{}"}
    assert scripted.requests[-1].messages == [
        {"role": "user", "content": "perform say one | call f {}"},
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": "say two"},
    ]


def test_a_deleted_item_cannot_be_referred_to(known: TestClient) -> None:
    response = create(known, "say one", conversation="new")
    conversation, part = response["conversation"]["id"], response["output"][0]["id"]
    asked = get(known, f"{response['id']}/input_items")["data"][0]["id"]
    for item in (part, asked):
        path = f"/v1/conversations/{conversation}/items/{item}"
        assert known.delete(path, headers=bearer()).status_code == 200
        error = create(known, [{"type": "item_reference", "id": item}, user("say two")], 404)["error"]
        assert (error["code"], error["param"]) == ("item_not_found", "input[0]")


def test_a_response_that_is_not_stored_is_gone_after_a_while(scripted: ScriptedChat, settings: Settings) -> None:
    with start(create_app(replace(settings, linger=0), scripted.opened)) as running:
        client = running.client()
        for response in (create(client, "say it", store=False), check_events(stream(client, "say it", store=False))):
            assert (response["store"], text_of(response)) == (False, "it")
            assert get(client, response["id"], 404)["error"]["code"] == "response_not_found"
            error = create(client, "say more", 400, previous_response_id=response["id"])["error"]
            assert error["code"] == "previous_response_not_found"


# In the background


def test_a_response_in_the_background_is_answered_at_once_and_goes_on(
    known: TestClient, scripted: ScriptedChat
) -> None:
    queued = create(known, "wait here", background=True)
    check_response(queued)
    assert (queued["status"], queued["background"], queued["output"]) == ("queued", True, [])
    with chat_v2(known) as socket:
        socket.send_json({"type": "parley.response.resume", "response_id": queued["id"]})
        events_until(socket, "response.output_text.delta")
    running = get(known, queued["id"])
    assert (running["status"], text_of(running), running["usage"]) == ("in_progress", "here", None)
    release(known, scripted)
    events = follow(known, queued["id"])
    done = check_events(events)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert (done["status"], text_of(done)) == ("completed", "here")
    assert get(known, queued["id"]) == done


def test_a_response_in_the_background_can_be_streamed(client: TestClient) -> None:
    events = stream(client, "say it", background=True)
    statuses = [event["response"]["status"] for event in events if "response" in event]
    assert statuses == ["queued", "queued", "in_progress", "completed"]
    assert events == follow(client, check_events(events)["id"])


def test_a_bad_request_in_the_background_is_refused(client: TestClient) -> None:
    error = create(client, "say it", 400, background=True, previous_response_id="resp_1")["error"]
    assert error["code"] == "previous_response_not_found"


# Retrieving, cancelling, deleting


@pytest.mark.parametrize(
    ("parameters", "param"),
    [({"stream": "yes"}, "stream"), ({"stream": "true", "starting_after": "x"}, "starting_after")],
)
def test_a_bad_retrieval_is_refused(client: TestClient, parameters: Json, param: str) -> None:
    id = create(client, "say it")["id"]
    error = get(client, id, 400, **parameters)["error"]
    assert (error["code"], error["param"]) == ("invalid_value", param)


def test_what_can_be_included_is_accepted(client: TestClient) -> None:
    id = create(client, "say it")["id"]
    parameters: Any = [("include[]", "message.output_text.logprobs"), ("include_obfuscation", "false")]
    assert client.get(f"/v1/responses/{id}", params=parameters, headers=bearer()).status_code == 200


def test_an_unknown_response_is_not_found(client: TestClient) -> None:
    for method, path in (
        ("GET", ""),
        ("GET", "?stream=true"),
        ("DELETE", ""),
        ("POST", "/cancel"),
        ("GET", "/input_items"),
    ):
        response = client.request(method, f"/v1/responses/resp_unknown{path}", headers=bearer())
        assert (response.status_code, response.json()["error"]["code"]) == (404, "response_not_found")


@pytest.mark.parametrize("background", [True, False])
def test_a_running_response_is_cancelled(known: TestClient, scripted: ScriptedChat, background: bool) -> None:
    with chat_v2(known) as socket:
        if background:
            id = create(known, "wait here", background=True)["id"]
            socket.send_json({"type": "parley.response.resume", "response_id": id})
        else:
            socket.send_json({"type": "response.create", "input": "wait here"})
        events = events_until(socket, "response.output_text.delta")
        id = events[0]["response"]["id"]
        cancelled = known.post(f"/v1/responses/{id}/cancel", headers=bearer()).json()
        check_response(cancelled)
        assert (cancelled["status"], text_of(cancelled)) == ("cancelled", "here")
        told = events_until(socket, *ENDS)[-1]["response"]
        assert told == cancelled | {"parley": told["parley"]}
    assert scripted.running == 0
    assert get(known, id) == cancelled
    assert follow(known, id)[-1]["type"] == "response.incomplete"


def test_a_response_that_has_ended_is_not_cancelled(client: TestClient) -> None:
    response = create(client, "say it")
    again = client.post(f"/v1/responses/{response['id']}/cancel", headers=bearer())
    assert (again.status_code, again.json()) == (200, response)


def test_a_deleted_response_is_gone(client: TestClient) -> None:
    first = create(client, "say one")
    second = create(client, "say two", previous_response_id=first["id"])
    for response in (first, second):
        answer = client.delete(f"/v1/responses/{response['id']}", headers=bearer())
        assert answer.json() == {"id": response["id"], "object": "response", "deleted": True}
        for path in (response["id"], f"{response['id']}/input_items"):
            assert get(client, path, 404)["error"]["code"] == "response_not_found"
        error = create(client, "say more", 400, previous_response_id=response["id"])["error"]
        assert error["code"] == "previous_response_not_found"


def test_a_running_response_that_is_deleted_ends(known: TestClient, scripted: ScriptedChat) -> None:
    id = create(known, "wait here", background=True)["id"]
    assert known.delete(f"/v1/responses/{id}", headers=bearer()).json()["deleted"] is True
    assert scripted.running == 0
    assert get(known, id, 404)["error"]["code"] == "response_not_found"


def test_the_input_items_of_a_response_are_listed_in_pages(client: TestClient) -> None:
    first = create(client, "say zero")
    call = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "call_1", "output": "7"}
    texts = [user("one"), call, output, user("say it")]
    id = create(client, texts, previous_response_id=first["id"])["id"]
    items = get(client, f"{id}/input_items", order="asc")
    assert [item["type"] for item in items["data"]] == ["message", "function_call", "function_call_output", "message"]
    assert (items["object"], items["has_more"]) == ("list", False)
    assert call.items() <= items["data"][1].items()
    assert output.items() <= items["data"][2].items()
    assert get(client, f"{id}/input_items")["data"] == items["data"][::-1]
    page = get(client, f"{id}/input_items", order="asc", limit=3)
    assert (page["data"], page["has_more"], page["last_id"]) == (items["data"][:3], True, items["data"][2]["id"])
    page = get(client, f"{id}/input_items", order="asc", limit=3, after=page["last_id"])
    assert (page["data"], page["has_more"]) == (items["data"][3:], False)
    assert get(client, f"{id}/input_items", 404, after="msg_unknown")["error"]["code"] == "item_not_found"
    assert get(client, f"{id}/input_items", 400, limit=1000)["error"]["param"] == "limit"


def test_a_stopping_server_refuses_responses_and_says_when_to_come_again(
    known: TestClient, scripted: ScriptedChat
) -> None:
    scripted.admission.close()
    for body in ({}, {"stream": True}, {"background": True}):
        response = known.post("/v1/responses", json={"input": "say it", **body}, headers=bearer())
        assert (response.status_code, response.json()["error"]["code"]) == (503, "server_shutdown")
        assert int(response.headers["retry-after"]) > 0


# The cases of the Open Responses compliance suite, in words that a scripted chat understands

COMPLIANCE: dict[str, Json] = {
    "a text": {"input": [user("say hello in three words")]},
    "a system prompt": {"input": [{"type": "message", "role": "system", "content": "be a pirate"}, user("say ahoy")]},
    "a tool call": {"input": [user('perform call get_weather {"location": "Paris"}')], "tools": [WEATHER]},
    "several turns": {
        "input": [
            user("I am Ann."),
            {"type": "message", "role": "assistant", "content": "Hello Ann!"},
            user("say Ann"),
        ]
    },
}


@pytest.mark.parametrize("case", COMPLIANCE)
def test_each_case_of_the_compliance_suite_is_answered(client: TestClient, case: str) -> None:
    body = {"model": "scripted", **COMPLIANCE[case]}
    whole = create(client, stream=False, **body)
    check_response(whole)
    events = stream(client, **body)
    streamed = check_events(events)
    with client.websocket_connect("/v1/responses", headers=bearer()) as socket:
        socket.send_json({"type": "response.create", **body})
        by_socket = events_until(socket, *ENDS)
    for response in (whole, streamed, check_events(by_socket)):
        assert response["status"] == "completed"
        assert response["output"]
        assert ("function_call" in [item["type"] for item in response["output"]]) == (case == "a tool call")
    assert [event["type"] for event in by_socket] == [event["type"] for event in events]
