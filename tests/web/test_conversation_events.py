"""What the connections of a user are told of conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.testclient import TestClient

from models.validation import Json
from tests.support.client import BOB, ask, bearer, chat_v2, reply, until
from tests.support.running_app import RunningApp
from tests.support.scripted import ScriptedChat

UPDATED, DELETED = "parley.conversation.updated", "parley.conversation.deleted"


@pytest.fixture
def windows(own_client: TestClient) -> Iterator[list[Any]]:
    """Two connections of ann's."""
    with ExitStack() as stack:
        yield [stack.enter_context(chat_v2(own_client)) for _ in range(2)]


def told(socket: Any, done: Callable[[Json], bool], type: str = UPDATED) -> Json:
    """The first conversation that a connection is told of and that fits."""
    while not done(conversation := until(socket, type)["conversation"]):
        pass
    return dict(conversation)


def send(client: TestClient, method: str, path: str, **body: Any) -> Json:
    """The answer to a request that changes a conversation."""
    response = client.request(method, f"/v1/conversations{path}", json=body or None, headers=bearer())
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_all_windows_hear_that_a_reply_begins_and_that_it_ends(
    own_app: RunningApp, own_client: TestClient, windows: list[Any], scripted: ScriptedChat
) -> None:
    ask(windows[0], "wait here", conversation="new")
    begun = [told(window, lambda one: True) for window in windows]
    assert begun[0] == begun[1] == send(own_client, "GET", "")["data"][0]
    assert begun[0]["response_id"] == begun[0]["leaf"] is not None
    own_app.call(release, scripted)
    ended = [told(window, lambda one: one["response_id"] is None) for window in windows]
    assert ended[0] == ended[1] == send(own_client, "GET", f"/{begun[0]['id']}")
    assert ended[0]["leaf"] == begun[0]["leaf"]


async def release(scripted: ScriptedChat) -> None:
    scripted.release()


def test_all_windows_hear_of_each_change_over_http(own_client: TestClient, windows: list[Any]) -> None:
    id = send(own_client, "POST", "", title="Created", items=[{"role": "user", "content": "Hi"}])["id"]
    changes: list[tuple[Callable[[], Json], Callable[[Json], bool]]] = [
        (lambda: {}, lambda one: one["title"] == "Created"),
        (lambda: send(own_client, "POST", f"/{id}", title="Renamed"), lambda one: one["title"] == "Renamed"),
        (lambda: send(own_client, "POST", f"/{id}", metadata={"a": "b"}), lambda one: one["metadata"] == {"a": "b"}),
        (
            lambda: send(own_client, "POST", f"/{id}/items", items=[{"role": "user", "content": "More"}]),
            lambda one: True,
        ),
        (
            lambda: send(own_client, "DELETE", f"/{id}/items/{send(own_client, 'GET', f'/{id}/items')['last_id']}"),
            lambda one: True,
        ),
    ]
    for change, is_told in changes:
        change()
        for window in windows:
            assert told(window, is_told)["id"] == id
    send(own_client, "DELETE", f"/{id}")
    for window in windows:
        assert told(window, lambda one: True, DELETED) == {"id": id, "object": "conversation.deleted", "deleted": True}


def test_all_windows_hear_which_branch_is_shown_and_that_a_response_is_deleted(
    own_client: TestClient, windows: list[Any]
) -> None:
    first = reply(windows[0], "say one", conversation="new")
    id = first["conversation"]["id"]
    second = reply(windows[0], "say two", conversation={"id": id, "after": None})
    for window in windows:
        told(window, lambda one: one["leaf"] == second["id"] and one["response_id"] is None)
    send(own_client, "POST", f"/{id}", leaf=first["id"])
    for window in windows:
        told(window, lambda one: one["leaf"] == first["id"])
    own_client.delete(f"/v1/responses/{first['id']}", headers=bearer())
    for window in windows:
        told(window, lambda one: one["leaf"] == second["id"])


def test_nobody_else_is_told_and_nobody_of_what_is_not_listed(own_client: TestClient, windows: list[Any]) -> None:
    with chat_v2(own_client, BOB) as bob:
        reply(windows[0], "say secret")
        listed = reply(windows[0], "say open", conversation="new")["conversation"]["id"]
        assert told(windows[1], lambda one: True)["id"] == listed
        own = reply(bob, "say mine", conversation="new")["conversation"]["id"]
        assert told(bob, lambda one: True)["id"] == own


def test_the_standard_socket_and_plain_text_hear_nothing_of_it(own_client: TestClient, windows: list[Any]) -> None:
    plain = own_client.websocket_connect("/ws", headers=bearer())
    with plain as text, own_client.websocket_connect("/v1/responses", headers=bearer()) as standard:
        id = send(own_client, "POST", "", title="Created")["id"]
        assert told(windows[0], lambda one: True)["id"] == id
        text.send_text("say yes")
        assert text.receive_text() == "yes"
        ask(standard, "say no")
        assert standard.receive_json()["type"] == "response.created"


def test_a_conversation_of_plain_text_is_told_to_the_windows(own_client: TestClient, windows: list[Any]) -> None:
    with own_client.websocket_connect("/ws", headers=bearer()) as text:
        text.send_text("say yes")
        assert told(windows[0], lambda one: True)["title"] == "say yes"
