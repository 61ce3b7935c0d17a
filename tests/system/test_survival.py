"""A killed server loses nothing that was stored."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from models.generation.manager import WRITE_SECONDS
from models.store.item import node_id
from models.validation import Json
from tests.support.client import ANN, bearer, text_of
from tests.support.process import PATIENCE, fork, processes
from tests.support.sockets import events_until_done
from tests.support.survivor import DELTAS_PER_SECOND, serve

pytestmark = pytest.mark.slow

SEEDS = range(20)
STREAMS = 8
KILLED_WITHIN = 3 * STREAMS * DELTAS_PER_SECOND  # deltas of all streams: three seconds, if the machine is fast enough
PROMISE = 3 * WRITE_SECONDS  # seconds until a delta is stored: one until the write, one for it, one for a busy machine


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
        """A connection by chat.v2."""
        url, protocols = f"ws://127.0.0.1:{self.port}/ws", [Subprotocol("chat.v2")]
        with connect(url, subprotocols=protocols, additional_headers=bearer(), max_queue=None) as connection:
            connection.recv()
            yield connection

    def get(self, path: str) -> Json:
        response = httpx2.get(f"http://127.0.0.1:{self.port}{path}", headers=bearer(), verify=False)
        return dict(response.raise_for_status().json())


class Stream:
    """A reply that is streamed to the client of a server that will be killed."""

    def __init__(self, response: Json) -> None:
        self.id: str = response["id"]
        self.conversation: str = response["conversation"]["id"]
        self.path = f"/v1/conversations/{self.conversation}/branch"
        self.deltas: list[tuple[float, str]] = []  # each with the time at which it came

    def text(self, before: float = math.inf) -> str:
        """The text that came before some time."""
        return "".join(delta for at, delta in self.deltas if at < before)


class Client:
    """A client with several streams over one connection."""

    def __init__(self, connection: ClientConnection) -> None:
        self.streams: dict[str, Stream] = {}
        self._connection = connection

    def ask(self, input: str, **fields: Any) -> None:
        self._connection.send(json.dumps({"type": "response.create", "input": input, "truncation": "auto", **fields}))

    def receive(self) -> Json:
        """Receive one event, and keep it if it belongs to a stream."""
        event: Json = json.loads(self._connection.recv(PATIENCE))
        if event["type"] == "response.created":
            stream = Stream(event["response"])
            self.streams[stream.id] = stream
        elif event["type"] == "response.output_text.delta":
            self.streams[node_id(event["item_id"])].deltas.append((time.monotonic(), event["delta"]))
        return event

    def receive_rest(self) -> None:
        """Receive what was sent before the connection broke."""
        with suppress(ConnectionClosed):
            while True:
                self.receive()


def kill_and_check(data: Path, seed: int) -> None:
    """Kill a server in the middle of some replies, start it again, and check what it stored."""
    server = Server(data)
    with server.connected() as connection:
        client = Client(connection)
        for number in range(STREAMS):
            client.ask("count", conversation="new", stream_id=str(number))
        for _ in range(STREAMS + random.Random(seed).randrange(KILLED_WITHIN)):
            assert client.receive()["type"] != "error"
        killed_at = time.monotonic()
        server.kill()
        client.receive_rest()

    server = Server(data)
    for stream in client.streams.values():  # the acknowledged ones
        check_stored(server, stream, killed_at)
    server.kill()


def check_stored(server: Server, stream: Stream, killed_at: float) -> None:
    """Check that a message, and its reply as far as promised, are stored, and that the conversation goes on."""
    message, reply = server.get(stream.path)["data"]
    assert message["content"][0]["text"] == "count"
    assert reply["id"] == stream.id
    assert (reply["status"], reply["error"]["code"]) == ("failed", "server_error")
    text = text_of(reply)
    assert stream.text().startswith(text) or text.startswith(stream.text())
    assert text.startswith(stream.text(before=killed_at - PROMISE))

    with server.connected() as connection:
        connection.send(json.dumps({"type": "parley.response.resume", "response_id": stream.id}))
        events = events_until_done(connection)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        deltas = [event["delta"] for event in events if "delta" in event]
        assert ("".join(deltas), len(deltas)) == (text, text.count(" "))
        assert events[-1]["response"]["status"] == "failed"
        Client(connection).ask("say that it goes on", conversation=stream.conversation)
        assert text_of(events_until_done(connection)[-1]["response"]) == "that it goes on"
    turns = server.get(stream.path)["data"]
    assert (turns[2]["content"][0]["text"], text_of(turns[3])) == ("say that it goes on", "that it goes on")


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Future[None]]]:
    """All kills, some at once, since each of them waits most of the time."""
    with ThreadPoolExecutor(4) as pool:
        yield [pool.submit(kill_and_check, tmp_path_factory.mktemp("data"), seed) for seed in SEEDS]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_acknowledged_and_older_text_survive_a_kill_at_any_moment(
    kills: list[Future[None]], seed: int
) -> None:
    kills[seed].result()
