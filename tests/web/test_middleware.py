"""The headers of every response, and the names of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import Message

from models.errors import ModelError
from models.settings import Settings
from models.web.request_body import BODY_BYTES
from server import create_app, routes
from tests.support.client import ANN, assert_security_headers, bearer, complete, converse
from tests.support.routes import METHODS, filled, http_routes
from tests.support.running_app import RunningApp, start
from tests.support.scripted import ScriptedChat

# Security headers


@pytest.mark.parametrize(("path", "route"), http_routes(routes), ids=[path for path, _ in http_routes(routes)])
def test_every_response_of_a_route_has_the_security_headers(shared_app: RunningApp, path: str, route: Route) -> None:
    statuses = set()
    for method in METHODS:
        client = shared_app.client()
        id = converse(client, "say one") if "conversations/" in path else "scripted"
        for headers in ({}, bearer(), bearer("wrong")):
            form = {"secret": ANN} if path == "/login" else None
            response = client.request(method, filled(path, id), data=form, headers=headers, follow_redirects=False)
            assert_security_headers(response)
            statuses.add(response.status_code)
    assert statuses <= {200, 204, 303, 400, 401, 405}
    assert statuses & {200, 303, 400}, "some request gets further than the credentials"
    assert 405 in statuses


@pytest.mark.parametrize("stream", [False, True], ids=["one object", "stream"])
def test_a_completion_has_the_security_headers(client: TestClient, stream: bool) -> None:
    response = complete(client, "say one", stream=stream)
    assert response.status_code == 200
    assert_security_headers(response)


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/v1", "//", "/static/nothing.js", "/static/../server.py"])
def test_an_unknown_path_has_the_security_headers(client: TestClient, path: str) -> None:
    response = client.get(path, headers=bearer())
    assert response.status_code == (200 if path == "//" else 404)
    assert_security_headers(response)


def test_a_redirect_has_the_security_headers(client: TestClient) -> None:
    response = client.get("/v1/conversations/", headers=bearer(), follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (307, "http://testserver/v1/conversations")
    assert_security_headers(response)


def test_a_refusal_has_the_security_headers(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", content=b" " * (BODY_BYTES + 1), headers=bearer())
    assert response.status_code == 413
    assert_security_headers(response)
    for _ in range(11):
        response = client.get("/v1/models", headers=bearer("wrong"))
        assert_security_headers(response)
    assert response.status_code == 429


# Hosts


@pytest.fixture(scope="module")
def app_with_hosts(shared_settings: Settings) -> Iterator[RunningApp]:
    """An app that has four names."""
    hosts = ("chat.example.com", "*.example.org", "127.0.0.1", "[::1]")
    settings = replace(shared_settings, hosts=hosts, data=shared_settings.data / "hosts")
    with start(create_app(settings, ScriptedChat().opened)) as running:
        yield running


@pytest.mark.parametrize(
    "host",
    [
        "chat.example.com",
        "chat.example.com:8443",
        "CHAT.Example.COM",
        "a.example.org",
        "a.b.example.org:80",
        "127.0.0.1:7777",
        "[::1]",
        "[::1]:7777",
    ],
)
def test_a_request_to_an_own_name_is_answered(app_with_hosts: RunningApp, host: str) -> None:
    client = app_with_hosts.client()
    assert client.get("/health", headers={"Host": host}).status_code == 200
    headers = {"Host": host, **bearer()}
    with client.websocket_connect("/ws", ["chat.v1"], headers=headers) as socket:
        assert socket.receive_json()["type"] == "session.created"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "example.com",
        "www.chat.example.com",
        "chat.example.com.evil.example",
        "evilchat.example.com",
        "example.org",
        "evilexample.org",
        "a.example.org.evil.example",
        "localhost",
        "127.0.0.2",
        "[::2]",
        "::1",
        "",
        "[",
        "chat.example.com/..",
        "evil.example@chat.example.com",
        "chat.example.com evil.example",
    ],
)
def test_a_request_to_another_name_is_refused_on_every_path(app_with_hosts: RunningApp, host: str) -> None:
    client = app_with_hosts.client()
    for path in ("/", "/v1/models", "/static/chat.js", "/nothing"):
        response = client.get(path, headers={"Host": host, **bearer()}, follow_redirects=False)
        assert (response.status_code, response.text) == (400, "Invalid host header")
        assert_security_headers(response)


@pytest.mark.parametrize("host", ["evil.example", "example.org"])
def test_a_socket_to_another_name_is_never_accepted(app_with_hosts: RunningApp, host: str) -> None:
    with (
        pytest.raises(WebSocketDenialResponse) as raised,
        app_with_hosts.client().websocket_connect("/ws", ["chat.v1"], headers={"Host": host, **bearer()}),
    ):
        pass
    assert raised.value.status_code == 400


@pytest.mark.parametrize("host", ["evil.example", "[::2]:1", "chat.example.com"])
def test_without_the_setting_every_name_is_allowed(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == 200


# Failed starts


def test_a_failed_start_is_one_line(settings: Settings) -> None:
    @asynccontextmanager
    async def opens_nothing(app: Starlette) -> AsyncIterator[Any]:
        raise ModelError("there is no model: choose another one")
        yield

    app = create_app(settings, opens_nothing)
    sent: list[Message] = []

    async def run() -> None:
        async def receive() -> Message:
            return {"type": "lifespan.startup"}

        async def send(message: Message) -> None:
            sent.append(message)

        with pytest.raises(ModelError):
            await app({"type": "lifespan", "state": {}, "asgi": {"version": "3.0"}}, receive, send)

    asyncio.run(run())
    assert sent == [{"type": "lifespan.startup.failed", "message": "there is no model: choose another one"}]
    assert app.state.start_error == "there is no model: choose another one"
