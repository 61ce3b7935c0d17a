"""The headers of every response, and the names of the server."""

from __future__ import annotations

import asyncio
import re
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
from tests.support.client import ANN, assert_security_headers, bearer, chat_v2, complete, reply
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


def made_for(client: TestClient, path: str) -> tuple[str, str]:
    """The ids of something new that a path has, and of an item in it."""
    if "{id}" not in path:
        return "scripted", ""
    with chat_v2(client) as socket:
        response = reply(socket, "say one", conversation="new")
    owner = response if path.startswith("/v1/responses/") else response["conversation"]
    return owner["id"], response["output"][0]["id"]


@pytest.mark.parametrize(("path", "route"), http_routes(routes), ids=[path for path, _ in http_routes(routes)])
def test_every_response_of_a_route_has_the_security_headers(shared_app: RunningApp, path: str, route: Route) -> None:
    statuses = set()
    for method in METHODS:
        client = shared_app.client()
        ids = made_for(client, path)
        for headers in ({}, bearer(), bearer("wrong")):
            form = {"secret": ANN} if path == "/login" else None
            response = client.request(method, filled(path, *ids), data=form, headers=headers, follow_redirects=False)
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
    response = client.get("/health/", follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (307, "http://testserver/health")
    assert_security_headers(response)


def test_a_refusal_has_the_security_headers(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", content=b" " * (BODY_BYTES + 1), headers=bearer())
    assert response.status_code == 413
    assert_security_headers(response)
    for _ in range(11):
        response = client.get("/v1/models", headers=bearer("wrong"))
        assert_security_headers(response)
    assert response.status_code == 429


# The ids of requests


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/health", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/v1/unknown", 404),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/chat/completions", 400),
    ],
)
def test_a_response_has_the_id_of_its_request(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path, headers=bearer() | {"X-Request-Id": "trace-7/a=b"})
    assert (response.status_code, response.headers["x-request-id"]) == (status, "trace-7/a=b")


@pytest.mark.parametrize("sent", [None, "", "two words", "x" * 129, "caf\u00e9", "a\tb"], ids=ascii)
def test_a_request_without_a_short_plain_id_gets_one(client: TestClient, sent: str | None) -> None:
    headers = [] if sent is None else [(b"X-Request-Id", sent.encode("latin-1"))]
    ids = [client.get("/health", headers=headers).headers.get_list("x-request-id") for _ in range(2)]
    assert all(re.fullmatch("req_[0-9a-f]{32}", id) for (id,) in ids)
    assert ids[0] != ids[1]


def test_a_bug_has_the_id_of_its_request(own_app: RunningApp) -> None:
    own_app.app.state.metrics = None
    response = own_app.client(raise_server_exceptions=False).get("/metrics", headers={"X-Request-Id": "trace-7"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "trace-7")


@pytest.mark.parametrize("stream", [False, True], ids=["one object", "stream"])
def test_the_log_connects_replies_with_the_id_of_their_request(
    client: TestClient, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    headers = bearer() | {"X-Request-Id": "trace-8"}
    body = {"model": "scripted", "messages": [{"role": "user", "content": "say yes"}], "n": 2, "stream": stream}
    assert client.post("/v1/chat/completions", json=body, headers=headers).headers["x-request-id"] == "trace-8"
    ended = {vars(record)["response"] for record in caplog.records if record.getMessage().startswith("reply ")}
    (asked,) = [record for record in caplog.records if "request=trace-8" in record.getMessage()]
    assert len(ended) == 2
    assert {*vars(asked)["response"].split(",")} == ended


# Pages of other origins

PAGE = "https://page.example"


@pytest.fixture(scope="module")
def app_with_origins(shared_settings: Settings) -> Iterator[RunningApp]:
    """An app that pages of another origin may use."""
    settings = replace(shared_settings, origins=(PAGE, "https://two.example"), data=shared_settings.data / "origins")
    with start(create_app(settings, ScriptedChat().opened)) as running:
        yield running


def preflight(client: TestClient, origin: str, path: str = "/v1/chat/completions", method: str = "POST") -> Any:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    return client.options(path, headers=headers)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models/", "/v1/conversations/conv_1", "/v1/unknown"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_browser_may_ask_for_an_allowed_page_without_a_login(
    app_with_origins: RunningApp, path: str, method: str
) -> None:
    response = preflight(app_with_origins.client(), PAGE, path, method)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["access-control-allow-credentials"] == "true"
    assert "authorization" in response.headers["access-control-allow-headers"]
    assert method in response.headers["access-control-allow-methods"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "https://page.example.evil.example", "http://page.example"]
)
def test_a_browser_that_asks_for_another_page_is_told_no(app_with_origins: RunningApp, origin: str) -> None:
    client = app_with_origins.client()
    response = preflight(client, origin)
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers
    response = client.get("/v1/models", headers=bearer() | {"Origin": origin})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("stream", [False, True], ids=["one object", "stream"])
def test_an_allowed_page_can_read_replies_and_refusals(app_with_origins: RunningApp, stream: bool) -> None:
    client = app_with_origins.client()
    body = {"model": "scripted", "messages": [{"role": "user", "content": "say yes"}], "stream": stream}
    for secret, status in ((ANN, 200), ("wrong", 401)):
        headers = bearer(secret) | {"Origin": PAGE}
        response = client.post("/v1/chat/completions", json=body, headers=headers)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == PAGE
        assert "Origin" in response.headers["vary"]
        exposed = {name.strip() for name in response.headers["access-control-expose-headers"].split(",")}
        assert exposed == {"X-Request-Id", "Retry-After"}


def test_only_the_api_is_open_to_other_pages(app_with_origins: RunningApp) -> None:
    client = app_with_origins.client()
    for path in ("/", "/health", "/login", "/v1x"):
        assert "access-control-allow-origin" not in preflight(client, PAGE, path).headers
        assert "access-control-allow-origin" not in client.get(path, headers={"Origin": PAGE}).headers


def test_without_allowed_origins_a_browser_is_told_nothing(client: TestClient) -> None:
    response = preflight(client, PAGE)
    assert response.status_code == 403
    assert not [name for name in response.headers if name.startswith("access-control")]


# A slash at the end


@pytest.mark.parametrize("root", ["", "/parley"])
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/models/"), ("GET", "/v1/conversations//"), ("POST", "/v1/chat/completions/")]
)
def test_a_slash_at_the_end_of_a_path_of_the_api_has_no_meaning(
    shared_app: RunningApp, root: str, method: str, path: str
) -> None:
    client = TestClient(shared_app.app, f"http://testserver{root}", root_path=root)
    client.portal = shared_app.client().portal
    body = {"model": "scripted", "messages": [{"role": "user", "content": "say yes"}]} if method == "POST" else None
    response = client.request(method, path, json=body, headers=bearer(), follow_redirects=False)
    assert response.status_code == 200
    assert "object" in response.json() or "data" in response.json()


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
    with client.websocket_connect("/ws", ["chat.v2"], headers=headers) as socket:
        assert socket.receive_json()["type"] == "parley.session.created"


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
        app_with_hosts.client().websocket_connect("/ws", ["chat.v2"], headers={"Host": host, **bearer()}),
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
