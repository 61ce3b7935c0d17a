"""Every route and every event, used by bob with the ids of what is ann's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, get_args

import pytest
from starlette.routing import Mount, Route, WebSocketRoute

from models.protocols.chat_v1_events import ClientEvent
from models.settings import Settings
from models.validation import Json
from server import create_app, routes
from tests.support.client import ANN, BOB, ask, bearer, log_in
from tests.support.routes import all_routes, filled, http_routes
from tests.support.running_app import RunningApp, start
from tests.support.scripted import ScriptedChat

SECRET_WORDS = "the treasure lies under the oak"
EVENTS = [kind.__name__ for kind in get_args(ClientEvent)]


class Victim:
    """Ann, with a stored reply, one that is running, and one that belongs to no conversation."""

    def __init__(self, app: RunningApp, scripted: ScriptedChat, socket: Any) -> None:
        self.app = app
        self.scripted = scripted
        self.socket = socket
        self.own = self.receive("session.created")["session"]["conversation"]
        self.finished = self.ask(f"say {SECRET_WORDS}", "new", "response.done")
        self.running = self.ask(f"wait {SECRET_WORDS}", "new", "response.output_text.delta")
        self.unstored = self.ask(f"say {SECRET_WORDS}", "none", "response.done")
        self.before = self.everything()

    def receive(self, type: str) -> Json:
        """The next event of a type."""
        while (event := self.socket.receive_json())["type"] != type:
            assert event["type"] != "error", event
        return dict(event)

    def ask(self, input: str, conversation: str, until: str) -> Json:
        """Start a reply and wait for an event of it; returns its id and that of its conversation."""
        ask(self.socket, input, conversation=conversation)
        response: Json = self.receive("response.created")["response"]
        self.receive(until)
        return response

    @property
    def conversations(self) -> list[str]:
        return [self.finished["conversation"], self.running["conversation"], self.own]

    @property
    def responses(self) -> list[str]:
        return [self.finished["id"], self.running["id"], self.unstored["id"]]

    def everything(self) -> Any:
        """All that she can read over HTTP, but for how much of the running reply is stored."""
        client = self.app.client()
        paths = [f"/v1/conversations/{id}" for id in self.conversations[:2]]
        found = [client.get(path, headers=bearer(ANN)).json() for path in ["/v1/conversations", *paths]]
        assert [len(one["items"]) for one in found[1:]] == [2, 2]
        del found[2]["items"][1]
        return found


@pytest.fixture(scope="module")
def one_victim(shared_settings: Settings) -> Iterator[Victim]:
    """One victim for all tests: each of them leaves her as she was."""
    scripted = ScriptedChat()
    with ExitStack() as stack:
        app = stack.enter_context(start(create_app(shared_settings, scripted.opened)))
        socket = stack.enter_context(app.client().websocket_connect("/ws", ["chat.v1"], headers=bearer(ANN)))
        yield Victim(app, scripted, socket)


@pytest.fixture
def victim(one_victim: Victim) -> Iterator[Victim]:
    """The victim, to whom nothing happens in the test."""
    yield one_victim
    assert one_victim.everything() == one_victim.before
    assert one_victim.scripted.running == 1, "her reply goes on"


WITHOUT_IDS = {"/", "/login", "/logout", "/health", "/ready", "/metrics", "/args"}
WITHOUT_IDS |= {"/v1/models", "/v1/chat/completions"}


@pytest.mark.parametrize("by", ["secret", "cookie"])
@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", [path for path, _ in http_routes(routes)])
def test_no_route_finds_what_belongs_to_another_user(victim: Victim, path: str, method: str, by: str) -> None:
    client = victim.app.client()
    if by == "cookie":
        log_in(client, BOB)
    headers = {"Origin": "http://testserver"} if by == "cookie" else bearer(BOB)
    for id in victim.conversations if "{id" in path else [""]:
        response = client.request(
            method,
            filled(path, id),
            headers=dict(headers),
            params={"after": victim.finished["conversation"], "query": "treasure"},
            json={"title": "Bob was here"} if method == "PATCH" else None,
        )
        assert SECRET_WORDS not in response.text
        assert all(id not in response.text for id in victim.conversations + victim.responses)
        if path not in WITHOUT_IDS:
            assert response.status_code in (404, 405)
    assert client.get("/v1/conversations", headers=bearer(BOB)).json() == {"data": [], "has_more": False}


def test_all_other_routes_are_the_socket_and_the_static_files() -> None:
    others = {path: type(route) for path, route in all_routes(routes) if not isinstance(route, Route)}
    assert others == {"/ws": WebSocketRoute, "/static": Mount}


def hostile_events(victim: Victim) -> dict[str, list[Json]]:
    """By the kind of client event: all that name something of ann's."""
    create = [
        {"type": "response.create", "response": {"input": "say it", "conversation": id, **after}}
        for id in victim.conversations
        for after in ({}, {"after": "none"}, {"after": victim.finished["id"]})
    ]
    own = {"type": "response.create", "response": {"input": "say it", "after": victim.finished["id"]}}
    return {
        "SessionUpdate": [],  # names nothing
        "ResponseCreate": [*create, own],
        "ResponseCancel": [{"type": "response.cancel", "response_id": id} for id in victim.responses],
        "ResponseResume": [
            {"type": "response.resume", "response_id": id, "starting_after": number}
            for id in victim.responses
            for number in (0, 3)
        ],
    }


@pytest.mark.parametrize("kind", EVENTS)
def test_no_event_finds_what_belongs_to_another_user(victim: Victim, kind: str) -> None:
    with victim.app.client().websocket_connect("/ws", ["chat.v1"], headers=bearer(BOB)) as bob:
        bob.receive_json()
        for event in hostile_events(victim)[kind]:
            bob.send_json(event)
            answer = bob.receive_json()
            assert answer["type"] == "error", event
            assert answer["error"]["code"] in ("conversation_not_found", "response_not_found", "item_not_found")
        bob.send_json({"type": "response.cancel"})  # all of his own, and of nobody else
        bob.send_json({"type": "response.cancel", "response_id": "mark"})
        assert bob.receive_json()["error"]["code"] == "response_not_found"
