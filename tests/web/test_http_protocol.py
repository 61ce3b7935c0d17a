"""Clients that stall, at a real server: nobody without a secret holds a connection for long."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import httpx2
import pytest
from websockets.sync.client import connect

from models.settings import Settings
from models.web.http_protocol import HTTPProtocol
from server import create_app
from tests.support.client import bearer
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served, serve
from tests.support.sockets import ask, chat_v2, events_until_done
from tests.support.workers import serve_by_workers

PATIENCE = 20  # seconds for what takes less than one
NEVER = 3600.0

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST = (
    b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nContent-Type: application/x-www-form-urlencoded\r\n\r\n"
)
UPGRADE = (
    b"GET /ws?secret=wrong HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


class Patient(HTTPProtocol):
    """Waits for ever; each test shortens one limit."""

    head_seconds = body_seconds = stranger_seconds = NEVER
    idle_seconds = int(NEVER)


class HastyHead(Patient):
    head_seconds = 0.1


class HastyBody(Patient):
    body_seconds = 0.1


class HastyIdle(Patient):
    idle_seconds = 0


class HastyStranger(Patient):
    stranger_seconds = 0.1


@pytest.fixture
def protocol(request: pytest.FixtureRequest) -> type[HTTPProtocol]:
    """The protocol that the test names."""
    kind: type[HTTPProtocol] = request.param
    return kind


@pytest.fixture
def served(settings: Settings, scripted: ScriptedChat, protocol: type[HTTPProtocol]) -> Iterator[Served]:
    """A server that keeps idle connections for ever, but for what the protocol limits."""
    with serve(create_app(settings, scripted.opened), http=protocol, timeout_keep_alive=int(NEVER)) as served:
        yield served


def with_limit(protocol: type[HTTPProtocol]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("protocol", [protocol], indirect=True)


def opened(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), PATIENCE)


def everything(connection: socket.socket) -> bytes:
    """All that the server sends until it closes the connection."""
    received = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return received
        if not piece:
            return received
        received += piece


def received(connection: socket.socket, end: bytes) -> bytes:
    """What the server sends, up to its end."""
    received = b""
    while not received.endswith(end):
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


def send_for_ever(connection: socket.socket, requests: bytes) -> None:
    while True:
        connection.sendall(requests)


@with_limit(HastyHead)
@pytest.mark.parametrize(
    "sent", [b"", b"GET /hea", GET, GET + b"X-Slow: "], ids=["nothing", "half a line", "no end", "half"]
)
def test_a_request_whose_head_does_not_come_ends(served: Served, sent: bytes) -> None:
    with opened(served) as connection:
        connection.sendall(sent)
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408 ") if sent else answer == b""


@with_limit(HastyHead)
def test_a_second_request_whose_head_does_not_come_ends(served: Served) -> None:
    with opened(served) as connection:
        connection.sendall(GET + b"\r\n")
        received(connection, b"ok")
        connection.sendall(GET)
        assert everything(connection).startswith(b"HTTP/1.1 408 ")


@with_limit(HastyBody)
@pytest.mark.parametrize("sent", [b"", b"secre"], ids=["nothing", "half"])
def test_a_request_whose_body_does_not_come_ends(served: Served, sent: bytes) -> None:
    with opened(served) as connection:
        connection.sendall(POST + sent)
        assert everything(connection).startswith(b"HTTP/1.1 408 ")


@with_limit(HastyBody)
def test_an_answered_request_whose_body_does_not_come_ends(served: Served) -> None:
    with opened(served) as connection:
        connection.sendall(POST.replace(b"/login", b"/v1/chat/completions"))
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b" 408 " not in answer


@with_limit(HastyHead)
def test_a_client_that_is_silent_after_a_late_body_is_closed(served: Served) -> None:
    with opened(served) as connection:
        connection.sendall(POST.replace(b"/login", b"/v1/chat/completions"))
        received(connection, b"}}")
        connection.sendall(b"secret=ab")
        assert b"408" not in everything(connection)


@with_limit(HastyIdle)
def test_an_idle_stranger_is_closed_and_an_idle_user_is_not(served: Served) -> None:
    with httpx2.Client(base_url=served.url) as user, opened(served) as stranger:
        assert user.get("/v1/models", headers=bearer()).status_code == 200
        (before,) = served.app.state.open_connections._open - {*served.app.state.open_connections._strangers}
        stranger.sendall(GET + b"\r\n")
        assert everything(stranger).endswith(b"ok")
        assert user.get("/health").text == "ok"
        assert before in served.app.state.open_connections._open


@with_limit(HastyStranger)
def test_a_stranger_who_does_not_take_the_response_is_closed(served: Served) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", served.port))
        requests = 100 * (GET.replace(b"/health", b"/static/chat.js") + b"\r\n")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_for_ever(connection, requests)


@with_limit(HastyStranger)
@pytest.mark.parametrize(
    "more", [b"", b"Content-Length: 0\r\n", b"X-Long: " + b"x" * 9000 + b"\r\n"], ids=["refused", "body", "long header"]
)
def test_a_websocket_without_a_user_ends_although_its_client_answers_nothing(served: Served, more: bytes) -> None:
    with opened(served) as connection:
        connection.sendall(UPGRADE + more + b"\r\n")
        answer = everything(connection)
    assert more or b"authentication failed" in answer


@with_limit(HastyStranger)
def test_the_websocket_of_a_user_outlives_that_of_a_stranger(served: Served) -> None:
    with connect(served.ws, additional_headers=bearer()) as plain, chat_v2(served) as user:
        with opened(served) as stranger:
            stranger.sendall(UPGRADE + b"\r\n")
            everything(stranger)
        ask(user, "say still here")
        events_until_done(user)
        plain.send("say me too")
        assert plain.recv() != ""


@with_limit(Patient)
def test_a_closed_connection_is_forgotten(served: Served) -> None:
    connections = served.app.state.open_connections
    with opened(served) as http, chat_v2(served):
        http.sendall(GET + b"Connection: close\r\n\r\n")
        everything(http)
    with httpx2.Client(base_url=served.url) as client:
        while len(connections) > 1:  # this client's own
            assert client.get("/health").status_code == 200


@with_limit(Patient)
def test_of_the_strangers_of_an_address_the_oldest_makes_room(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with chat_v2(served) as user:
        crowd = [opened(served) for _ in range(150)]
        with opened(served) as newcomer:
            newcomer.sendall(GET + b"Connection: close\r\n\r\n")
            assert everything(newcomer).endswith(b"ok")
        assert everything(crowd[0]) == b""
        ask(user, "say still here")
        events_until_done(user)
        for connection in crowd:
            connection.close()
    assert caplog.text.count("too many connections are open") == 1


def test_what_is_sent_waits_for_no_acknowledgement(settings: Settings, scripted: ScriptedChat) -> None:
    noted: list[int] = []

    class Noted(HTTPProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connection = transport.get_extra_info("socket")
            noted.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    # The workers have a listening socket that is not asyncio's own, as with `python server.py`.
    with serve_by_workers(create_app(settings, scripted.opened), http=Noted) as served, opened(served) as connection:
        connection.sendall(GET + b"\r\n")
        received(connection, b"ok")
    assert len(noted) == 1
    assert noted[0]
