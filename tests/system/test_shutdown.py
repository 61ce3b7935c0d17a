"""How a server stops: at signals, with replies that run or wait, and with clients that do not answer."""

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

from tests.support.process import COMMANDS, COMPLAINT, PATIENCE, RESTARTS, Child, Server, launched, stored, until

pytestmark = pytest.mark.slow

STOPPED = "The server stopped before the reply ended."

by_each_command = pytest.mark.parametrize("command", COMMANDS)


def completion(input: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"model": "scripted", "messages": [{"role": "user", "content": input}], **fields}


@by_each_command
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_running_reply_finishes_and_is_stored_before_the_end(tmp_path: Path, command: str, number: int) -> None:
    with launched(tmp_path, command=command) as server, server.connected() as client:
        response = client.start("wait hello")
        server.signal(number)
        server.log.find("waiting up to 30 s for 1 replies")
        server.release()
        assert client.outcome(response["id"]) == ("completed", None, "hello")
        assert client.wait_for_close() == RESTARTS
        assert server.exit_code() == 0
    assert stored(tmp_path) == [("wait hello", None, None), ("hello", "completed", "stop")]


@by_each_command
def test_a_stopping_server_refuses_new_requests(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, command=command) as server, server.connected() as client:
        response = client.start("wait hello")
        server.signal(signal.SIGTERM)
        server.log.find("waiting up to 30 s")
        status, text = server.ready()
        assert (status, "stopping" in text) == (503, True)
        client.ask("say more", conversation="new")
        assert client.wait_for("error", stream_id="say more")["error"]["code"] == "server_shutdown"
        with server.connected() as late:
            late.ask("say it late", conversation="new")
            assert late.wait_for("error", stream_id="say it late")["error"]["code"] == "server_shutdown"
        for stream in (False, True):
            refused = server.post("/v1/chat/completions", json=completion("say more", stream=stream))
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "server_shutdown"
            assert int(refused.headers["Retry-After"]) > 0
        server.release()
        assert client.outcome(response["id"]) == ("completed", None, "hello")
        assert server.exit_code() == 0


@by_each_command
def test_a_reply_in_the_wait_queue_still_gets_its_slot(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, "faulty", command, slots=1) as server, server.connected() as client:
        running = client.start("runs %", max_output_tokens=5)
        waiting = client.start("waits", max_output_tokens=5, conversation="new")
        client.wait_for("parley.queue", response_id=waiting["id"], position=1)
        server.signal(signal.SIGTERM)
        server.log.find("waiting up to 30 s for 2 replies")
        server.release()
        for response in (running, waiting):
            assert client.outcome(response["id"])[:2] == ("incomplete", "max_output_tokens")
        assert client.wait_for_close() == RESTARTS
        assert server.exit_code() == 0


@pytest.mark.parametrize(("command", "seconds"), [(COMMANDS[0], 0), (COMMANDS[1], 1)])
def test_replies_that_do_not_finish_in_time_are_cut_and_stored(tmp_path: Path, command: str, seconds: int) -> None:
    with launched(tmp_path, command=command, drain=seconds) as server, server.connected() as client:
        running = client.start("wait hello")
        client.wait_for("response.output_text.delta", delta="o")
        waiting = client.start("hold still", conversation="new")
        server.signal(signal.SIGTERM)
        assert client.outcome(running["id"]) == ("failed", STOPPED, "hello")
        assert client.outcome(waiting["id"]) == ("failed", STOPPED, "")
        assert client.wait_for_close() == RESTARTS
        assert server.exit_code() == 0
    assert stored(tmp_path) == [
        ("wait hello", None, None),
        ("hello", "failed", "server_shutdown"),
        ("hold still", None, None),
        ("", "failed", "server_shutdown"),
    ]


@by_each_command
def test_a_second_signal_cuts_replies_at_once_and_stores_them(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, command=command, drain=86_400) as server, server.connected() as client:
        response = client.start("wait hello")
        client.wait_for("response.output_text.delta", delta="o")
        server.signal(signal.SIGTERM)
        server.log.find("another signal stops at once")
        server.signal(signal.SIGTERM)
        assert client.outcome(response["id"]) == ("failed", STOPPED, "hello")
        assert client.wait_for_close() == RESTARTS
        server.exit_code()
    assert stored(tmp_path)[1] == ("hello", "failed", "server_shutdown")


@by_each_command
def test_a_cut_stream_over_http_ends_with_an_error(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, command=command, drain=0) as server:
        url, body = f"{server.url}/v1/chat/completions", completion("wait hello", stream=True)
        with httpx2.stream("POST", url, headers=server.headers, json=body, timeout=PATIENCE, verify=False) as response:
            frames = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            text = ""
            while text != "hello":
                text += json.loads(next(frames))["choices"][0]["delta"]["content"]
            server.signal(signal.SIGTERM)
            assert json.loads(next(frames))["error"]["code"] == "server_shutdown"
            assert list(frames) == ["[DONE]"]
        assert server.exit_code() == 0


def test_a_cut_completion_is_an_error_503(tmp_path: Path) -> None:
    with launched(tmp_path, drain=0) as server, ThreadPoolExecutor(1) as pool:
        posted = pool.submit(server.post, "/v1/chat/completions", json=completion("wait hello"))
        until(lambda: "parley_num_requests_running 1.0" in server.get("/metrics").text, "the reply runs")
        server.signal(signal.SIGTERM)
        assert posted.result(PATIENCE).status_code == 503
        assert posted.result().json()["error"]["code"] == "server_shutdown"
        assert server.exit_code() == 0


def test_a_plain_text_client_gets_the_whole_reply_before_the_close(tmp_path: Path) -> None:
    with launched(tmp_path) as server, server.connection() as connection:
        connection.send("wait hello")
        assert connection.recv(PATIENCE) == "hell"
        server.signal(signal.SIGTERM)
        server.log.find("waiting up to 30 s")
        server.release()
        assert connection.recv(PATIENCE) == "o"
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(PATIENCE)
        assert closed.value.rcvd
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == RESTARTS
        assert server.exit_code() == 0


@by_each_command
def test_an_idle_server_closes_its_connections_and_exits(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, command=command) as server, server.connected() as client:
        server.signal(signal.SIGTERM)
        assert client.wait_for_close() == RESTARTS
        assert server.exit_code() == 0


@by_each_command
def test_a_stop_between_the_model_and_the_first_request_ends_with_0(tmp_path: Path, command: str) -> None:
    with Child.running("stopped", command, data=tmp_path, slots=1) as child:
        assert child.exit_code() == 0
        assert not COMPLAINT.search(child.log.whole())


def test_two_stops_between_the_model_and_the_first_request_end_with_the_code_of_a_forced_stop(tmp_path: Path) -> None:
    with Child.running("stopped", COMMANDS[0], data=tmp_path, slots=2) as child:
        assert child.exit_code() == 130


def silent_client(server: Server, *frames: bytes) -> socket.socket:
    """A connection by chat.v2 that sends some frames and never reads, so it answers no close either."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE)
    connection.connect(("127.0.0.1", server.port))
    lines = ["GET /ws HTTP/1.1", "Host: 127.0.0.1", "Connection: Upgrade", "Upgrade: websocket"]
    lines += [
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol: chat.v2",
    ]
    connection.sendall("\r\n".join([*lines, f"Authorization: Bearer {server.secret}", "", ""]).encode())
    assert connection.recv(12) == b"HTTP/1.1 101"
    for frame in frames:
        connection.sendall(Frame(Opcode.TEXT, frame).serialize(mask=True))
    return connection


@by_each_command
def test_a_client_that_does_not_answer_does_not_delay_the_end(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, command=command) as server, silent_client(server):
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0


def test_a_client_that_does_not_read_does_not_delay_the_end(tmp_path: Path) -> None:
    long = json.dumps({"type": "response.create", "input": f"say {'much' * 25_000}"}).encode()
    with launched(tmp_path, command=COMMANDS[1], drain=0) as server, silent_client(server, long):
        finished = 'parley_responses_total{reason="stop",status="completed"} 1.0'
        until(lambda: finished in server.get("/metrics").text, "the reply has finished")
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        server.log.find("timeout graceful shutdown exceeded")  # uvicorn cut the connection off, and went on as usual
        server.log.find("Application shutdown complete")
