"""What is left when the server is killed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.conftest import ANN
from tests.process import processes
from tests.survivor import serve

Json = dict[str, Any]
HEADERS = {"Authorization": f"Bearer {ANN}"}


class Server:
    """A server in a process of its own."""

    def __init__(self, data: Path) -> None:
        reading, writing = processes.Pipe(duplex=False)
        self.process = processes.Process(target=serve, args=(data, ANN, writing), daemon=True)
        self.process.start()
        self.port: int = reading.recv()

    def kill(self) -> None:
        """SIGKILL: it has no time for anything."""
        self.process.kill()
        self.process.join()

    @contextmanager
    def connected(self) -> Iterator[ClientConnection]:
        url, protocols = f"ws://127.0.0.1:{self.port}/ws", [Subprotocol("chat.v1")]
        with connect(url, subprotocols=protocols, additional_headers=HEADERS, max_queue=None) as connection:
            connection.recv()
            yield connection

    def get(self, path: str) -> Json:
        answer = httpx2.get(f"http://127.0.0.1:{self.port}{path}", headers=HEADERS)
        return dict(answer.raise_for_status().json())


def ask(connection: ClientConnection, input: str, **fields: Any) -> None:
    request = {"input": input, **fields}
    connection.send(json.dumps({"type": "response.create", "response": request}))


def heard(connection: ClientConnection, deltas: int) -> str:
    return "".join(json.loads(connection.recv())["delta"] for _ in range(deltas))


def rest(connection: ClientConnection) -> str:
    """What had been sent before the connection broke."""
    text = ""
    try:
        while True:
            text += json.loads(connection.recv())["delta"]
    except ConnectionClosed:
        return text


@pytest.mark.parametrize("seed", range(20))
def test_what_was_stored_survives_a_kill_at_any_moment(tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    server = Server(tmp_path)
    with server.connected() as connection:
        ask(connection, "count", conversation="new")
        response = json.loads(connection.recv())["response"]
        path = f"/v1/conversations/{response['conversation']}"
        text = heard(connection, moments.randrange(2_000))
        stored = server.get(path)["items"]
        text += heard(connection, moments.randrange(200))
        server.kill()
        text += rest(connection)

    server = Server(tmp_path)
    message, reply = server.get(path)["items"]
    assert message == stored[0]
    assert message["content"] == "count"
    assert reply["id"] == response["id"]
    assert (reply["status"], reply["status_details"]) == ("failed", {"reason": "server_error"})
    assert text.startswith(reply["content"])
    assert reply["content"].startswith(stored[1]["content"])
    assert reply["sequence_number"] == reply["content"].count(" ")

    with server.connected() as connection:
        event = {"type": "response.resume", "response_id": response["id"], "starting_after": 0}
        connection.send(json.dumps(event))
        assert heard(connection, reply["sequence_number"]) == reply["content"]
        assert json.loads(connection.recv())["response"]["status"] == "failed"
        ask(connection, "say that it goes on", conversation=response["conversation"])
        while json.loads(connection.recv())["type"] != "response.done":
            pass
    assert [item["content"] for item in server.get(path)["items"][2:]] == ["say that it goes on", "that it goes on"]
    server.kill()
