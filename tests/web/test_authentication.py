"""Who may use which route, and with which credentials."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from models.settings import Settings
from models.validation import Json
from server import create_app, routes, users_only
from tests.support.client import ANN, BOB, bearer, bearer_subprotocol, close_code, converse, log_in
from tests.support.routes import METHODS, all_routes, filled, http_routes
from tests.support.running_app import RunningApp, start
from tests.support.scripted import ScriptedChat

OPEN = {  # outside of /v1, for everybody
    "/": "shows the login form",
    "/login": "takes a secret",
    "/logout": "deletes the cookie",
    "/health": "says nothing of users",
    "/ready": "says nothing of users",
    "/metrics": "has numbers only",
    "/args": "has no secrets",
    "/static": "has the files of the page",
}
CLOSED = [path for path, _ in http_routes(routes) if path.startswith("/v1/")]
SOCKETS = {  # which authenticate by themselves
    "/ws": "after it has accepted",
    "/v1/responses": "before it accepts",
}


# Which routes are closed


def test_every_open_route_is_listed_here() -> None:
    sockets = [path for path, route in all_routes(routes) if isinstance(route, WebSocketRoute)]
    others = [path for path, route in all_routes(routes) if not isinstance(route, WebSocketRoute)]
    assert sockets == [*SOCKETS]
    assert {path for path in others if not path.startswith("/v1/")} == set(OPEN)
    assert len(CLOSED) == len(others) - len(OPEN)


def test_the_closed_routes_are_the_whole_api() -> None:
    assert CLOSED == [
        "/v1/models",
        "/v1/models/{id:path}",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/{id}",
        "/v1/responses/{id}/cancel",
        "/v1/responses/{id}/input_items",
        "/v1/conversations",
        "/v1/conversations/{id}",
        "/v1/conversations/{id}/items",
        "/v1/conversations/{id}/items/{item}",
        "/v1/conversations/{id}/branch",
        "/v1/conversations/{id}/export",
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", [*CLOSED, "/v1/", "/v1/unknown", "/v1/conversations/{id}/unknown"])
def test_a_path_under_v1_needs_a_user_in_every_method(client: TestClient, path: str, method: str) -> None:
    response = client.request(method, filled(path, "conv_1"))
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    if method != "HEAD":
        assert response.json()["error"]["code"] == "invalid_credentials"


@pytest.mark.parametrize("path", sorted(OPEN.keys() - {"/static"}))
def test_an_open_route_needs_no_user(client: TestClient, path: str) -> None:
    method = "POST" if path in ("/login", "/logout") else "GET"
    form = {"secret": ANN} if path == "/login" else None
    assert client.request(method, path, data=form, follow_redirects=False).status_code in (200, 303)


@pytest.fixture
def app_with_new_routes(settings: Settings, scripted: ScriptedChat) -> Iterator[RunningApp]:
    """An app with one more mount like that of /v1, with new routes that check nothing themselves."""

    async def page(request: Request) -> Response:
        return PlainTextResponse(f"for {request.user.username}")

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("for users")
        await websocket.close()

    app = create_app(settings, scripted.opened)
    app.router.routes.append(
        Mount("/v2", routes=[Route("/new", page), WebSocketRoute("/ws", socket)], middleware=[users_only])
    )
    with start(app) as running:
        yield running


def test_a_new_route_in_a_closed_mount_needs_a_user(app_with_new_routes: RunningApp) -> None:
    client = app_with_new_routes.client()
    response = client.get("/v2/new")
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_credentials")
    assert client.get("/v2/new", headers=bearer("wrong")).status_code == 401
    assert client.get("/v2/new", headers=bearer()).text == "for ann"
    assert client.get("/v2/unknown").status_code == 401
    assert client.get("/v2/unknown", headers=bearer()).status_code == 404


def test_a_new_socket_in_a_closed_mount_needs_a_user(app_with_new_routes: RunningApp) -> None:
    client = app_with_new_routes.client()
    with client.websocket_connect("/v2/ws", headers=bearer()) as socket:
        assert socket.receive_text() == "for users"
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v2/ws", headers=bearer("wrong")):
        pytest.fail("the handshake is accepted")


# Credentials of a socket


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "/ws", "headers": bearer(), "subprotocols": ["chat.v2"]},
        {"url": "/ws", "subprotocols": ["chat.v2", bearer_subprotocol(ANN)]},
        {"url": f"/ws?userid=ann&secret={ANN}", "subprotocols": ["chat.v2"]},
        {"url": f"/ws?secret={ANN}", "subprotocols": ["chat.v2"]},
    ],
    ids=["header", "subprotocol", "query with user", "query"],
)
def test_a_secret_opens_a_socket(client: TestClient, arguments: Json) -> None:
    with client.websocket_connect(**arguments) as socket:
        first = socket.receive_json()
        assert first["type"] == "parley.session.created"
        assert (first["session"]["user"], str(socket.accepted_subprotocol)) == ("ann", "chat.v2")


def test_a_secret_in_the_header_counts_before_the_query(client: TestClient) -> None:
    url = f"/ws?userid=bob&secret={BOB}"
    with client.websocket_connect(url, ["chat.v2"], headers=bearer()) as socket:  # ann is not bob
        assert socket.receive_json()["error"]["code"] == "invalid_credentials"
    with client.websocket_connect(f"/ws?secret={BOB}", ["chat.v2"], headers=bearer()) as socket:
        assert socket.receive_json()["session"]["user"] == "ann"


@pytest.mark.parametrize(
    "query",
    ["", "?secret=wrong", f"?userid=bob&secret={ANN}", "?userid=ann", "?secret=", "?userid=ann&secret=%ff"],
    ids=["none", "wrong secret", "other user", "no secret", "empty secret", "not UTF-8"],
)
def test_bad_credentials_close_the_socket_with_an_error(client: TestClient, query: str) -> None:
    with client.websocket_connect("/ws" + query) as socket:
        assert socket.receive_text() == "authentication failed"
        assert close_code(socket) == 1008
    with client.websocket_connect("/ws" + query, ["chat.v2"]) as socket:
        error = socket.receive_json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_credentials")
        assert close_code(socket) == 4401


@pytest.mark.parametrize(
    "protocol",
    ["bearer.%%%", "bearer.", "bearer._w", "bearer." + "A" * 5000],
    ids=["not base64", "empty", "not UTF-8", "long"],
)
def test_a_subprotocol_without_a_secret_is_refused(client: TestClient, protocol: str) -> None:
    with client.websocket_connect("/ws", ["chat.v2", protocol]) as socket:
        assert close_code(socket) == 4401


def test_a_cookie_opens_a_socket_only_from_an_allowed_origin(settings: Settings, scripted: ScriptedChat) -> None:
    settings = replace(settings, origins=("https://friend.example",))
    with start(create_app(settings, scripted.opened)) as running:
        client = running.client()
        log_in(client)
        for origin in ("http://testserver", "https://testserver", "https://friend.example"):
            with client.websocket_connect("/ws", ["chat.v2"], headers={"Origin": origin}) as socket:
                assert socket.receive_json()["session"]["user"] == "ann"
        others = ("https://evil.example", "null", "http://[", "ftp://testserver", "http://testserver.evil.example")
        for headers in (*({"Origin": origin} for origin in others), {}):
            with client.websocket_connect("/ws", ["chat.v2"], headers=dict(headers)) as socket:
                assert socket.receive_json()["error"]["code"] == "origin_not_allowed"
                assert close_code(socket) == 4403
            with client.websocket_connect("/ws", headers=dict(headers)) as socket:
                assert close_code(socket) == 1008


def test_a_cookie_with_the_id_of_another_user_is_refused(client: TestClient) -> None:
    log_in(client)
    with client.websocket_connect("/ws?userid=bob", ["chat.v2"], headers={"Origin": "http://testserver"}) as socket:
        assert close_code(socket) == 4401
    with client.websocket_connect("/ws?userid=ann", ["chat.v2"], headers={"Origin": "http://testserver"}) as socket:
        assert socket.receive_json()["session"]["user"] == "ann"


# Credentials of HTTP requests


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_change_by_cookie_needs_an_allowed_origin(client: TestClient, method: str) -> None:
    path = f"/v1/conversations/{converse(client, 'say one')}"
    for url in (path, f"{path}?userid=ann&secret={ANN}"):  # a secret in a URL is for WebSockets only
        response = client.request(method, url)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_credentials")
    log_in(client)
    response = client.request(method, path, headers={"Origin": "http://evil.example"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert client.request(method, path).status_code == (200 if method == "GET" else 403)  # a link has no origin
    response = client.request(method, path, headers={"Origin": "http://testserver"}, json={"title": "one"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [f"bearer {ANN}", f"BEARER   {ANN} "],
    ids=["lower case", "upper case and spaces"],
)
def test_the_scheme_of_the_header_is_read_loosely(client: TestClient, authorization: str) -> None:
    assert client.get("/v1/models", headers={"Authorization": authorization}).status_code == 200


@pytest.mark.parametrize("authorization", ["Bearer", "Bearer ", "Basic YW5uOmFubg==", ANN, "Bearer wrong"])
def test_another_authorization_header_is_refused(client: TestClient, authorization: str) -> None:
    assert client.get("/v1/models", headers={"Authorization": authorization}).status_code == 401


def test_a_secret_that_is_not_ascii_works_in_the_header(own_app: RunningApp) -> None:
    own_app.call(own_app.app.state.users.create, "eve", "夏娃的秘密")
    headers = {"Authorization": "Bearer 夏娃的秘密".encode()}
    assert own_app.client().get("/v1/models", headers=headers).status_code == 200  # type: ignore[arg-type]


# Failed logins


def test_the_eleventh_failed_login_in_a_minute_blocks_the_address(shared_app: RunningApp) -> None:
    client = shared_app.client()
    assert [log_in(client, f"wrong {n}").status_code for n in range(10)] == [401] * 10
    assert log_in(client).status_code == 429
    response = client.get("/v1/models", headers=bearer())
    assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_failures")
    assert response.headers["retry-after"] == "60"
    assert log_in(shared_app.client()).status_code == 303  # from another address


def test_a_socket_from_a_blocked_address_closes_with_4429(client: TestClient) -> None:
    for _ in range(10):
        log_in(client, "wrong")
    with client.websocket_connect("/ws", headers=bearer()) as socket:
        assert "too many failed logins" in socket.receive_text()
        assert close_code(socket) == 4429
    with client.websocket_connect("/ws", ["chat.v2"], headers=bearer()) as socket:
        assert socket.receive_json()["error"]["code"] == "too_many_failures"
        assert close_code(socket) == 4429
