"""The app while its database can be neither written nor read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from models.settings import Settings
from models.validation import Json
from server import create_app
from tests.support.client import ask, bearer, events_until_done, text_of
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


def reply_to(socket: Any, input: str, **fields: Any) -> Json:
    """The reply to a message. The only trouble on the way may be that it is not stored yet."""
    ask(socket, input, **fields)
    *events, done = events_until_done(socket)
    assert not [event for event in events if event["type"] == "error"]
    assert {event["error"]["code"] for event in events if event["type"] == "parley.warning"} <= {"not_kept"}
    return dict(done["response"])


def test_a_conversation_that_is_deleted_before_it_is_stored_stays_deleted(
    client: TestClient, store: AwayConversations
) -> None:
    with client.websocket_connect("/ws", ["chat.v2"], headers=bearer()) as socket:
        socket.receive_json()
        changed = reply_to(socket, "say one", conversation="new")["conversation"]["id"]
        store.broken = True
        reply_to(socket, "say two", conversation={"id": changed, "after": None})
        new = reply_to(socket, "say three", conversation="new")["conversation"]["id"]
        for id in (changed, new):
            assert client.delete(f"/v1/conversations/{id}", headers=bearer()).status_code == 200
        store.broken = False
        wait_for_write(client, store)
        assert client.get("/v1/conversations", headers=bearer()).json()["data"] == []


def test_a_conversation_can_begin_and_go_on_without_the_database(client: TestClient, store: AwayConversations) -> None:
    store.broken = store.unreadable = True
    with client.websocket_connect("/ws", ["chat.v2"], headers=bearer()) as socket:
        socket.receive_json()
        conversation = reply_to(socket, "say one", conversation="new")["conversation"]["id"]
        assert text_of(reply_to(socket, "say two", conversation=conversation)) == "two"
        store.broken = store.unreadable = False
        wait_for_write(client, store)
        path = f"/v1/conversations/{conversation}/items"
        items = client.get(path, params={"order": "asc"}, headers=bearer()).json()["data"]
        assert [item["content"][0]["text"] for item in items] == ["say one", "one", "say two", "two"]


def test_a_response_can_be_continued_and_read_without_the_database(
    client: TestClient, store: AwayConversations
) -> None:
    store.broken = store.unreadable = True
    with client.websocket_connect("/ws", ["chat.v2"], headers=bearer()) as socket:
        socket.receive_json()
        first = reply_to(socket, "say one")["id"]
        second = reply_to(socket, "say two", previous_response_id=first)
    for _ in range(2):
        found = client.get(f"/v1/responses/{second['id']}", headers=bearer()).json()
        assert (found["previous_response_id"], text_of(found)) == (first, "two")
        store.broken = store.unreadable = False
        wait_for_write(client, store)


def test_plain_text_is_answered_without_the_database(client: TestClient, store: AwayConversations) -> None:
    store.broken = store.unreadable = True
    with client.websocket_connect("/ws", headers=bearer()) as socket:
        socket.send_text("say one")
        assert socket.receive_text() == "one"
