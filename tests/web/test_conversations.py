from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from models.web.request_body import BODY_BYTES
from tests.support.client import ask, bearer, chat_v1, converse, events_until, events_until_done
from tests.support.running_app import RunningApp
from tests.support.scripted import ScriptedChat


@pytest.fixture
def secret(shared_app: RunningApp) -> str:
    """The secret of a user who has no conversations yet."""
    return shared_app.new_user()


# List


def test_conversations_are_listed_latest_first_in_pages(client: TestClient, secret: str) -> None:
    made = [converse(client, f"say {number}", secret=secret) for number in range(5)]
    listed: list[str] = []
    parameters = {"limit": "2"}
    while True:
        page = client.get("/v1/conversations", params=parameters, headers=bearer(secret)).json()
        listed += [conversation["id"] for conversation in page["data"]]
        if not page["has_more"]:
            break
        parameters["after"] = listed[-1]
    assert listed == made[::-1]
    assert list(page) == ["data", "has_more"]
    assert list(page["data"][0]) == ["id", "title", "created", "updated"]


def test_conversations_are_found_by_their_text(client: TestClient, secret: str) -> None:
    converse(client, "say one", secret=secret)
    wanted = converse(client, "say the needle is here", "say two", secret=secret)
    response = client.get("/v1/conversations", params={"query": "NEEDLE"}, headers=bearer(secret))
    assert [conversation["id"] for conversation in response.json()["data"]] == [wanted]


def test_a_user_without_conversations_gets_an_empty_list(client: TestClient, secret: str) -> None:
    assert client.get("/v1/conversations", headers=bearer(secret)).json() == {"data": [], "has_more": False}


@pytest.mark.parametrize("parameter", ["limit", "query"])
def test_a_bad_listing_is_refused(client: TestClient, parameter: str) -> None:
    response = client.get("/v1/conversations", params={parameter: "x" * 300}, headers=bearer())
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", parameter)


def test_a_page_after_an_unknown_conversation_is_not_found(client: TestClient) -> None:
    response = client.get("/v1/conversations", params={"after": "conv_unknown"}, headers=bearer())
    assert (response.status_code, response.json()["error"]["code"]) == (404, "conversation_not_found")


# Read, rename, delete


def test_a_conversation_is_read_with_its_items(client: TestClient) -> None:
    id = converse(client, "say one", "say two")
    response = client.get(f"/v1/conversations/{id}", headers=bearer())
    assert response.headers["cache-control"] == "no-store"
    conversation = response.json()
    assert (conversation["id"], conversation["title"]) == (id, "say one")
    messages = [(item["role"], item["content"]) for item in conversation["items"]]
    assert messages == [("user", "say one"), ("assistant", "one"), ("user", "say two"), ("assistant", "two")]
    reply = conversation["items"][-1]
    assert (reply["status"], reply["status_details"], reply["sequence_number"]) == ("completed", {"reason": "stop"}, 1)


def test_a_conversation_is_read_in_pages(client: TestClient) -> None:
    path = f"/v1/conversations/{converse(client, 'say one', 'say two', 'say three')}"
    page = client.get(path, params={"limit": "2"}, headers=bearer()).json()
    assert ([item["content"] for item in page["items"]], page["earlier"]) == (["say three", "three"], 4)
    before = {"limit": "100", "before": page["items"][0]["id"]}
    page = client.get(path, params=before, headers=bearer()).json()
    contents = [item["content"] for item in page["items"]]
    assert (contents, page["earlier"]) == (["say one", "one", "say two", "two"], 0)
    response = client.get(path, params={"before": "item_unknown"}, headers=bearer())
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "item_not_found", "before")


def test_a_conversation_is_renamed(client: TestClient) -> None:
    path = f"/v1/conversations/{converse(client, 'say one')}"
    response = client.patch(path, json={"title": " Numbers\n 数字 "}, headers=bearer())
    assert (response.status_code, response.json()["title"]) == (200, "Numbers 数字")
    assert list(response.json()) == ["id", "title", "created", "updated"]
    for body in (b'{"title": 7}', b'{"title": " "}', b'{"title": "\\ud800"}'):
        response = client.patch(path, content=body, headers=bearer())
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")
    for body in (b"", b"{", b"[]"):
        response = client.patch(path, content=body, headers=bearer())
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    response = client.patch(path, content=b"x" * BODY_BYTES * 2, headers=bearer())
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert client.get(path, headers=bearer()).json()["title"] == "Numbers 数字"


def test_a_deleted_conversation_ends_its_reply(own_client: TestClient, scripted: ScriptedChat) -> None:
    with own_client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        id = socket.receive_json()["session"]["conversation"]
        ask(socket, "wait here")
        events_until(socket, "response.output_text.delta")
        assert own_client.delete(f"/v1/conversations/{id}", headers=bearer()).status_code == 204
        assert events_until_done(socket)[-1]["response"]["status"] == "cancelled"
    assert scripted.running == 0
    response = own_client.get(f"/v1/conversations/{id}", headers=bearer())
    assert (response.status_code, response.json()["error"]["code"]) == (404, "conversation_not_found")
    assert own_client.get("/v1/conversations", headers=bearer()).json()["data"] == []


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
def test_an_unknown_conversation_is_not_found(client: TestClient, method: str) -> None:
    response = client.request(method, "/v1/conversations/conv_unknown", json={"title": "one"}, headers=bearer())
    assert (response.status_code, response.json()["error"]["code"]) == (404, "conversation_not_found")


def test_a_conversation_stays_open_after_it_was_renamed(client: TestClient) -> None:
    with chat_v1(client) as socket:
        ask(socket, "say one", conversation="new")
        id = events_until_done(socket)[-1]["response"]["conversation"]
        assert client.patch(f"/v1/conversations/{id}", json={"title": "one"}, headers=bearer()).status_code == 200
        ask(socket, "say two", conversation=id)
        assert events_until_done(socket)[-1]["response"]["output_text"] == "two"


# Export


def test_a_conversation_is_exported_as_markdown_or_json(client: TestClient) -> None:
    id = converse(client, "say **one**")
    path = f"/v1/conversations/{id}/export"
    response = client.get(path, headers=bearer())
    assert response.text == "# say **one**\n\n**User**\n\nsay **one**\n\n**Assistant**\n\n**one**\n"
    assert response.headers["content-type"].startswith("text/markdown")
    assert response.headers["content-disposition"] == f'attachment; filename="{id}.md"'
    response = client.get(path, params={"format": "json"}, headers=bearer())
    conversation = client.get(f"/v1/conversations/{id}", headers=bearer()).json()
    assert response.json() | {"earlier": 0} == conversation
    assert response.headers["content-disposition"] == f'attachment; filename="{id}.json"'
    response = client.get(path, params={"format": "pdf"}, headers=bearer())
    assert (response.status_code, response.json()["error"]["param"]) == (400, "format")
