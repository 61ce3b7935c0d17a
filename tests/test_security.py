"""What every answer says to browsers, by which names we are called, how much we read, and who is let go."""

from __future__ import annotations

import asyncio
import re
import socket
import string
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient, WebSocketDenialResponse

from models import database
from models.settings import Settings
from models.users import Users
from server import COOKIE, FRAME_BYTES, create_app, routes
from tests.conftest import ANN, BOB
from tests.scripted import ScriptedChat
from tests.serving import Served
from tests.test_server import Json, bearer, closed_with, converse, log_in, until_done

CSP = {"default-src 'self'", "base-uri 'none'", "form-action 'self'", "frame-ancestors 'none'"}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"]
STATIC = Path(__file__).parent.parent / "templates" / "static"


@pytest.fixture
def app(settings: Settings, scripted: ScriptedChat) -> Starlette:
    """An app whose model says what the test wants."""
    return create_app(settings, scripted.opened)


@pytest.fixture
def client(app: Starlette) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def assert_careful(answer: httpx2.Response, cache: str = "no-store") -> None:
    """That browsers are told to be careful with an answer."""
    told = answer.headers
    policy = told["content-security-policy"].split(";")
    assert {directive.strip() for directive in policy} == CSP
    assert len(policy) == len(CSP)
    assert told["x-content-type-options"] == "nosniff"
    assert told["referrer-policy"] == "same-origin"
    assert told["cross-origin-opener-policy"] == "same-origin"
    assert told["cross-origin-resource-policy"] == "same-origin"
    assert told["cache-control"] == cache
    for name in ("content-security-policy", "cache-control", "referrer-policy", "x-content-type-options"):
        assert len(told.get_list(name)) == 1
    assert "access-control-allow-origin" not in told


# Headers


@pytest.mark.parametrize("route", [route for route in routes if isinstance(route, Route)], ids=lambda route: route.path)
def test_every_answer_of_every_route_is_not_stored_and_tells_browsers_to_be_careful(
    client: TestClient, route: Route
) -> None:
    statuses = set()
    for method in METHODS:
        for headers in ({}, bearer(), bearer("wrong")):
            id = converse(client, "say one") if "conversations/" in route.path else "scripted"
            path = re.sub("{id.*?}", id, route.path)
            form = {"secret": ANN} if path == "/login" else None
            answer = client.request(method, path, data=form, headers=headers, follow_redirects=False)
            assert_careful(answer)
            statuses.add(answer.status_code)
    assert statuses <= {200, 204, 303, 400, 401, 405, 429}
    assert statuses & {200, 303, 400}, "somebody gets further than the credentials"
    assert 405 in statuses


@pytest.mark.parametrize("stream", [False, True])
def test_completions_are_not_stored_whether_they_stream_or_not(client: TestClient, stream: bool) -> None:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "say one"}], "stream": stream}
    answer = client.post("/v1/chat/completions", json=body, headers=bearer())
    assert answer.status_code == 200
    assert_careful(answer)


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/v1", "//", "/static/nothing.js", "/static/../server.py"])
def test_what_is_not_there_is_told_with_the_same_care(client: TestClient, path: str) -> None:
    answer = client.get(path, headers=bearer())
    assert answer.status_code == (200 if path == "//" else 404)
    assert_careful(answer)


def test_a_bug_is_told_with_the_same_care(app: Starlette, client: TestClient) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a bug")

    app.state.metrics = SimpleNamespace(text=fail)
    app.state.conversations = SimpleNamespace(latest=fail)
    for path in ("/metrics", "/v1/conversations"):
        answer = client.get(path, headers=bearer())
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "server_error")
        assert "a bug" not in answer.text
        assert_careful(answer)


@pytest.mark.parametrize("error", [OSError("no route to host"), OperationalError("SELECT", {}, OSError("away"))])
def test_a_database_that_is_away_is_told_with_the_same_care(
    app: Starlette, client: TestClient, error: Exception
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    app.state.conversations = SimpleNamespace(latest=fail)
    answer = client.get("/v1/conversations", headers=bearer())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert_careful(answer)


def test_a_body_that_is_too_large_and_too_many_failures_are_told_with_the_same_care(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", content=b" " * (FRAME_BYTES + 1), headers=bearer())
    assert answer.status_code == 413
    assert_careful(answer)
    for _ in range(11):
        answer = client.get("/v1/models", headers=bearer("wrong"))
        assert_careful(answer)
    assert answer.status_code == 429


@pytest.mark.parametrize("file", sorted(file.name for file in STATIC.iterdir() if file.is_file()))
def test_static_files_are_asked_after_each_time(client: TestClient, file: str) -> None:
    answer = client.get(f"/static/{file}")
    assert (answer.status_code, answer.content) == (200, (STATIC / file).read_bytes())
    assert_careful(answer, "no-cache")
    again = client.get(f"/static/{file}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert_careful(again, "no-cache")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_static_files_are_only_read(client: TestClient, method: str) -> None:
    answer = client.request(method, "/static/chat.js")
    assert answer.status_code == 405
    assert_careful(answer)


# Hosts


@pytest.fixture
def hosts_client(settings: Settings, scripted: ScriptedChat) -> Iterator[TestClient]:
    """Of an app that is called by four names."""
    hosts = ("chat.example.com", "*.example.org", "127.0.0.1", "[::1]")
    with TestClient(create_app(replace(settings, hosts=hosts), scripted.opened)) as client:
        yield client


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
def test_whoever_calls_us_by_a_name_that_is_ours_is_answered(hosts_client: TestClient, host: str) -> None:
    assert hosts_client.get("/health", headers={"Host": host}).status_code == 200
    headers = {"Host": host, **bearer()}
    with hosts_client.websocket_connect("/ws", ["chat.v1"], headers=headers) as socket:
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
def test_any_other_name_is_refused_wherever_it_asks(hosts_client: TestClient, host: str) -> None:
    for path in ("/", "/v1/models", "/static/chat.js", "/nothing"):
        answer = hosts_client.get(path, headers={"Host": host, **bearer()}, follow_redirects=False)
        assert (answer.status_code, answer.text) == (400, "Invalid host header")
        assert_careful(answer)


@pytest.mark.parametrize("host", ["evil.example", "example.org"])
def test_a_socket_by_any_other_name_is_refused_before_it_is_open(hosts_client: TestClient, host: str) -> None:
    with (
        pytest.raises(WebSocketDenialResponse) as raised,
        hosts_client.websocket_connect("/ws", ["chat.v1"], headers={"Host": host, **bearer()}),
    ):
        pass
    assert raised.value.status_code == 400


@pytest.mark.parametrize("host", ["evil.example", "[::2]:1", "chat.example.com"])
def test_without_the_setting_any_name_is_ours(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == 200


# Bodies


class Body:
    """What a client sends, a chunk whenever the server wants one, for as long as it wants."""

    def __init__(self, chunk: bytes, chunks: int = 1000) -> None:
        self.chunk = chunk
        self.left = chunks
        self.read = 0

    async def receive(self) -> Json:
        if not self.left:
            return {"type": "http.disconnect"}
        self.left -= 1
        self.read += len(self.chunk)
        return {"type": "http.request", "body": self.chunk, "more_body": bool(self.left)}


def send_body(
    client: TestClient, method: str, path: str, body: Body, *headers: tuple[bytes, bytes], secret: str = ANN
) -> int:
    """The status of the answer to a body, with no more of it read than the server asks for."""
    messages: list[Any] = []
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"testserver"), (b"authorization", f"Bearer {secret}".encode()), *headers],
        "client": ("10.0.0.1", 5),
    }

    async def send(message: Any) -> None:
        messages.append(message)

    assert client.portal
    client.portal.call(client.app, scope, body.receive, send)
    return int(messages[0]["status"])


WRITABLE = [
    (method, route.path)
    for route in routes
    for method in ("POST", "PATCH", "PUT")
    if isinstance(route, Route) and route.path.startswith("/v1/")
    if method in (route.methods or ()) or hasattr(route.endpoint, method.lower())
]


def test_these_are_the_routes_that_take_a_body() -> None:
    assert WRITABLE == [("POST", "/v1/chat/completions"), ("PATCH", "/v1/conversations/{id}")]


@pytest.mark.parametrize(("method", "path"), WRITABLE)
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_a_mebibyte_is_refused_in_the_apis_words(
    client: TestClient, method: str, path: str, declared: bool
) -> None:
    def chunks() -> Iterator[bytes]:
        yield b" " * FRAME_BYTES
        yield b"{"

    content = b" " * FRAME_BYTES + b"{" if declared else chunks()
    answer = client.request(method, path, content=content, headers=bearer())
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"] == {
        "message": f"the body may have {FRAME_BYTES} bytes",
        "type": "invalid_request_error",
        "param": None,
        "code": "body_too_large",
    }


@pytest.mark.parametrize(("method", "path"), WRITABLE)
def test_a_body_of_a_mebibyte_is_read(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, path, content=b" " * FRAME_BYTES, headers=bearer())
    assert answer.status_code == 400


@pytest.mark.parametrize(("method", "path"), WRITABLE)
def test_a_body_without_an_end_is_read_as_far_as_may_be_and_no_further(
    client: TestClient, method: str, path: str
) -> None:
    body = Body(b" " * 2**16)
    assert send_body(client, method, path, body) == 413
    assert body.read == FRAME_BYTES + 2**16


@pytest.mark.parametrize(("method", "path"), WRITABLE)
def test_a_body_that_says_it_is_too_large_is_not_read_at_all(client: TestClient, method: str, path: str) -> None:
    body = Body(b" " * 2**16)
    length = (b"content-length", str(1000 * 2**16).encode())
    assert send_body(client, method, path, body, length) == 413
    assert body.read == 0


@pytest.mark.parametrize(("method", "path"), WRITABLE)
def test_nothing_is_read_of_what_a_stranger_sends(client: TestClient, method: str, path: str) -> None:
    body = Body(b" " * 2**16)
    assert send_body(client, method, path, body, secret="wrong") == 401
    assert body.read == 0


FORM = (b"content-type", b"application/x-www-form-urlencoded")
MULTIPART = (b"content-type", b"multipart/form-data; boundary=x")


@pytest.mark.parametrize(
    ("type", "beginning", "chunk"),
    [
        (FORM, b"secret=", b"x" * 2**16),
        (FORM, b"", b"a=1&" * 2**14),
        (FORM, b"", b"&" * 2**16),
        (MULTIPART, b'--x\r\nContent-Disposition: form-data; name="secret"\r\n\r\n', b"x" * 2**16),
        (MULTIPART, b'--x\r\nContent-Disposition: form-data; name="secret"\r\n', b"X: y\r\n" * 2**13),
        (MULTIPART, b"--x--\r\n", b"x" * 2**16),
    ],
    ids=["a large field", "many fields", "nothing, much of it", "a large part", "many headers", "much behind the end"],
)
def test_a_login_form_that_is_too_large_is_refused_and_not_read_on(
    client: TestClient, type: tuple[bytes, bytes], beginning: bytes, chunk: bytes
) -> None:
    body = Body(beginning + chunk)
    assert send_body(client, "POST", "/login", body, type) in (400, 413)
    assert body.read <= 2 * FRAME_BYTES


def test_a_header_block_over_the_limit_is_refused_and_harms_nobody_else(scripted_server: Served) -> None:
    with socket.create_connection(("127.0.0.1", scripted_server.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2**17)  # and no end
        assert connection.makefile("rb").readline() == b"HTTP/1.1 400 Bad Request\r\n"
    assert httpx2.get(f"{scripted_server.url}/health").status_code == 200


# Cookies


def session_of(client: TestClient, secret: str = ANN) -> str:
    client.cookies.clear()
    log_in(client, secret)
    return str(client.cookies[COOKIE])


def is_session(client: TestClient, cookie: str) -> bool:
    client.cookies.clear()
    return 'id="composer"' in client.get("/", headers={"Cookie": f"{COOKIE}={cookie}"}).text


@pytest.mark.parametrize(("url", "secure"), [("http://testserver", False), ("https://testserver", True)])
def test_the_cookie_is_for_our_pages_and_no_script_and_lasts_two_weeks(app: Starlette, url: str, secure: bool) -> None:
    with TestClient(app, url) as client:
        _, *attributes = log_in(client).headers["set-cookie"].lower().split("; ")
    assert {*attributes} == {"httponly", "samesite=strict", "path=/", "max-age=1209600"} | (
        {"secure"} if secure else set()
    )


def test_the_cookie_holds_no_secret_and_is_another_at_each_login(client: TestClient) -> None:
    cookies = [session_of(client) for _ in range(5)]
    assert len({*cookies}) == 5
    assert all(is_session(client, cookie) for cookie in cookies)
    assert not any(ANN in cookie for cookie in cookies)


ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"


def test_a_cookie_of_which_a_character_changed_is_no_session(client: TestClient) -> None:
    cookie = session_of(client)
    assert is_session(client, cookie)
    for place, character in enumerate(cookie):
        # The other half of the alphabet, since the last bits of a last character mean nothing.
        other = ALPHABET[ALPHABET.index(character) ^ 32] if character in ALPHABET else "x"
        assert not is_session(client, cookie[:place] + other + cookie[place + 1 :]), f"{character} at {place}"


def test_the_cookie_of_another_server_is_no_session(client: TestClient, settings: Settings, tmp_path: Path) -> None:
    other = create_app(replace(settings, data=tmp_path / "other"), ScriptedChat().opened)
    with TestClient(other) as stranger:
        cookie = session_of(stranger)
        assert is_session(stranger, cookie)
    assert not is_session(client, cookie)


def test_a_logout_takes_the_cookie_away(client: TestClient) -> None:
    log_in(client)
    assert COOKIE in client.cookies
    answer = client.post("/logout", follow_redirects=False)
    assert answer.status_code == 303
    assert COOKIE not in client.cookies


# Revocation


def by_another(settings: Settings, act: Callable[[Users], Awaitable[Any]]) -> Any:
    """What comes of an act of another process, such as `python server.py users remove`."""

    async def run() -> Any:
        async with database.opened(settings) as opened:
            return await act(Users.of(settings, opened))

    return asyncio.run(run())


def test_a_user_who_is_added_can_log_in_at_once(client: TestClient, settings: Settings) -> None:
    secret = by_another(settings, lambda users: users.add("eve"))
    assert client.get("/v1/models", headers=bearer(secret)).status_code == 200
    with client.websocket_connect("/ws", ["chat.v1"], headers=bearer(secret)) as socket:
        assert socket.receive_json()["session"]["user"] == "eve"
    assert is_session(client, session_of(client, secret))


def test_a_user_who_is_removed_is_out_everywhere_and_the_others_stay(
    client: TestClient, settings: Settings, scripted: ScriptedChat
) -> None:
    secret = by_another(settings, lambda users: users.add("eve"))
    cookie = session_of(client, secret)
    client.cookies.clear()
    with (
        client.websocket_connect("/ws", ["chat.v1"], headers=bearer(BOB)) as bob,
        client.websocket_connect("/ws", headers=bearer(BOB)) as bob_plain,
        client.websocket_connect("/ws", ["chat.v1"], headers=bearer(secret)) as streaming,
        client.websocket_connect("/ws", ["chat.v1"], headers=bearer(secret)) as idle,
        client.websocket_connect("/ws", headers=bearer(secret)) as plain,
        client.websocket_connect(
            "/ws", ["chat.v1"], headers={"Cookie": f"{COOKIE}={cookie}", "Origin": "http://testserver"}
        ) as by_cookie,
    ):
        for socket in (bob, streaming, idle, by_cookie):
            assert socket.receive_json()["type"] == "session.created"
        streaming.send_json({"type": "response.create", "response": {"input": "wait for it"}})
        while streaming.receive_json()["type"] != "response.output_text.delta":
            pass
        by_another(settings, lambda users: users.remove("eve"))
        assert [closed_with(socket) for socket in (streaming, idle, plain, by_cookie)] == [4401] * 4
        for headers in (bearer(secret), {"Cookie": f"{COOKIE}={cookie}", "Origin": "http://testserver"}):
            for method, path in (("GET", "/v1/models"), ("GET", "/v1/conversations"), ("POST", "/v1/chat/completions")):
                answer = client.request(method, path, headers=dict(headers))
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_credentials")
        assert not is_session(client, cookie)
        with client.websocket_connect("/ws", ["chat.v1"], headers=bearer(secret)) as again:
            assert closed_with(again) == 4401
        bob.send_json({"type": "response.create", "response": {"input": "say still here"}})
        assert until_done(bob)[-1]["response"]["output_text"] == "still here"
        bob_plain.send_text("say here too")
        heard = ""
        while not heard.endswith("here too"):
            heard += bob_plain.receive_text()
        assert client.get("/v1/models", headers=bearer(BOB)).status_code == 200


def test_a_user_with_a_new_secret_is_out_until_it_is_used(client: TestClient, settings: Settings) -> None:
    old = by_another(settings, lambda users: users.add("eve"))
    with client.websocket_connect("/ws", ["chat.v1"], headers=bearer(old)) as socket:
        socket.receive_json()
        by_another(settings, lambda users: users.remove("eve"))
        new = by_another(settings, lambda users: users.add("eve"))
        assert closed_with(socket) == 4401
    assert client.get("/v1/models", headers=bearer(old)).status_code == 401
    with client.websocket_connect("/ws", ["chat.v1"], headers=bearer(new)) as socket:
        assert socket.receive_json()["session"]["user"] == "eve"
