"""The app while its database can be neither written nor read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from models.settings import Settings
from models.validation import Json
from server import create_app
from tests.support.client import ask, bearer, events_until_done
from tests.support.scripted import ScriptedChat, keeping_in
from tests.support.stores import AwayConversations


@pytest.fixture
def client(settings: Settings, scripted: ScriptedChat) -> Iterator[TestClient]:
    with TestClient(create_app(settings, keeping_in(AwayConversations, scripted.opened))) as client:
        yield client


@pytest.fixture
def store(client: TestClient) -> AwayConversations:
    """The store of the app."""
    conversations: AwayConversations = client.app.state.conversations  # type: ignore[attr-defined]
    return conversations


def wait_for_write(client: TestClient, store: AwayConversations) -> None:
    """Wait until the app has written to its database again."""
    assert client.portal
    client.portal.call(store.back.wait)


def reply_to(socket: Any, input: str, **fields: str) -> Json:
    """The reply to a message. The only error on the way may be that it is not stored yet."""
    ask(socket, input, **fields)
    *events, done = events_until_done(socket)
    assert {event["error"]["code"] for event in events if event["type"] == "error"} <= {"not_kept"}
    return dict(done["response"])


def test_a_conversation_that_is_deleted_before_it_is_stored_stays_deleted(
    client: TestClient, store: AwayConversations
) -> None:
    with client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        socket.receive_json()
        changed = reply_to(socket, "say one", conversation="new")["conversation"]
        store.broken = True
        reply_to(socket, "say two", conversation=changed, after="none")
        new = reply_to(socket, "say three", conversation="new")["conversation"]
        for id in (changed, new):
            assert client.delete(f"/v1/conversations/{id}", headers=bearer()).status_code == 204
        store.broken = False
        wait_for_write(client, store)
        assert client.get("/v1/conversations", headers=bearer()).json()["data"] == []


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"conversation": "new"}, id="new-conversation"),
        pytest.param({}, id="conversation-of-the-connection"),
    ],
)
def test_a_conversation_can_begin_and_go_on_without_the_database(
    client: TestClient, store: AwayConversations, fields: dict[str, str]
) -> None:
    store.broken = store.unreadable = True
    with client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        socket.receive_json()
        conversation = reply_to(socket, "say one", **fields)["conversation"]
        assert reply_to(socket, "say two", conversation=conversation)["output_text"] == "two"
        store.broken = store.unreadable = False
        wait_for_write(client, store)
        items = client.get(f"/v1/conversations/{conversation}", headers=bearer()).json()["items"]
        assert [item["content"] for item in items] == ["say one", "one", "say two", "two"]


def test_plain_text_is_answered_without_the_database(client: TestClient, store: AwayConversations) -> None:
    store.broken = store.unreadable = True
    with client.websocket_connect("/ws", headers=bearer()) as socket:
        socket.send_text("say one")
        assert socket.receive_text() == "one"
