from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from models.protocols.responses.session import BAD_FRAMES
from models.settings import Settings
from models.web.session_socket import FRAME_BYTES
from server import create_app
from tests.support.client import (
    ANN,
    BOB,
    ask,
    bearer,
    chat_v2,
    close_code,
    events_until,
    events_until_done,
    text_of,
    until,
)
from tests.support.running_app import RunningApp, start
from tests.support.scripted import ScriptedChat
from tests.support.tiny import opens_tiny
from tests.support.workers import one_process


@pytest.fixture(scope="module")
def tiny_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """An app over a tiny model with random weights. It is greedy: a random reply may have no text."""
    data, options = tmp_path_factory.mktemp("tiny") / "data", {"temperature": 0.0}
    settings = Settings(context=256, slots=4, compile=False, data=data, users={"ann": ANN}, options=options)
    with start(create_app(settings, opens_tiny)) as running:
        yield running


# Both protocols over a real engine


def test_plain_text_streams_a_reply(tiny_app: RunningApp) -> None:
    with tiny_app.client().websocket_connect(f"/ws?userid=ann&secret={ANN}") as socket:
        assert socket.accepted_subprotocol is None
        socket.send_text("Hello")
        assert socket.receive_text()


def test_chat_v2_streams_a_reply(tiny_app: RunningApp) -> None:
    with tiny_app.client().websocket_connect("/ws", ["chat.v2"], headers=bearer()) as socket:
        session = socket.receive_json()["session"]
        assert (session["user"], session["context_length"]) == ("ann", 256)
        assert session["limits"] == {"frame_bytes": FRAME_BYTES, "responses": 4}
        assert session["capabilities"] == []
        ask(socket, "Hello", temperature=0, max_output_tokens=12, stream_id="mine")
        events = events_until_done(socket)
        assert {event["stream_id"] for event in events} == {"mine"}
        done = events[-1]["response"]
        assert "".join(event.get("delta", "") for event in events) == text_of(done)
        assert done["usage"]["output_tokens"] <= 12


# Frames


def test_an_event_is_json_without_spaces_or_escapes(client: TestClient) -> None:
    with chat_v2(client) as socket:
        ask(socket, "say 广州")
        frames = [socket.receive_text() for _ in range(5)]
    assert '"delta":"广州"' in frames[-1]


def test_a_frame_of_bytes_is_read_like_one_of_text(client: TestClient) -> None:
    with chat_v2(client) as socket:
        socket.send_bytes(b'{"type": "response.create", "input": "say yes"}')
        assert text_of(events_until_done(socket)[-1]["response"]) == "yes"
        socket.send_bytes(b"\xff\xfe")
        assert socket.receive_json()["error"]["code"] == "invalid_json"


def test_a_cancel_is_read_while_a_reply_streams(client: TestClient) -> None:
    with chat_v2(client) as socket:
        ask(socket, "wait some")
        events_until(socket, "response.output_text.delta")
        socket.send_json({"type": "parley.response.cancel"})
        assert events_until_done(socket)[-1]["response"]["status"] == "cancelled"


def test_twenty_bad_frames_in_a_row_close_with_4400(client: TestClient) -> None:
    with chat_v2(client) as socket:
        for _ in range(BAD_FRAMES):
            socket.send_text("nonsense")
        assert close_code(socket) == 4400


@pytest.mark.parametrize("protocols", [["chat.v2"], []], ids=["chat.v2", "plain text"])
@pytest.mark.parametrize("frame", ["x" * (FRAME_BYTES + 1), "广" * (FRAME_BYTES // 3 + 1)], ids=["ASCII", "Chinese"])
def test_a_frame_over_the_limit_closes_with_1009(client: TestClient, protocols: list[str], frame: str) -> None:
    with client.websocket_connect("/ws", protocols, headers=bearer()) as socket:
        socket.send_text(frame)
        assert close_code(socket) == 1009


def test_a_frame_of_the_limit_is_read(client: TestClient) -> None:
    with chat_v2(client) as socket:
        socket.send_text('{"type": "nothing"}'.ljust(FRAME_BYTES))
        assert socket.receive_json()["error"]["code"] == "unknown_type"


def test_a_ninth_waiting_message_of_plain_text_closes_with_1013(client: TestClient) -> None:
    with client.websocket_connect("/ws", headers=bearer()) as socket:
        socket.send_text("wait a")
        socket.receive_text()
        for _ in range(9):
            socket.send_text("say b")
        assert close_code(socket) == 1013


# Connections


def test_one_connection_too_many_closes_with_4429(settings: Settings, scripted: ScriptedChat) -> None:
    with start(create_app(replace(settings, sockets_per_user=1), scripted.opened)) as running:
        client = running.client()
        with chat_v2(client):
            with client.websocket_connect("/ws", ["chat.v2"], headers=bearer()) as second:
                assert second.receive_json()["error"]["code"] == "too_many_sockets"
                assert close_code(second) == 4429
            with client.websocket_connect("/ws", headers=bearer()) as plain:
                assert "too many open connections" in plain.receive_text()
                assert close_code(plain) == 4429
        with chat_v2(client):
            pass  # there is room again


@contextmanager
def plain_text(client: TestClient, secret: str = ANN) -> Iterator[Any]:
    """A connection by plain text that has joined, since it was answered."""
    with client.websocket_connect("/ws", headers=bearer(secret)) as socket:
        socket.send_text("say here")
        assert socket.receive_text() == "here"
        yield socket


def test_a_user_who_joins_and_leaves_is_announced(own_client: TestClient) -> None:
    with chat_v2(own_client) as ann, plain_text(own_client) as plain:
        with plain_text(own_client, BOB), plain_text(own_client, BOB):
            assert until(ann, "parley.presence.joined", "parley.presence.left")["type"] == "parley.presence.joined"
        assert until(ann, "parley.presence.left") == {"type": "parley.presence.left", "user": "bob"}
        assert plain.receive_text() == "Client #bob left the chat"


def test_nobody_is_announced_where_presence_is_off(settings: Settings, scripted: ScriptedChat) -> None:
    with start(create_app(replace(settings, presence=False), scripted.opened)) as running:
        client = running.client()
        with chat_v2(client) as ann, plain_text(client) as plain:
            with plain_text(client, BOB):
                pass
            plain.send_text("say yes")
            assert plain.receive_text() == "yes"
            ask(ann, "say yes")
            assert not [event for event in events_until(ann, "response.created") if "presence" in event["type"]]


@one_process
def test_a_bug_closes_with_1011(own_app: RunningApp, caplog: pytest.LogCaptureFixture) -> None:
    class BrokenConnections:
        async def join(self, user: str, connection: object) -> None:
            raise RuntimeError("a bug")

    own_app.app.state.connections = BrokenConnections()
    with own_app.client().websocket_connect("/ws", ["chat.v2"], headers=bearer()) as socket:
        assert close_code(socket) == 1011
    assert "a bug" in caplog.text
