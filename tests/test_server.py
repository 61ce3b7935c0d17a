from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from models.session import BAD_FRAMES
from models.settings import Settings
from server import COOKIE, FRAME_BYTES, create_app
from tests.conftest import ANN, BOB
from tests.scripted import ScriptedChat

Json = dict[str, Any]


def bearer(secret: str = ANN) -> dict[str, str]:
    """New each time: the test client writes into what it is given."""
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def scripted_client(settings: Settings, scripted: ScriptedChat) -> Iterator[TestClient]:
    with TestClient(create_app(settings, scripted.opened)) as client:
        yield client


def log_in(client: TestClient, secret: str = ANN) -> Any:
    return client.post("/login", data={"secret": secret}, follow_redirects=False)


def until_done(socket: Any) -> list[Json]:
    events: list[Json] = [socket.receive_json()]
    while events[-1]["type"] != "response.done":
        events.append(socket.receive_json())
    return events


def closed_with(socket: Any) -> int:
    """The code of the close, after whatever comes before it."""
    try:
        while True:
            socket.receive_text()
    except WebSocketDisconnect as disconnect:
        return disconnect.code


# HTTP


def test_the_page_asks_for_a_login_and_shows_the_chat_after_one(client: TestClient) -> None:
    assert 'name="secret"' in client.get("/").text
    answer = log_in(client)
    assert (answer.status_code, answer.headers["location"]) == (303, "./")
    page = client.get("/")
    assert 'id="composer"' in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'self'; ")
    client.post("/logout")
    assert 'name="secret"' in client.get("/").text


def test_the_cookie_is_for_this_site_and_no_script_and_secure_under_https(app: Starlette) -> None:
    with TestClient(app) as client:
        cookie = log_in(client).headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "secure" not in cookie
    with TestClient(app, "https://testserver") as client:
        assert "secure" in log_in(client).headers["set-cookie"].lower()


def test_a_wrong_secret_is_refused_and_the_eleventh_in_a_minute_whatever_it_is(client: TestClient) -> None:
    assert [log_in(client, f"wrong {n}").status_code for n in range(10)] == [401] * 10
    assert log_in(client).status_code == 429


@pytest.mark.parametrize("origin", ["http://evil.example", "http://[", "null"])
def test_a_login_from_another_site_is_refused(client: TestClient, origin: str) -> None:
    answer = client.post("/login", data={"secret": ANN}, headers={"Origin": origin})
    assert (answer.status_code, COOKIE in client.cookies) == (403, False)


def test_a_login_form_with_files_is_refused(client: TestClient) -> None:
    assert client.post("/login", files={"secret": b"x" * 10_000}).status_code == 400
    assert client.post("/login", files={"secret": b"x" * 100_000}).status_code == 413


@pytest.mark.parametrize("cookie", ["nonsense", "WyJhbm4iLCJ4Il0.aaaaaa.bbbbbbbbbbbbbbbbbbbbbbbbbbb", ""])
def test_a_forged_cookie_is_no_session(client: TestClient, cookie: str) -> None:
    client.cookies.set(COOKIE, cookie)
    assert 'name="secret"' in client.get("/").text


def test_health_ready_and_args_tell_how_it_is_without_secrets(client: TestClient) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200
    answer = client.get("/args")
    assert answer.json()["args"]["context"] == 256
    assert answer.json()["args"]["device"] == "cpu"
    assert ANN not in answer.text


def test_ready_says_why_not(scripted_client: TestClient, scripted: ScriptedChat) -> None:
    scripted.trouble = "the engine stopped"
    answer = scripted_client.get("/ready")
    assert (answer.status_code, answer.text) == (503, "the engine stopped")


# Credentials of a socket


def encoded(secret: str) -> str:
    return "bearer." + base64.urlsafe_b64encode(secret.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "/ws", "headers": bearer(), "subprotocols": ["chat.v1"]},
        {"url": "/ws", "subprotocols": ["chat.v1", encoded(ANN)]},
        {"url": f"/ws?userid=ann&secret={ANN}", "subprotocols": ["chat.v1"]},
        {"url": f"/ws?secret={ANN}", "subprotocols": ["chat.v1"]},
        {
            "url": "/ws?userid=bob&secret=wrong",
            "headers": bearer() | {"X": "the header wins"},
            "subprotocols": ["chat.v1"],
        },
    ],
)
def test_each_way_to_pass_credentials(scripted_client: TestClient, arguments: Json) -> None:
    wins = "X" in arguments.get("headers", {})
    with scripted_client.websocket_connect(**arguments) as socket:
        first = socket.receive_json()
        assert first["type"] == ("error" if wins else "session.created")
        if not wins:
            assert (first["session"]["user"], socket.accepted_subprotocol) == ("ann", "chat.v1")


def test_the_cookie_is_good_from_our_own_page_and_allowed_origins_only(
    settings: Settings, scripted: ScriptedChat
) -> None:
    settings = replace(settings, origins=("https://friend.example",))
    with TestClient(create_app(settings, scripted.opened)) as client:
        log_in(client)
        for origin in ("http://testserver", "https://friend.example"):
            with client.websocket_connect("/ws", ["chat.v1"], headers={"Origin": origin}) as socket:
                assert socket.receive_json()["session"]["user"] == "ann"
        strange = ("https://evil.example", "null", "http://[", "ftp://testserver", "http://testserver.evil.example")
        for headers in (*({"Origin": origin} for origin in strange), {}):
            with client.websocket_connect("/ws", ["chat.v1"], headers=headers) as socket:
                assert socket.receive_json()["error"]["code"] == "origin_not_allowed"
                assert closed_with(socket) == 4403


@pytest.mark.parametrize(
    "query", ["", "?secret=wrong", f"?userid=bob&secret={ANN}", "?userid=ann", "?secret=", "?userid=ann&secret=%ff"]
)
def test_bad_credentials_are_told_and_closed_in_both_protocols(scripted_client: TestClient, query: str) -> None:
    with scripted_client.websocket_connect("/ws" + query) as socket:
        assert socket.receive_text() == "authentication failed"
        assert closed_with(socket) == 1008
    with scripted_client.websocket_connect("/ws" + query, ["chat.v1"]) as socket:
        error = socket.receive_json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_credentials")
        assert closed_with(socket) == 4401


@pytest.mark.parametrize("protocol", ["bearer.%%%", "bearer.", "bearer._w", "bearer." + "A" * 5000])
def test_a_subprotocol_that_holds_no_secret_is_refused(scripted_client: TestClient, protocol: str) -> None:
    with scripted_client.websocket_connect("/ws", ["chat.v1", protocol]) as socket:
        assert closed_with(socket) == 4401


def test_too_many_failed_logins_close_4429_and_too_many_sockets_do(settings: Settings, scripted: ScriptedChat) -> None:
    with TestClient(create_app(replace(settings, sockets_per_user=1), scripted.opened)) as client:
        with client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as first:
            first.receive_json()
            with client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as second:
                assert second.receive_json()["error"]["code"] == "too_many_sockets"
                assert closed_with(second) == 4429
        for _ in range(10):
            log_in(client, "wrong")
        with client.websocket_connect("/ws", headers=bearer()) as socket:
            assert "too many failed logins" in socket.receive_text()
            assert closed_with(socket) == 4429


# The protocols, over a real engine


def test_plain_text_in_pieces_of_the_reply_out(client: TestClient) -> None:
    with client.websocket_connect(f"/ws?userid=ann&secret={ANN}") as socket:
        assert socket.accepted_subprotocol is None
        socket.send_text("Hello")
        assert socket.receive_text()


def test_chat_v1_streams_a_reply(client: TestClient) -> None:
    with client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        session = socket.receive_json()["session"]
        assert (session["user"], session["context_length"]) == ("ann", 256)
        request = {"input": "Hello", "temperature": 0, "max_output_tokens": 12}
        socket.send_json({"type": "response.create", "event_id": "mine", "response": request})
        created, *deltas, done = until_done(socket)
        assert created["event_id"] == "mine"
        assert "".join(delta["delta"] for delta in deltas) == done["response"]["output_text"]
        assert done["response"]["usage"]["output_tokens"] <= 12


def test_a_frame_of_bytes_is_as_good_as_one_of_text(scripted_client: TestClient) -> None:
    with scripted_client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        socket.receive_json()
        socket.send_bytes(b'{"type": "response.create", "response": {"input": "say yes"}}')
        assert until_done(socket)[-1]["response"]["output_text"] == "yes"
        socket.send_bytes(b"\xff\xfe")
        assert socket.receive_json()["error"]["code"] == "invalid_json"


def test_a_cancel_is_seen_while_a_reply_streams(scripted_client: TestClient) -> None:
    with scripted_client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        socket.receive_json()
        socket.send_json({"type": "response.create", "response": {"input": "wait some"}})
        assert [socket.receive_json()["type"] for _ in range(2)] == ["response.created", "response.output_text.delta"]
        socket.send_json({"type": "response.cancel"})
        assert until_done(socket)[-1]["response"]["status"] == "cancelled"


def test_twenty_bad_frames_in_a_row_close_4400(scripted_client: TestClient) -> None:
    with scripted_client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        socket.receive_json()
        for _ in range(BAD_FRAMES):
            socket.send_text("nonsense")
        assert closed_with(socket) == 4400


def test_a_frame_over_the_limit_closes_1009_under_any_server(scripted_client: TestClient) -> None:
    for protocols in (["chat.v1"], []):
        with scripted_client.websocket_connect("/ws", protocols, headers=bearer()) as socket:
            socket.send_text("x" * (FRAME_BYTES + 1))
            assert closed_with(socket) == 1009


def test_a_ninth_waiting_plain_message_closes_1013(scripted_client: TestClient) -> None:
    with scripted_client.websocket_connect("/ws", headers=bearer()) as socket:
        socket.send_text("wait a")
        socket.receive_text()
        for _ in range(9):
            socket.send_text("say b")
        assert closed_with(socket) == 1013


def test_others_hear_who_joined_and_left_unless_presence_is_off(settings: Settings, scripted: ScriptedChat) -> None:
    with TestClient(create_app(settings, scripted.opened)) as client:
        with (
            client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as ann,
            client.websocket_connect("/ws", headers=bearer()) as plain,
        ):
            ann.receive_json()
            plain.send_text("say here")
            assert plain.receive_text() == "here"  # whoever is answered has joined
            with (
                client.websocket_connect("/ws", headers=bearer(BOB)),
                client.websocket_connect("/ws", headers=bearer(BOB)),
            ):
                assert ann.receive_json() == {"type": "presence.joined", "user": "bob"}
            assert ann.receive_json() == {"type": "presence.left", "user": "bob"}
            assert plain.receive_text() == "Client #bob left the chat"
    with TestClient(create_app(replace(settings, presence=False), scripted.opened)) as client:
        with client.websocket_connect("/ws", headers=bearer()) as ann:
            ann.send_text("say here")
            assert ann.receive_text() == "here"
            with client.websocket_connect("/ws", headers=bearer(BOB)) as bob:
                bob.send_text("say here")
                assert bob.receive_text() == "here"
            ann.send_text("say yes")
            assert ann.receive_text() == "yes"


def test_a_session_ends_with_its_user(settings: Settings, scripted: ScriptedChat) -> None:
    app = create_app(settings, scripted.opened)
    with TestClient(app) as client:
        assert client.portal is not None
        log_in(client, client.portal.call(app.state.users.add, "eve"))
        assert 'id="composer"' in client.get("/").text
        client.portal.call(app.state.users.remove, "eve")
        assert 'name="secret"' in client.get("/").text


# Conversations over HTTP


def converse(client: TestClient, *inputs: str, conversation: str = "new") -> str:
    """Have ann say this, wait for the replies, and return the conversation's id."""
    with client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        socket.receive_json()
        for said in inputs:
            request = {"input": said, "conversation": conversation}
            socket.send_json({"type": "response.create", "response": request})
            conversation = until_done(socket)[-1]["response"]["conversation"]
    return conversation


def test_conversations_are_listed_the_latest_first_in_pages(scripted_client: TestClient) -> None:
    made = [converse(scripted_client, f"say {number}") for number in range(5)]
    found: list[str] = []
    more = {"limit": "2"}
    while True:
        page = scripted_client.get("/v1/conversations", params=more, headers=bearer()).json()
        found += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        more["after"] = found[-1]
    assert found == made[::-1]
    assert page["data"][0].keys() == {"id", "title", "created", "updated"}


def test_conversations_are_found_by_what_was_said(scripted_client: TestClient) -> None:
    converse(scripted_client, "say one")
    wanted = converse(scripted_client, "say the needle is here", "say two")
    answer = scripted_client.get("/v1/conversations", params={"query": "NEEDLE"}, headers=bearer())
    assert [one["id"] for one in answer.json()["data"]] == [wanted]


def test_a_conversation_is_read_with_its_items(scripted_client: TestClient) -> None:
    id = converse(scripted_client, "say one", "say two")
    answer = scripted_client.get(f"/v1/conversations/{id}", headers=bearer())
    assert answer.headers["cache-control"] == "no-store"
    conversation = answer.json()
    assert (conversation["id"], conversation["title"]) == (id, "say one")
    said = [(item["role"], item["content"]) for item in conversation["items"]]
    assert said == [("user", "say one"), ("assistant", "one"), ("user", "say two"), ("assistant", "two")]
    reply = conversation["items"][-1]
    assert (reply["status"], reply["status_details"], reply["sequence_number"]) == ("completed", {"reason": "stop"}, 1)


def test_a_conversation_gets_another_title(scripted_client: TestClient) -> None:
    path = f"/v1/conversations/{converse(scripted_client, 'say one')}"
    answer = scripted_client.patch(path, json={"title": " Numbers\n 数字 "}, headers=bearer())
    assert (answer.status_code, answer.json()["title"]) == (200, "Numbers 数字")
    for body in (b"", b"{", b"[]", b'{"title": 7}', b'{"title": " "}', b'{"title": "\\ud800"}'):
        answer = scripted_client.patch(path, content=body, headers=bearer())
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    answer = scripted_client.patch(path, content=b"x" * FRAME_BYTES * 2, headers=bearer())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert scripted_client.get(path, headers=bearer()).json()["title"] == "Numbers 数字"


def test_a_conversation_is_deleted_and_its_reply_with_it(scripted_client: TestClient, scripted: ScriptedChat) -> None:
    with scripted_client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        id = socket.receive_json()["session"]["conversation"]
        socket.send_json({"type": "response.create", "response": {"input": "wait here"}})
        assert [socket.receive_json()["type"] for _ in range(2)] == ["response.created", "response.output_text.delta"]
        assert scripted_client.delete(f"/v1/conversations/{id}", headers=bearer()).status_code == 204
        assert until_done(socket)[-1]["response"]["status"] == "cancelled"
    assert scripted.running == 0
    answer = scripted_client.get(f"/v1/conversations/{id}", headers=bearer())
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "conversation_not_found")
    assert scripted_client.get("/v1/conversations", headers=bearer()).json()["data"] == []


def test_a_conversation_is_exported(scripted_client: TestClient) -> None:
    id = converse(scripted_client, "say **one**")
    path = f"/v1/conversations/{id}/export"
    answer = scripted_client.get(path, headers=bearer())
    assert answer.text == "# say **one**\n\n**User**\n\nsay **one**\n\n**Assistant**\n\n**one**\n"
    assert answer.headers["content-type"].startswith("text/markdown")
    assert answer.headers["content-disposition"] == f'attachment; filename="{id}.md"'
    answer = scripted_client.get(path, params={"format": "json"}, headers=bearer())
    assert answer.json() == scripted_client.get(f"/v1/conversations/{id}", headers=bearer()).json()
    assert answer.headers["content-disposition"] == f'attachment; filename="{id}.json"'
    answer = scripted_client.get(path, params={"format": "pdf"}, headers=bearer())
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "format")


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
def test_conversations_need_credentials_and_changes_by_cookie_the_page(
    scripted_client: TestClient, method: str
) -> None:
    id = converse(scripted_client, "say one")
    path = f"/v1/conversations/{id}"
    for url in (path, f"{path}?userid=ann&secret={ANN}"):  # a secret in a URL is for WebSockets only
        answer = scripted_client.request(method, url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_credentials")
    log_in(scripted_client)
    answer = scripted_client.request(method, path, headers={"Origin": "http://evil.example"})
    assert answer.status_code == (200 if method == "GET" else 403)  # which a browser does not show to another origin
    answer = scripted_client.request(method, path, headers={"Origin": "http://testserver"}, json={"title": "one"})
    assert answer.status_code == (204 if method == "DELETE" else 200)


@pytest.mark.parametrize(
    ("wish", "language"),
    [("", "en"), ("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("de-DE, en;q=0.9, zh;q=0.8", "en"), ("fr", "en")],
)
def test_the_page_speaks_the_browsers_language(client: TestClient, wish: str, language: str) -> None:
    page = client.get("/", headers={"Accept-Language": wish}).text
    assert ("登录" in page) == (language == "zh")
