from __future__ import annotations

import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from tests.process import COMMANDS, PATIENCE, RESTARTS, Server, launched, stored, until

STARTED = pytest.mark.parametrize("command", COMMANDS)


def completion(input: str, **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": input}], **fields}


@STARTED
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_reply_comes_to_its_end_and_is_kept_before_the_server_ends(
    tmp_path: Path, command: str, number: int
) -> None:
    with launched(tmp_path, command=command) as server, server.connected() as client:
        response = client.asked("wait hello")
        server.signal(number)
        server.log.find("30 s to come to their end: 1")
        server.release()
        assert client.done(response["id"]) == ("completed", "stop", "hello")
        assert client.closed() == RESTARTS
        assert server.exit_code() == 0
    assert stored(tmp_path) == [("wait hello", None, None), ("hello", "completed", "stop")]


@STARTED
def test_nothing_new_is_begun_while_the_server_stops(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, command=command) as server, server.connected() as client:
        response = client.asked("wait hello")
        server.signal(signal.SIGTERM)
        server.log.find("30 s to come")
        status, text = server.ready()
        assert (status, "stopping" in text) == (503, True)
        client.ask("say more", conversation="new")
        assert client.hear("error", event_id="say more")["error"]["code"] == "server_shutdown"
        with server.connected() as late:
            late.ask("say it late")
            assert late.hear("error", event_id="say it late")["error"]["code"] == "server_shutdown"
        for stream in (False, True):
            refused = server.post("/v1/chat/completions", json=completion("say more", stream=stream))
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "server_shutdown"
            assert int(refused.headers["Retry-After"]) > 0
        server.release()
        assert client.done(response["id"]) == ("completed", "stop", "hello")
        assert server.exit_code() == 0


@STARTED
def test_a_reply_that_waits_for_a_slot_still_gets_it(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, "faulty", command, slots=1) as server, server.connected() as client:
        running = client.asked("runs %", max_output_tokens=5)
        waiting = client.asked("waits", max_output_tokens=5, conversation="new")
        client.hear("response.queued", response_id=waiting["id"], position=1)
        server.signal(signal.SIGTERM)
        server.log.find("30 s to come to their end: 2")
        server.release()
        for response in (running, waiting):
            assert client.done(response["id"])[:2] == ("incomplete", "max_output_tokens")
        assert client.closed() == RESTARTS
        assert server.exit_code() == 0


@pytest.mark.parametrize(("command", "seconds"), [(COMMANDS[0], 0), (COMMANDS[1], 1)])
def test_replies_that_do_not_end_in_time_are_ended_and_kept_as_far_as_they_came(
    tmp_path: Path, command: str, seconds: int
) -> None:
    with launched(tmp_path, command=command, drain=seconds) as server, server.connected() as client:
        running = client.asked("wait hello")
        client.hear("response.output_text.delta", response_id=running["id"], delta="o")
        waiting = client.asked("hold still", conversation="new")
        server.signal(signal.SIGTERM)
        assert client.done(running["id"]) == ("failed", "server_shutdown", "hello")
        assert client.done(waiting["id"]) == ("failed", "server_shutdown", "")
        assert client.closed() == RESTARTS
        assert server.exit_code() == 0
    assert stored(tmp_path) == [
        ("wait hello", None, None),
        ("hello", "failed", "server_shutdown"),
        ("hold still", None, None),
        ("", "failed", "server_shutdown"),
    ]


@STARTED
def test_a_second_signal_ends_all_at_once_and_what_came_is_kept(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, command=command, drain=86_400) as server, server.connected() as client:
        response = client.asked("wait hello")
        client.hear("response.output_text.delta", delta="o")
        server.signal(signal.SIGTERM)
        server.log.find("another signal ends it at once")
        server.signal(signal.SIGTERM)
        assert client.done(response["id"]) == ("failed", "server_shutdown", "hello")
        assert client.closed() == RESTARTS
        server.exit_code()
    assert stored(tmp_path)[1] == ("hello", "failed", "server_shutdown")


@STARTED
def test_a_stream_over_http_that_is_cut_says_so(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, command=command, drain=0) as server:
        asked = {"headers": server.headers, "json": completion("wait hello", stream=True), "timeout": PATIENCE}
        with httpx2.stream("POST", f"{server.url}/v1/chat/completions", **asked) as answer:
            frames = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            text = ""
            while text != "hello":
                text += json.loads(next(frames))["choices"][0]["delta"]["content"]
            server.signal(signal.SIGTERM)
            assert json.loads(next(frames))["error"]["code"] == "server_shutdown"
            assert list(frames) == ["[DONE]"]
        assert server.exit_code() == 0


def test_a_completion_that_is_cut_is_refused_instead(tmp_path: Path) -> None:
    with launched(tmp_path, drain=0) as server, ThreadPoolExecutor(1) as elsewhere:
        asked = elsewhere.submit(server.post, "/v1/chat/completions", json=completion("wait hello"))
        until(lambda: "parley_num_requests_running 1.0" in server.get("/metrics").text, "the reply runs")
        server.signal(signal.SIGTERM)
        assert asked.result(PATIENCE).status_code == 503
        assert asked.result().json()["error"]["code"] == "server_shutdown"
        assert server.exit_code() == 0


def test_a_plain_connection_hears_its_reply_to_the_end_and_is_closed_too(tmp_path: Path) -> None:
    with launched(tmp_path) as server, server.connection() as connection:
        connection.send("wait hello")
        assert connection.recv(PATIENCE) == "hell"
        server.signal(signal.SIGTERM)
        server.log.find("30 s to come")
        server.release()
        assert connection.recv(PATIENCE) == "o"
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(PATIENCE)
        assert closed.value.rcvd
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == RESTARTS
        assert server.exit_code() == 0


@STARTED
def test_an_idle_server_ends_and_closes_its_connections(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, command=command) as server, server.connected() as client:
        server.signal(signal.SIGTERM)
        assert client.closed() == RESTARTS
        assert server.exit_code() == 0


def silent(server: Server, *asked: bytes) -> socket.socket:
    """A connection of one who asks, then reads nothing, and so does not answer that it is closed."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE)
    connection.connect(("127.0.0.1", server.port))
    lines = ["GET /ws HTTP/1.1", "Host: 127.0.0.1", "Connection: Upgrade", "Upgrade: websocket"]
    lines += [
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol: chat.v1",
    ]
    connection.sendall("\r\n".join([*lines, f"Authorization: Bearer {server.secret}", "", ""]).encode())
    assert connection.recv(12) == b"HTTP/1.1 101"
    for frame in asked:
        connection.sendall(Frame(Opcode.TEXT, frame).serialize(mask=True))
    return connection


@STARTED
def test_a_client_that_does_not_answer_does_not_hold_up_the_end(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, command=command) as server, silent(server):
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0


def test_a_client_that_does_not_read_does_not_hold_up_the_end(tmp_path: Path) -> None:
    long = json.dumps({"type": "response.create", "response": {"input": f"say {'much' * 25_000}"}}).encode()
    with launched(tmp_path, command=COMMANDS[1], drain=0) as server, silent(server, long):
        done = 'parley_responses_total{reason="stop",status="completed"} 1.0'
        until(lambda: done in server.get("/metrics").text, "the reply has ended")
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        server.log.find("timeout graceful shutdown exceeded")  # it was cut off, and the end is as clean as ever
        server.log.find("Application shutdown complete")
