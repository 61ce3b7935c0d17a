"""What a stolen or forged session cookie or secret is good for, and for how long."""

from __future__ import annotations

import ast
import asyncio
import json
import string
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from models.settings import Settings
from models.store.database import open_database
from models.users.users import Users
from models.web.cookies import SESSION as COOKIE
from server import create_app
from tests.support.client import (
    ANN,
    BOB,
    ask,
    bearer,
    bearer_subprotocol,
    chat_v2,
    close_code,
    events_until,
    events_until_done,
    log_in,
    text_of,
)
from tests.support.process import until
from tests.support.running_app import RunningApp, start
from tests.support.scripted import ScriptedChat

ROOT = Path(__file__).parents[2]

# Session cookies


def new_session(client: TestClient, secret: str = ANN) -> str:
    """The session cookie of a new login."""
    client.cookies.clear()
    log_in(client, secret)
    return str(client.cookies[COOKIE])


def is_session(client: TestClient, cookie: str) -> bool:
    """Whether a cookie opens the chat page."""
    client.cookies.clear()
    return 'id="composer"' in client.get("/", headers={"Cookie": f"{COOKIE}={cookie}"}).text


YEAR, TWO_WEEKS = 31536000, 1209600


@pytest.mark.parametrize(
    ("url", "prefix"), [("http://testserver", ""), ("https://testserver", "__host-")], ids=["http", "https"]
)
def test_cookies_are_hidden_from_scripts_and_other_sites_and_last_for_some_time(
    shared_app: RunningApp, url: str, prefix: str
) -> None:
    set_cookies = log_in(shared_app.client(url)).headers.get_list("set-cookie")
    expected = {"httponly", "samesite=strict", "path=/"} | ({"secure"} if prefix else set())
    attributes = {}
    for cookie in set_cookies:
        first, *rest = cookie.lower().split("; ")
        attributes[first.partition("=")[0]] = set(rest)
    assert attributes == {
        f"{prefix}parley_session": expected | {f"max-age={TWO_WEEKS}"},
        f"{prefix}parley_device": expected | {f"max-age={YEAR}"},
    }


def test_over_tls_only_the_cookie_that_no_other_host_can_set_is_read(shared_app: RunningApp) -> None:
    client = shared_app.client("https://testserver")
    log_in(client)
    cookie = client.cookies[f"__Host-{COOKIE}"]
    client.cookies.clear()
    for name, is_read in ((COOKIE, False), (f"__Host-{COOKIE}", True)):
        page = client.get("/", headers={"Cookie": f"{name}={cookie}"}).text
        assert ('id="composer"' in page) == is_read
    page = shared_app.client().get("/", headers={"Cookie": f"__Host-{COOKIE}={cookie}"}).text
    assert 'id="composer"' not in page


def test_no_cookie_is_unquoted(client: TestClient) -> None:
    cookie = new_session(client)
    assert is_session(client, cookie)
    assert is_session(client, f" {cookie} ; other=1")
    assert not is_session(client, f'"{cookie}"')  # which the standard library would unquote, in seconds if it is long
    assert not is_session(client, '"' + 30_000 * '\\"' + '"')


def test_no_module_reads_cookies_by_the_standard_library() -> None:
    for path in [ROOT / "server.py", *(ROOT / "models").rglob("*.py")]:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert "cookies" not in names, path


# Logout


def test_a_logout_ends_its_session_and_no_other(client: TestClient) -> None:
    first, second = new_session(client), new_session(client)
    assert client.post("/logout", headers={"Cookie": f"{COOKIE}={first}"}).status_code == 200
    assert not is_session(client, first)
    assert is_session(client, second)
    headers = {"Cookie": f"{COOKIE}={first}", "Origin": "http://testserver"}
    assert client.get("/v1/models", headers=headers).status_code == 401


def by_cookie(client: TestClient, cookie: str) -> Any:
    headers = {"Cookie": f"{COOKIE}={cookie}", "Origin": "http://testserver"}
    return client.websocket_connect("/ws", ["chat.v2"], headers=headers)


def test_a_logout_closes_the_sockets_of_its_session(client: TestClient) -> None:
    first, second = new_session(client), new_session(client)
    client.cookies.clear()
    with by_cookie(client, first) as one, by_cookie(client, first) as two, by_cookie(client, second) as other:
        with chat_v2(client) as by_secret:
            client.post("/logout", headers={"Cookie": f"{COOKIE}={first}"})
            assert [close_code(socket) for socket in (one, two)] == [4401] * 2
            for socket in (other, by_secret):
                ask(socket, "say still here")
                assert text_of(events_until_done(socket)[-1]["response"]) == "still here"
    with by_cookie(client, first) as again:
        assert close_code(again) == 4401


def test_a_logout_in_another_process_ends_the_session_here(client: TestClient, shared_settings: Settings) -> None:
    cookie = new_session(client)
    client.cookies.clear()

    async def log_out(users: Users) -> None:
        await users.all()
        found = users.session(cookie)
        assert found
        await users.end_session(found[1])

    with by_cookie(client, cookie) as socket:
        in_another_process(shared_settings, log_out)
        assert close_code(socket) == 4401
    assert not is_session(client, cookie)


def test_an_ended_session_stays_ended_after_a_restart(settings: Settings) -> None:
    with start(create_app(settings, ScriptedChat().opened)) as running:
        client = running.client()
        cookie, other = new_session(client), new_session(client)
        client.post("/logout", headers={"Cookie": f"{COOKIE}={cookie}"})
    with start(create_app(settings, ScriptedChat().opened)) as running:
        assert not is_session(running.client(), cookie)
        assert is_session(running.client(), other)


def test_a_logout_of_another_site_is_refused(client: TestClient) -> None:
    cookie = new_session(client)
    response = client.post("/logout", headers={"Cookie": f"{COOKIE}={cookie}", "Origin": "http://evil.example"})
    assert (response.status_code, "set-cookie" in response.headers) == (403, False)
    assert "PARLEY_ORIGINS" in response.text
    assert is_session(client, cookie)
    assert client.post("/logout", headers={"Origin": "http://testserver"}).status_code == 200


# Lockouts


def fail_logins(client: TestClient) -> None:
    """Block the address of a client."""
    for _ in range(10):
        log_in(client, "wrong")
    assert log_in(shared_address(client), ANN).status_code == 429


def shared_address(client: TestClient) -> TestClient:
    """Another browser behind the address of a client."""
    other = TestClient(client.app, client=client._transport.client)  # type: ignore[attr-defined]
    other.portal = client.portal
    return other


def test_a_guesser_locks_out_nobody_who_has_logged_in_before(client: TestClient) -> None:
    logged_in, logged_out = shared_address(client), shared_address(client)
    for browser in (logged_in, logged_out):
        log_in(browser)
    logged_out.post("/logout")
    fail_logins(client)
    assert 'id="composer"' in logged_in.get("/").text
    assert logged_in.get("/v1/models").status_code == 200
    assert log_in(logged_out, BOB).status_code == 401
    assert log_in(logged_out).status_code == 303


def test_a_guesser_locks_out_nobody_who_names_a_user(client: TestClient) -> None:
    fail_logins(client)
    assert client.get("/v1/models", headers=bearer()).status_code == 429
    assert client.get("/v1/models?userid=ann", headers=bearer()).status_code == 200
    with client.websocket_connect(f"/ws?userid=ann&secret={ANN}", ["chat.v2"]) as socket:
        assert socket.receive_json()["type"] == "parley.session.created"


EVIL = {"Origin": "http://evil.example"}


def test_a_page_of_another_site_cannot_lock_out_its_visitors(client: TestClient) -> None:
    for secret in ("wrong", ANN):
        for _ in range(6):
            with client.websocket_connect(f"/ws?secret={secret}", ["chat.v2"], headers=EVIL) as socket:
                assert socket.receive_json()["error"]["code"] == "origin_not_allowed"
                assert close_code(socket) == 4403
            assert client.get("/v1/models", headers=bearer(secret) | EVIL).status_code == 403
            protocols = ["chat.v2", bearer_subprotocol(secret)]
            with client.websocket_connect("/ws", protocols, headers=EVIL) as socket:
                assert close_code(socket) == 4403
    assert log_in(client).status_code == 303


def test_guesses_from_a_blocked_address_are_not_logged(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    fail_logins(client)
    assert caplog.text.count("login failed") == 10
    assert caplog.text.count("logins blocked") == 1
    caplog.clear()
    for _ in range(20):
        assert client.get("/v1/models", headers=bearer("wrong")).status_code == 429
    assert [line for line in caplog.messages if "login" in line] == []


# Forged cookies


@pytest.mark.parametrize(
    "cookie", ["nonsense", "WyJhbm4iLCJ4Il0.aaaaaa.bbbbbbbbbbbbbbbbbbbbbbbbbbb", ""], ids=["text", "signed", "empty"]
)
def test_a_forged_cookie_is_no_session(client: TestClient, cookie: str) -> None:
    client.cookies.set(COOKIE, cookie)
    assert 'name="secret"' in client.get("/").text


def test_each_login_gets_another_cookie_without_the_secret(client: TestClient) -> None:
    cookies = [new_session(client) for _ in range(5)]
    assert len({*cookies}) == 5
    assert all(is_session(client, cookie) for cookie in cookies)
    assert not any(ANN in cookie for cookie in cookies)


ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"


def test_a_cookie_with_one_changed_character_is_no_session(client: TestClient) -> None:
    cookie = new_session(client)
    assert is_session(client, cookie)
    for place, character in enumerate(cookie):
        # From the other half of the alphabet, since the last bits of a last character mean nothing.
        other = ALPHABET[ALPHABET.index(character) ^ 32] if character in ALPHABET else "x"
        assert not is_session(client, cookie[:place] + other + cookie[place + 1 :]), f"{character} at {place}"


def test_a_cookie_of_another_server_is_no_session(client: TestClient, settings: Settings, tmp_path: Path) -> None:
    other = create_app(replace(settings, data=tmp_path / "other"), ScriptedChat().opened)
    with start(other) as running:
        cookie = new_session(running.client())
        assert is_session(running.client(), cookie)
    assert not is_session(client, cookie)


def test_a_session_ends_when_its_user_is_removed(shared_app: RunningApp) -> None:
    users, client = shared_app.app.state.users, shared_app.client()
    log_in(client, shared_app.call(users.create, "carol"))
    assert 'id="composer"' in client.get("/").text
    shared_app.call(users.remove, "carol")
    until(lambda: 'name="secret"' in client.get("/").text, "the session has ended")


# Users who are added or removed by another process, such as `python server.py users remove`


def in_another_process(settings: Settings, act: Callable[[Users], Awaitable[Any]]) -> Any:
    """The result of an action on the users in the database, of which the app learns nothing."""

    async def run() -> Any:
        async with open_database(settings) as database:
            return await act(Users.open(settings, database))

    return asyncio.run(run())


@pytest.fixture
def eve(shared_settings: Settings) -> tuple[str, str]:
    """The id and the secret of a new user."""
    user = f"eve-{uuid.uuid4().hex}"
    return user, in_another_process(shared_settings, lambda users: users.create(user))


def test_a_new_user_can_log_in_at_once(client: TestClient, eve: tuple[str, str]) -> None:
    user, secret = eve
    assert client.get("/v1/models", headers=bearer(secret)).status_code == 200
    with client.websocket_connect("/ws", ["chat.v2"], headers=bearer(secret)) as socket:
        assert socket.receive_json()["session"]["user"] == user
    assert is_session(client, new_session(client, secret))


def test_a_removed_user_loses_all_access_and_others_stay(
    client: TestClient, shared_settings: Settings, eve: tuple[str, str]
) -> None:
    user, secret = eve
    cookie = {"Cookie": f"{COOKIE}={new_session(client, secret)}", "Origin": "http://testserver"}
    client.cookies.clear()
    with (
        chat_v2(client, BOB) as bob,
        client.websocket_connect("/ws", headers=bearer(BOB)) as bob_plain,
        chat_v2(client, secret) as streaming,
        chat_v2(client, secret) as idle,
        client.websocket_connect("/ws", headers=bearer(secret)) as plain,
        client.websocket_connect("/ws", ["chat.v2"], headers=dict(cookie)) as by_cookie,
    ):
        assert by_cookie.receive_json()["session"]["user"] == user
        ask(streaming, "wait for it")
        events_until(streaming, "response.output_text.delta")
        in_another_process(shared_settings, lambda users: users.remove(user))
        assert [close_code(socket) for socket in (streaming, idle, plain, by_cookie)] == [4401] * 4
        for headers in (bearer(secret), cookie):
            for method, path in (("GET", "/v1/models"), ("GET", "/v1/conversations"), ("POST", "/v1/responses")):
                response = client.request(method, path, headers=dict(headers))
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_credentials")
        assert not is_session(client, cookie["Cookie"].partition("=")[2])
        with client.websocket_connect("/ws", ["chat.v2"], headers=bearer(secret)) as again:
            assert close_code(again) == 4401
        ask(bob, "say still here")
        assert text_of(events_until_done(bob)[-1]["response"]) == "still here"
        bob_plain.send_text("say here too")
        text = ""
        while not text.endswith("here too"):
            text += bob_plain.receive_text()
        assert client.get("/v1/models", headers=bearer(BOB)).status_code == 200


def test_a_user_who_is_removed_while_the_body_arrives_gets_no_completion(own_app: RunningApp) -> None:
    secret = own_app.call(own_app.app.state.users.create, "eve")
    messages: list[Any] = []

    async def receive() -> Any:
        await own_app.app.state.users.remove("eve")
        body = {"model": "scripted", "messages": [{"role": "user", "content": "say it"}]}
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: Any) -> None:
        messages.append(message)

    headers = [(name.lower().encode(), value.encode()) for name, value in bearer(secret).items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
    own_app.call(asyncio.wait_for, own_app.app(scope, receive, send), 10)
    assert messages[0]["status"] == 401


def test_the_old_secret_of_a_user_ends_its_connections(
    client: TestClient, shared_settings: Settings, eve: tuple[str, str]
) -> None:
    user, old = eve
    with chat_v2(client, old) as socket:
        in_another_process(shared_settings, lambda users: users.remove(user))
        new = in_another_process(shared_settings, lambda users: users.create(user))
        assert close_code(socket) == 4401
    assert client.get("/v1/models", headers=bearer(old)).status_code == 401
    with client.websocket_connect("/ws", ["chat.v2"], headers=bearer(new)) as socket:
        assert socket.receive_json()["session"]["user"] == user
