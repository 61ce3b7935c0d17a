"""A killed server loses nothing that was stored."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from models.validation import Json
from tests.support.client import ANN, bearer
from tests.support.process import fork, processes
from tests.support.survivor import DELTAS_PER_SECOND, serve

pytestmark = pytest.mark.slow

SEEDS = range(20)
STORED_WITHIN = 2 * DELTAS_PER_SECOND  # deltas: the server writes every half second, so four times
KILLED_WITHIN = DELTAS_PER_SECOND // 5  # deltas after that


class Server:
    """A server in a process of its own."""

    def __init__(self, data: Path) -> None:
        reading, writing = processes.Pipe(duplex=False)
        self.process = fork(serve, data, ANN, writing)
        self.port: int = reading.recv()

    def kill(self) -> None:
        """Send SIGKILL, which leaves no time for anything."""
        self.process.kill()
        self.process.join()

    @contextmanager
    def connected(self) -> Iterator[ClientConnection]:
        """A connection by chat.v1."""
        url, protocols = f"ws://127.0.0.1:{self.port}/ws", [Subprotocol("chat.v1")]
        with connect(url, subprotocols=protocols, additional_headers=bearer(), max_queue=None) as connection:
            connection.recv()
            yield connection

    def get(self, path: str) -> Json:
        response = httpx2.get(f"http://127.0.0.1:{self.port}{path}", headers=bearer(), verify=False)
        return dict(response.raise_for_status().json())


def ask(connection: ClientConnection, input: str, **fields: Any) -> None:
    connection.send(json.dumps({"type": "response.create", "response": {"input": input, **fields}}))


def next_text(connection: ClientConnection, deltas: int) -> str:
    """The text of the next deltas."""
    return "".join(json.loads(connection.recv())["delta"] for _ in range(deltas))


def remaining_text(connection: ClientConnection) -> str:
    """The text that was sent before the connection broke."""
    text = ""
    try:
        while True:
            text += json.loads(connection.recv())["delta"]
    except ConnectionClosed:
        return text


def kill_and_check(data: Path, seed: int) -> None:
    """Kill a server in the middle of a reply, start it again, and check what it stored."""
    moments = random.Random(seed)
    server = Server(data)
    with server.connected() as connection:
        ask(connection, "count", conversation="new")
        response = json.loads(connection.recv())["response"]
        path = f"/v1/conversations/{response['conversation']}"
        text = next_text(connection, moments.randrange(STORED_WITHIN))
        stored = server.get(path)["items"]
        text += next_text(connection, moments.randrange(KILLED_WITHIN))
        server.kill()
        text += remaining_text(connection)

    server = Server(data)
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
        assert next_text(connection, reply["sequence_number"]) == reply["content"]
        assert json.loads(connection.recv())["response"]["status"] == "failed"
        ask(connection, "say that it goes on", conversation=response["conversation"])
        while json.loads(connection.recv())["type"] != "response.done":
            pass
    assert [item["content"] for item in server.get(path)["items"][2:]] == ["say that it goes on", "that it goes on"]
    server.kill()


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Future[None]]]:
    """All kills, in parallel, since each of them waits most of the time."""
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        yield [pool.submit(kill_and_check, tmp_path_factory.mktemp("data"), seed) for seed in SEEDS]


@pytest.mark.parametrize("seed", SEEDS)
def test_stored_text_survives_a_kill_at_any_moment(kills: list[Future[None]], seed: int) -> None:
    kills[seed].result()
