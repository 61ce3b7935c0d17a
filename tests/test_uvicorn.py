"""What only a real server shows: close codes, frame limits, slow and vanished clients, its log, its end."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from models import events
from models.settings import Settings
from server import FRAME_BYTES, UVICORN_FRAME_BYTES, create_app
from tests.conftest import ANN, BOB
from tests.scripted import ScriptedChat
from tests.serving import Served, serve
from tests.test_server import encoded
from tests.tiny import opens_tiny

Json = dict[str, Any]


@contextmanager
def chat_v1(served: Served, secret: str = ANN, **options: Any) -> Iterator[ClientConnection]:
    """A connection that has had its `session.created`."""
    headers, protocols = {"Authorization": f"Bearer {secret}"}, [Subprotocol("chat.v1")]
    with connect(served.ws, subprotocols=protocols, additional_headers=headers, max_size=None, **options) as connection:
        assert json.loads(connection.recv())["type"] == "session.created"
        yield connection


def ask(connection: ClientConnection, input: str, **options: Any) -> None:
    connection.send(json.dumps({"type": "response.create", "response": {"input": input, **options}}))


def resume(connection: ClientConnection, response_id: str, starting_after: int) -> None:
    event = {"type": "response.resume", "response_id": response_id, "starting_after": starting_after}
    connection.send(json.dumps(event))


def until(connection: ClientConnection, type: str) -> list[Json]:
    events: list[Json] = [json.loads(connection.recv())]
    while events[-1]["type"] != type:
        events.append(json.loads(connection.recv()))
    return events


def closed_with(connection: ClientConnection) -> int | None:
    """The code of the close, after whatever comes before it."""
    try:
        while True:
            connection.recv()
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the server logged with a traceback; the client in this process may have troubles of its own."""
    return [record for record in caplog.records if record.exc_info and record.name != "websockets.client"]


async def settled(before: set[asyncio.Task[Any]]) -> None:
    """Wait until no task is left but those that were there before."""
    while others := asyncio.all_tasks() - before - {own for own in [asyncio.current_task()] if own}:
        await asyncio.wait(others)


def call(served: Served, coroutine: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, served.loop).result()


async def all_tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks()


def test_close_codes_reach_a_real_client(scripted_server: Served) -> None:
    with connect(scripted_server.ws + "?secret=wrong") as plain:
        assert plain.recv() == "authentication failed"
        assert closed_with(plain) == 1008
    with connect(scripted_server.ws, subprotocols=[Subprotocol("chat.v1")]) as connection:
        assert json.loads(connection.recv())["error"]["code"] == "invalid_credentials"
        assert closed_with(connection) == 4401


def test_guesses_made_at_once_are_counted_one_by_one(scripted_server: Served) -> None:
    def guess(number: int) -> str:
        with connect(f"{scripted_server.ws}?secret=wrong{number}") as connection:
            return str(connection.recv())

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(guess, range(40)))
    assert answers.count("authentication failed") == 10


def test_a_browsers_subprotocol_credentials_are_not_echoed(scripted_server: Served) -> None:
    protocols = [Subprotocol("chat.v1"), Subprotocol(encoded(ANN))]
    with connect(scripted_server.ws, subprotocols=protocols) as connection:
        assert connection.subprotocol == "chat.v1"
        assert json.loads(connection.recv())["session"]["user"] == "ann"


def test_a_frame_over_the_limit_closes_1009(scripted_server: Served) -> None:
    with chat_v1(scripted_server) as connection:
        connection.send("x" * (2 * FRAME_BYTES))
        assert closed_with(connection) == 1009
    with chat_v1(scripted_server) as connection:
        ask(connection, "say still here")
        until(connection, "response.done")


def test_a_frame_over_uvicorns_own_limit_ends_the_connection_and_nothing_else(scripted_server: Served) -> None:
    with chat_v1(scripted_server) as connection, chat_v1(scripted_server, BOB) as other:
        with suppress(ConnectionClosed):
            connection.send("x" * (2 * UVICORN_FRAME_BYTES))
        assert closed_with(connection) in (1009, None)  # lost where the rest of the frame was still on its way
        ask(other, "say still here")
        until(other, "response.done")


def test_text_that_is_not_utf_8_closes_1007_and_logs_no_traceback(
    scripted_server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with chat_v1(scripted_server) as connection:
        connection.send(b"\xff\xfe", text=True)
        assert closed_with(connection) == 1007
    assert not tracebacks(caplog)


def test_a_stop_closes_1012(settings: Settings, scripted: ScriptedChat) -> None:
    with serve(create_app(settings, scripted.opened)) as served, chat_v1(served) as connection:
        ask(connection, "wait here")
        until(connection, "response.output_text.delta")
        served.server.should_exit = True
        assert closed_with(connection) == 1012


def test_a_client_that_does_not_read_is_closed_1013_and_disturbs_nobody(scripted_server: Served) -> None:
    with socket.socket() as slow_socket:
        slow_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow_socket.connect(("127.0.0.1", scripted_server.port))
        with chat_v1(scripted_server, sock=slow_socket, max_queue=1, close_timeout=30) as slow:
            ask(slow, "wait with me")
            loud = json.dumps({"type": "session.update", "session": {"instructions": "x" * 1_000_000}})
            with chat_v1(scripted_server, BOB) as other:
                for _ in range(12):
                    slow.send(loud)
                ask(other, "say all is well")
                assert until(other, "response.done")[-1]["response"]["output_text"] == "all is well"
            assert closed_with(slow) == 1013


def test_a_client_that_vanishes_in_mid_reply_leaves_no_task_and_no_traceback(
    settings: Settings, scripted: ScriptedChat, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(settings, linger=0)
    with serve(create_app(settings, scripted.opened)) as served, chat_v1(served, BOB) as watcher:
        tasks = call(served, all_tasks())
        with chat_v1(served) as connection:
            assert json.loads(watcher.recv())["type"] == "presence.joined"
            ask(connection, "wait here")
            until(connection, "response.output_text.delta")
            connection.socket.shutdown(socket.SHUT_RDWR)
        assert json.loads(watcher.recv())["type"] == "presence.left"
        call(served, settled(tasks))
        assert scripted.running == 0
    assert not tracebacks(caplog)


def test_a_reply_whose_connection_is_cut_after_each_delta_is_resumed_without_a_gap(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    request = {"temperature": 1.2, "seed": 5, "max_output_tokens": 60}
    with serve(create_app(settings, opens_tiny)) as served:
        with chat_v1(served) as connection:
            ask(connection, "Hello", **request)
            heard = until(connection, "response.output_text.delta")
            connection.socket.shutdown(socket.SHUT_RDWR)
        while heard[-1]["type"] != "response.done":
            with chat_v1(served) as connection:
                resume(connection, heard[1]["response_id"], len(heard) - 1)
                heard.append(json.loads(connection.recv()))
                connection.socket.shutdown(socket.SHUT_RDWR)
        _, *deltas, done = heard
        assert [delta["sequence_number"] for delta in deltas] == list(range(1, len(deltas) + 1))
        assert "".join(delta["delta"] for delta in deltas) == done["response"]["output_text"]
        assert len(deltas) > 20
        with chat_v1(served) as connection:
            for number in range(len(deltas) + 1):
                resume(connection, heard[1]["response_id"], number)
                assert until(connection, "response.done") == [*deltas[number:], done]
    assert not tracebacks(caplog)


def test_a_hundred_clients_that_ask_and_vanish_leave_no_task_no_slot_and_no_thread(settings: Settings) -> None:
    settings = replace(settings, responses_per_user=200, linger=0)
    with serve(create_app(settings, opens_tiny)) as served, chat_v1(served, BOB) as watcher:
        ask(watcher, "warm up", max_output_tokens=3)
        until(watcher, "response.done")
        tasks, threads = call(served, all_tasks()), set(threading.enumerate())
        with ExitStack() as stack:
            connections = [stack.enter_context(chat_v1(served, max_queue=None)) for _ in range(100)]
            for number, connection in enumerate(connections):
                ask(connection, "Hello", temperature=1)
                until(connection, "response.created")
                if number % 2:
                    connection.socket.shutdown(socket.SHUT_RDWR)
        until(watcher, "presence.left")
        call(served, settled(tasks))
        # Behind all that the others left to the engine's thread; greedy, so that no end of turn is drawn.
        ask(watcher, "Still there?", max_output_tokens=3, temperature=0, conversation="none")
        assert until(watcher, "response.done")[-1]["response"]["status"] == "incomplete"
        chat = served.app.state.chat
        assert chat.free_slots == settings.slots
        assert (chat.admission.free, len(chat.admission.waiting)) == (settings.slots, 0)
        # The database's connections are threads, too: those of a pool of five, and ten more at most.
        database = {thread for thread in threading.enumerate() if "_connection_worker" in thread.name}
        assert set(threading.enumerate()) - database <= threads
        assert len(database) <= 15


# Hostile frames

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)
types = st.sampled_from(["session.update", "response.create", "response.cancel", "response.resume", "x", ""])
names = st.sampled_from(
    [
        "input",
        "conversation",
        "after",
        "temperature",
        "stop",
        "seed",
        "top_p",
        "instructions",
        "role",
        "content",
        "response_id",
    ]
)
shaped = st.fixed_dictionaries(
    {"type": types | json_values},
    optional={
        "event_id": json_values,
        "session": st.dictionaries(names, json_values, max_size=3) | json_values,
        "response": st.dictionaries(names, json_values, max_size=3) | json_values,
        "response_id": json_values,
        "starting_after": json_values,
    },
)
SPECIAL: dict[str | bytes, str | bytes] = {  # by name, since hypothesis prints what it draws
    "deep list": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "long number": '{"type":"response.create","response":{"seed":' + "9" * 5_000 + "}}",
    "infinity": '{"type":"session.update","session":{"temperature":1e999}}',
    "not a number": '{"type":"session.update","session":{"temperature":NaN}}',
    "lone surrogate": '{"type":"session.update","session":{"instructions":"\\ud800"}}',
    "lone surrogate as type": '{"type":"\\ud800"}',
    "two MiB of text": "x" * (2 * FRAME_BYTES),
    "two MiB of bytes": b"\xff" * 2 * FRAME_BYTES,
}
frames = st.one_of(
    shaped.map(json.dumps),
    shaped.map(lambda event: json.dumps(event, ensure_ascii=False).encode(errors="surrogatepass")),
    json_values.map(json.dumps),
    st.text(max_size=60),
    st.binary(max_size=60),
    st.sampled_from(sorted(map(str, SPECIAL))),
)


class Target:
    """A connection to the server under fire, made anew when it is closed."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._stack = ExitStack()
        self.connect()

    def connect(self) -> None:
        self._stack.close()
        self.connection = self._stack.enter_context(chat_v1(self._served))

    def close(self) -> None:
        self._stack.close()

    def fire(self, frame: str | bytes, as_text: bool) -> list[Json] | int | None:
        """What the server answers to a frame, a reply to its end, before the next one; or the code it closes with."""
        try:
            self.connection.send(frame, text=as_text if isinstance(frame, bytes) else None)
            self.connection.send('{"type": "response.cancel", "event_id": "mark", "response_id": "none"}')
            answers: list[Json] = []
            awaited = {"mark", "reply"} if isinstance(parsed(frame), events.ResponseCreate) else {"mark"}
            while awaited:
                answer = json.loads(self.connection.recv())
                if answer["type"] == "error" and answer["error"].get("event_id") == "mark":
                    awaited.discard("mark")
                    continue
                answers.append(answer)
                if answer["type"] in ("response.done", "error"):
                    awaited.discard("reply")
            return answers
        except ConnectionClosed as closed:
            self.connect()
            return closed.rcvd.code if closed.rcvd else None


@pytest.fixture
def target(scripted_server: Served) -> Iterator[Target]:
    target = Target(scripted_server)
    yield target
    target.close()


def parsed(frame: str | bytes) -> events.ClientEvent | None:
    try:
        return events.parse(frame)
    except events.InvalidEvent:
        return None


@hypothesis_settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(frames, st.booleans()), min_size=20, max_size=20))
def test_ten_thousand_hostile_frames_get_each_its_error_and_none_a_traceback(
    target: Target, caplog: pytest.LogCaptureFixture, volley: list[tuple[str | bytes, bool]]
) -> None:
    for drawn, as_text in volley:
        frame = SPECIAL.get(drawn, drawn)
        answers = target.fire(frame, as_text)
        if answers == 1009:
            assert len(frame) > FRAME_BYTES
        elif isinstance(answers, int | None):
            assert answers == 1007  # a text frame that is not UTF-8 ends a WebSocket by its own rules
            assert isinstance(frame, bytes)
            assert as_text
        elif parsed(frame) is None:
            assert [answer["type"] for answer in answers] == ["error"]
            assert answers[0]["error"]["type"] == "invalid_request_error"
    assert not tracebacks(caplog)
    caplog.clear()


# Secrets and the log


def test_no_secret_reaches_the_log_at_any_level(
    settings: Settings, scripted: ScriptedChat, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(1)
    headers, protocols = {"Authorization": f"Bearer {ANN}"}, [Subprotocol("chat.v1"), Subprotocol(encoded(ANN))]
    ways: list[tuple[str, Json]] = [
        (f"?userid=ann&secret={quote(ANN)}", {}),
        (f"?userid=ann&s%65cret={quote(ANN)}", {}),
        ("", {"additional_headers": headers}),
        ("", {"subprotocols": protocols}),
    ]
    with serve(create_app(settings, scripted.opened), log_level="trace") as served:
        for query, options in ways:
            with connect(served.ws + query, **options) as connection:
                connection.send("say yes")
                assert connection.recv() != "authentication failed"
        with httpx2.Client() as client:
            client.post(served.url + "/login", data={"secret": ANN})
            client.get(served.url + f"/?secret={quote(ANN)}", headers=headers)
    clients = ("websockets.client", "httpx2", "httpcore2")  # in this process, and free to log what they send
    texts = [record.getMessage() for record in caplog.records if not record.name.startswith(clients)]
    assert any("/ws" in text for text in texts)
    for secret in (ANN, quote(ANN), encoded(ANN).removeprefix("bearer.")):
        assert not [text for text in texts if secret in text]
