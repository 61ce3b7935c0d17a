"""Two users with hostile intentions: every route and every event, with the other's ids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from models import events
from models.settings import Settings
from server import create_app, routes
from tests.conftest import ANN, BOB
from tests.scripted import ScriptedChat
from tests.test_server import Json, bearer, log_in

SECRET_WORDS = "the treasure lies under the oak"
KINDS = [kind.__name__ for kind in events.ClientEvent.__args__]  # type: ignore[attr-defined]


class Victim:
    """Ann, with a conversation, a reply that is being made in another and one that no conversation keeps."""

    def __init__(self, client: TestClient, socket: Any) -> None:
        self.client = client
        self.socket = socket
        self.own = self.receive("session.created")["session"]["conversation"]
        self.finished = self.ask(f"say {SECRET_WORDS}", "new", "response.done")
        self.live = self.ask(f"wait {SECRET_WORDS}", "new", "response.output_text.delta")
        self.unkept = self.ask(f"say {SECRET_WORDS}", "none", "response.done")
        self.before = self.everything()

    def receive(self, type: str) -> Json:
        while (event := self.socket.receive_json())["type"] != type:
            assert event["type"] != "error", event
        return dict(event)

    def ask(self, input: str, conversation: str, until: str) -> Json:
        request = {"input": input, "conversation": conversation}
        self.socket.send_json({"type": "response.create", "response": request})
        response: Json = self.receive("response.created")["response"]
        self.receive(until)
        return response

    @property
    def conversations(self) -> list[str]:
        return [self.finished["conversation"], self.live["conversation"], self.own]

    @property
    def responses(self) -> list[str]:
        return [self.finished["id"], self.live["id"], self.unkept["id"]]

    def everything(self) -> Any:
        """All that she can read over HTTP, but for how far the reply that grows has been written down."""
        paths = [f"/v1/conversations/{id}" for id in self.conversations[:2]]
        found = [self.client.get(path, headers=bearer(ANN)).json() for path in ["/v1/conversations", *paths]]
        assert [len(one["items"]) for one in found[1:]] == [2, 2]
        del found[2]["items"][1]
        return found


@pytest.fixture
def victim(settings: Settings, scripted: ScriptedChat) -> Iterator[Victim]:
    with (
        TestClient(create_app(settings, scripted.opened)) as client,
        client.websocket_connect("/ws", ["chat.v1"], headers=bearer(ANN)) as socket,
    ):
        victim = Victim(client, socket)
        yield victim
        assert victim.everything() == victim.before
        assert scripted.running == 1, "her reply goes on"


OPEN = {"/", "/login", "/logout", "/health", "/ready", "/metrics", "/args"}  # without any id
OPEN |= {"/v1/models", "/v1/chat/completions"}


@pytest.mark.parametrize("by", ["secret", "cookie"])
@pytest.mark.parametrize(
    ("route", "method"),
    [(route, method) for route in routes if isinstance(route, Route) for method in ("GET", "POST", "PATCH", "DELETE")],
)
def test_over_http_the_others_conversations_are_not_there(victim: Victim, route: Route, method: str, by: str) -> None:
    client = victim.client
    if by == "cookie":
        log_in(client, BOB)
    headers = {"Origin": "http://testserver"} if by == "cookie" else bearer(BOB)
    for id in victim.conversations if "{id" in route.path else [""]:
        answer = client.request(
            method,
            re.sub("{id.*?}", id, route.path),
            headers=dict(headers),
            params={"after": victim.finished["conversation"], "query": "treasure"},
            json={"title": "Bob was here"} if method == "PATCH" else None,
        )
        assert SECRET_WORDS not in answer.text
        assert all(id not in answer.text for id in victim.conversations + victim.responses)
        if route.path not in OPEN:
            assert answer.status_code in (404, 405)
    assert client.get("/v1/conversations", headers=bearer(BOB)).json() == {"data": [], "has_more": False}


def test_every_route_but_these_is_walked_above() -> None:
    others = {route.path for route in routes if not isinstance(route, Route)}
    assert others == {"/ws", "/static"}
    assert all(isinstance(route, Mount) for route in routes if route.path == "/static")


def hostile_events(victim: Victim) -> dict[str, list[Json]]:
    """By the kind of client event: those that name what is Ann's, and the code of the error each has to meet."""
    create = [
        {"type": "response.create", "response": {"input": "say it", "conversation": id, **after}}
        for id in victim.conversations
        for after in ({}, {"after": "none"}, {"after": victim.finished["id"]})
    ]
    mine = {"type": "response.create", "response": {"input": "say it", "after": victim.finished["id"]}}
    return {
        "SessionUpdate": [],  # names nothing
        "ResponseCreate": [*create, mine],
        "ResponseCancel": [{"type": "response.cancel", "response_id": id} for id in victim.responses],
        "ResponseResume": [
            {"type": "response.resume", "response_id": id, "starting_after": number}
            for id in victim.responses
            for number in (0, 3)
        ],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_over_the_socket_what_is_the_others_is_not_found(victim: Victim, kind: str) -> None:
    with victim.client.websocket_connect("/ws", ["chat.v1"], headers=bearer(BOB)) as bob:
        bob.receive_json()
        for event in hostile_events(victim)[kind]:
            bob.send_json(event)
            answer = bob.receive_json()
            assert answer["type"] == "error", event
            assert answer["error"]["code"] in ("conversation_not_found", "response_not_found", "item_not_found")
        bob.send_json({"type": "response.cancel"})  # all of his, and of nobody else
        bob.send_json({"type": "response.cancel", "response_id": "mark"})
        assert bob.receive_json()["error"]["code"] == "response_not_found"
