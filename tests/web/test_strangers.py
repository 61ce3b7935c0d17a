"""Every route and every event, used by bob with the ids of what is ann's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.routing import Mount, Route, WebSocketRoute

from models.settings import Settings
from models.validation import Json
from server import create_app, routes
from tests.support.client import ANN, BOB, ENDS, ask, bearer, log_in, until
from tests.support.routes import all_routes, filled, http_routes
from tests.support.running_app import RunningApp, start
from tests.support.scripted import ScriptedChat

SECRET_WORDS = "the treasure lies under the oak"
NOT_FOUND = ("conversation_not_found", "response_not_found", "previous_response_not_found", "item_not_found")
OPEN = "response.output_text.delta"


class Victim:
    """Ann, with replies in conversations and without, finished and running, and one that is not stored."""

    def __init__(self, app: RunningApp, scripted: ScriptedChat, socket: Any) -> None:
        self.app = app
        self.scripted = scripted
        self.socket = socket
        self.finished = self.ask(f"say {SECRET_WORDS}", *ENDS, conversation="new")
        self.running = self.ask(f"wait {SECRET_WORDS}", OPEN, conversation="new", stream_id="running")
        self.alone = self.ask(f"say {SECRET_WORDS}", *ENDS)
        self.unstored = self.ask(f"say {SECRET_WORDS}", *ENDS, store=False)
        self.items = [item["id"] for item in self.get(f"/v1/conversations/{self.conversations[0]}/items")["data"]]
        self.before = self.everything()

    def ask(self, input: str, *types: str, **fields: Any) -> Json:
        """Ask, wait for an event of some types, and return the response as it was created."""
        ask(self.socket, input, **fields)
        response: Json = until(self.socket, "response.created")["response"]
        until(self.socket, *types)
        return response

    def get(self, path: str) -> Json:
        response = self.app.client().get(path, headers=bearer(ANN))
        assert response.status_code == 200
        return dict(response.json())

    @property
    def conversations(self) -> list[str]:
        return [self.finished["conversation"]["id"], self.running["conversation"]["id"]]

    @property
    def responses(self) -> list[str]:
        return [one["id"] for one in (self.finished, self.running, self.alone, self.unstored)]

    @property
    def ids(self) -> list[str]:
        return [*self.conversations, *self.responses, *self.items]

    def everything(self) -> Any:
        """All that she can read over HTTP, but for how much of the running reply is stored."""
        finished, running = self.conversations
        responses = [self.get(f"/v1/responses/{id}") for id in self.responses]
        inputs = [self.get(f"/v1/responses/{id}/input_items") for id in self.responses[:3]]
        branch = self.get(f"/v1/conversations/{running}/branch")["data"]
        assert [turn.get("status") for turn in branch] == ["completed", "in_progress"]
        paths = ["/v1/conversations", f"/v1/conversations/{finished}", f"/v1/conversations/{finished}/branch"]
        return [responses, inputs, branch[0], *(self.get(path) for path in paths)]


@pytest.fixture(scope="module")
def one_victim(shared_settings: Settings) -> Iterator[Victim]:
    """One victim for all tests: each of them leaves her as she was."""
    scripted = ScriptedChat()
    with ExitStack() as stack:
        app = stack.enter_context(start(create_app(shared_settings, scripted.opened)))
        socket = stack.enter_context(app.client().websocket_connect("/ws", ["chat.v2"], headers=bearer(ANN)))
        until(socket, "parley.session.created")
        yield Victim(app, scripted, socket)


@pytest.fixture
def victim(one_victim: Victim) -> Iterator[Victim]:
    """The victim, to whom nothing happens in the test."""
    yield one_victim
    assert one_victim.everything() == one_victim.before
    assert one_victim.scripted.running == 1, "her reply goes on"


WITHOUT_IDS = {"/", "/login", "/logout", "/health", "/ready", "/metrics", "/args"}
WITHOUT_IDS |= {"/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses"}
BODIES = {  # of POST, by the path, where a body is needed to get further
    "/v1/conversations/{id}": {"title": "Bob was here"},
    "/v1/conversations/{id}/items": {"items": [{"role": "user", "content": "Bob was here"}]},
}


def ids_of(victim: Victim, path: str) -> list[str]:
    """The ids of what is ann's that fit a path."""
    if "{id" not in path:
        return [""]
    return victim.responses if path.startswith("/v1/responses") else victim.conversations


@pytest.mark.parametrize("by", ["secret", "cookie"])
@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", [path for path, _ in http_routes(routes)])
def test_no_route_finds_what_belongs_to_another_user(victim: Victim, path: str, method: str, by: str) -> None:
    client = victim.app.client()
    if by == "cookie":
        log_in(client, BOB)
    headers = {"Origin": "http://testserver"} if by == "cookie" else bearer(BOB)
    parameters = {"": {}, "?": {"after": victim.conversations[0], "query": "treasure", "stream": "true"}}
    for id in ids_of(victim, path):
        for item in victim.items if "{item}" in path else [""]:
            for query in parameters.values():
                url = filled(path, id, item)
                body = BODIES.get(path) if method == "POST" else None
                response = client.request(method, url, headers=dict(headers), params=query, json=body)
                assert SECRET_WORDS not in response.text
                assert not [id for id in victim.ids if id in response.text]
                if path not in WITHOUT_IDS and "{id" in path:
                    assert response.status_code in (404, 405), response.text
    bobs = client.get("/v1/conversations", headers=bearer(BOB)).json()["data"]
    assert {conversation["title"] for conversation in bobs} <= {""}, "only what he has created himself"


def test_a_request_to_change_what_another_user_has_is_not_found(victim: Victim) -> None:
    client = victim.app.client()
    own = client.post("/v1/conversations", headers=bearer(BOB)).json()["id"]
    for leaf in (*victim.items, *victim.responses):
        response = client.post(f"/v1/conversations/{own}", json={"leaf": leaf}, headers=bearer(BOB))
        assert (response.status_code, response.json()["error"]["code"]) == (404, "item_not_found")


def test_all_other_routes_are_the_sockets_and_the_static_files() -> None:
    others = {path: type(route) for path, route in all_routes(routes) if not isinstance(route, Route)}
    assert others == {"/ws": WebSocketRoute, "/v1/responses": WebSocketRoute, "/static": Mount}


def hostile_requests(victim: Victim) -> list[Json]:
    """All requests for a response that name something of ann's."""
    conversations: list[Json] = [{"conversation": id} for id in victim.conversations]
    places: list[Json] = [
        {"conversation": {"id": id, "after": after}}
        for id in (*victim.conversations, "conv_unknown")
        for after in (None, *victim.responses, *victim.items)
    ]
    previous: list[Json] = [
        {"previous_response_id": id, "store": store} for id in victim.responses for store in (True, False)
    ]
    references: list[Json] = [
        {"input": [{"type": "item_reference", "id": id}]} for id in (*victim.items, *victim.responses)
    ]
    return [{"input": "say it"} | one for one in (*conversations, *places, *previous, *references)]


def test_no_request_over_http_finds_what_belongs_to_another_user(victim: Victim) -> None:
    client = victim.app.client()
    for request in hostile_requests(victim):
        for stream in (False, True):
            response = client.post("/v1/responses", json=request | {"stream": stream}, headers=bearer(BOB))
            assert response.status_code in (400, 404), request
            assert response.json()["error"]["code"] in NOT_FOUND, request
            assert SECRET_WORDS not in response.text


@pytest.mark.parametrize("path", ["/ws", "/v1/responses"])
def test_no_request_on_a_socket_finds_what_belongs_to_another_user(victim: Victim, path: str) -> None:
    with victim.app.client().websocket_connect(path, ["chat.v2"], headers=bearer(BOB)) as bob:
        if path == "/ws":
            bob.receive_json()
        for request in hostile_requests(victim):
            bob.send_json({"type": "response.create"} | request)
            answer = bob.receive_json()
            assert answer["type"] == "error", request
            assert answer["error"]["code"] in NOT_FOUND, request
            assert SECRET_WORDS not in str(answer)
        for id in victim.responses:
            bob.send_json({"type": "response.steer", "previous_response_id": id, "input": "go on"})
            answer = bob.receive_json()
            assert (answer["type"], answer["error"]["code"]) == ("response.steer.failed", "response_not_found")


def test_no_event_of_a_chat_page_finds_what_belongs_to_another_user(victim: Victim) -> None:
    with victim.app.client().websocket_connect("/ws", ["chat.v2"], headers=bearer(BOB)) as bob:
        bob.receive_json()
        for id in victim.responses:
            for kind in ("parley.response.cancel", "parley.response.resume"):
                bob.send_json({"type": kind, "response_id": id})
                answer = bob.receive_json()
                assert (answer["type"], answer["error"]["code"]) == ("error", "response_not_found")
        bob.send_json({"type": "parley.response.cancel"})  # all of his own, and of nobody else
        bob.send_json({"type": "parley.response.cancel", "response_id": "mark"})
        assert bob.receive_json()["error"]["code"] == "response_not_found"
