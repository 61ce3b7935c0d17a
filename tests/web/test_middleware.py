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

# Proxies


@pytest.fixture
def proxied(settings: Settings, scripted: ScriptedChat) -> Iterator[RunningApp]:
    """An app that trusts a network of proxies, and its Unix socket."""
    with start(create_app(replace(settings, proxies=("10.0.0.0/8", "unix")), scripted.opened)) as running:
        yield running


def client_at(running: RunningApp, host: str | None) -> TestClient:
    """A client at an address, or one of a Unix socket."""
    client = TestClient(running.app, client=(host, 1) if host else None)  # type: ignore[arg-type]
    client.portal = running.client().portal
    return client


@pytest.mark.parametrize(
    ("host", "trusted"),
    [("10.1.2.3", True), ("::ffff:10.1.2.3", True), (None, True), ("127.0.0.1", False), ("unix.example", False)],
    ids=["network", "IPv4 as IPv6", "Unix socket", "other address", "name"],
)
def test_only_a_trusted_proxy_says_who_its_client_is(proxied: RunningApp, host: str | None, trusted: bool) -> None:
    client = client_at(proxied, host)
    for number in range(10):
        headers = {"X-Forwarded-For": f"1.1.1.1, 203.0.113.{number}", "X-Forwarded-Proto": "https"}
        response = client.post("/login", data={"secret": "wrong"}, headers=headers)
        assert response.status_code == 401
    headers = {"X-Forwarded-For": "203.0.113.99", "X-Forwarded-Proto": "https"}
    response = client.post("/login", data={"secret": ANN}, headers=headers, follow_redirects=False)
    assert response.status_code == (303 if trusted else 429)
    assert ("__Host-parley_session" in response.headers.get("set-cookie", "")) == trusted


def test_the_client_of_a_trusted_proxy_is_blocked_alone(proxied: RunningApp) -> None:
    client = client_at(proxied, "10.1.2.3")
    for _ in range(10):
        client.post("/login", data={"secret": "wrong"}, headers={"X-Forwarded-For": "203.0.113.1"})
    for address, status in (("203.0.113.1", 429), ("203.0.113.2", 200)):
        headers = bearer() | {"X-Forwarded-For": address}
        assert client.get("/v1/models", headers=headers).status_code == status


def test_without_the_setting_no_proxy_is_trusted(shared_app: RunningApp) -> None:
    client = client_at(shared_app, "127.0.0.1")
    for number in range(10):
        client.post("/login", data={"secret": "wrong"}, headers={"X-Forwarded-For": f"203.0.113.{number}"})
    assert client.get("/v1/models", headers=bearer() | {"X-Forwarded-For": "203.0.113.99"}).status_code == 429


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
