"""A real server: close codes, frame limits, slow and vanished clients, hostile frames, and its log."""

from __future__ import annotations

import json
import math
import random
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.protocols.client import Client
from models.protocols.responses.chat_session import ChatSession
from models.settings import Settings
from models.validation import Json
from models.web.serving import UVICORN_FRAME_BYTES
from models.web.session_socket import FRAME_BYTES
from server import create_app
from tests.support.client import ANN, BOB, ENDS, bearer, bearer_subprotocol, text_of
from tests.support.fake_client import FakeClient
from tests.support.fake_responses import FakeResponses
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served, serve
from tests.support.sockets import (
    all_tasks,
    ask,
    call,
    chat_v2,
    close_code,
    events_until,
    events_until_done,
    resume,
    server_tracebacks,
    wait_for_other_tasks,
)
from tests.support.tiny import opens_tiny


def test_a_real_client_sees_the_close_codes(scripted_server: Served) -> None:
    with connect(scripted_server.ws + "?secret=wrong") as plain:
        assert plain.recv() == "authentication failed"
        assert close_code(plain) == 1008
    with connect(scripted_server.ws, subprotocols=[Subprotocol("chat.v2")]) as connection:
        assert json.loads(connection.recv())["error"]["code"] == "invalid_credentials"
        assert close_code(connection) == 4401


def test_wrong_secrets_in_parallel_are_counted_one_by_one(scripted_server: Served) -> None:
    def guess(number: int) -> str:
        with connect(f"{scripted_server.ws}?secret=wrong{number}") as connection:
            return str(connection.recv())

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(guess, range(40)))
    assert answers.count("authentication failed") == 10


def test_the_subprotocol_with_the_secret_is_not_sent_back(scripted_server: Served) -> None:
    protocols = [Subprotocol("chat.v2"), Subprotocol(bearer_subprotocol(ANN))]
    with connect(scripted_server.ws, subprotocols=protocols) as connection:
        assert connection.subprotocol == "chat.v2"
        assert json.loads(connection.recv())["session"]["user"] == "ann"


@pytest.mark.parametrize(
    "frame", ["x" * (2 * FRAME_BYTES), "é" * FRAME_BYTES, b"\xff" * 2 * FRAME_BYTES], ids=["ascii", "utf-8", "bytes"]
)
def test_a_frame_over_the_limit_closes_with_1009(scripted_server: Served, frame: str | bytes) -> None:
    with chat_v2(scripted_server) as connection:
        connection.send(frame)
        assert close_code(connection) == 1009
    with chat_v2(scripted_server) as connection:
        ask(connection, "say still here")
        events_until_done(connection)


def test_a_frame_over_uvicorns_limit_ends_only_its_connection(scripted_server: Served) -> None:
    with chat_v2(scripted_server) as connection, chat_v2(scripted_server, BOB) as other:
        with suppress(ConnectionClosed):
            connection.send("x" * (2 * UVICORN_FRAME_BYTES))
        assert close_code(connection) in (1009, None)  # None where the rest of the frame was still on its way
        ask(other, "say still here")
        events_until_done(other)


def test_a_text_frame_that_is_not_utf_8_closes_with_1007(
    scripted_server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with chat_v2(scripted_server) as connection:
        connection.send(b"\xff\xfe", text=True)
        assert close_code(connection) == 1007
    assert not server_tracebacks(caplog)


def test_the_end_of_the_server_closes_with_1012(settings: Settings, scripted: ScriptedChat) -> None:
    with serve(create_app(settings, scripted.opened)) as served, chat_v2(served) as connection:
        ask(connection, "wait here")
        events_until(connection, "response.output_text.delta")
        served.server.stop()
        assert close_code(connection) == 1012


def test_a_client_that_does_not_read_is_closed_with_1013_alone(scripted_server: Served) -> None:
    with socket.socket() as slow_socket:
        slow_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow_socket.connect(("127.0.0.1", scripted_server.port))
        with chat_v2(scripted_server, sock=slow_socket, max_queue=1, close_timeout=30) as slow:
            ask(slow, "wait with me")
            with chat_v2(scripted_server, BOB) as other:
                for number in range(50):  # each response tells its instructions three times
                    ask(slow, "say it", instructions="😀" * 30_000, store=False, stream_id=str(number))
                ask(other, "say all is well")
                assert text_of(events_until_done(other)[-1]["response"]) == "all is well"
            assert close_code(slow) == 1013


def test_a_client_that_vanishes_in_a_reply_leaves_no_task_or_traceback(
    settings: Settings, scripted: ScriptedChat, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(settings, linger=0)
    with serve(create_app(settings, scripted.opened)) as served, chat_v2(served, BOB) as watcher:
        tasks = call(served, all_tasks())
        with chat_v2(served) as connection:
            assert json.loads(watcher.recv())["type"] == "parley.presence.joined"
            ask(connection, "wait here")
            events_until(connection, "response.output_text.delta")
            connection.socket.shutdown(socket.SHUT_RDWR)
        assert json.loads(watcher.recv())["type"] == "parley.presence.left"
        call(served, wait_for_other_tasks(tasks))
        assert scripted.running == 0
    assert not server_tracebacks(caplog)


def test_a_reply_that_is_cut_off_after_each_delta_resumes_without_a_gap(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"temperature": 1.2, "seed": 5, "max_output_tokens": 200}  # under load, tokens share deltas
    with serve(create_app(settings, opens_tiny)) as served:
        with chat_v2(served) as connection:
            ask(connection, "Hello", **options)
            events = events_until(connection, "response.output_text.delta")
            connection.socket.shutdown(socket.SHUT_RDWR)
        id = events[0]["response"]["id"]
        while events[-1]["type"] not in ENDS:
            with chat_v2(served) as connection:
                resume(connection, id, len(events) - 1)
                events.append(json.loads(connection.recv()))
                connection.socket.shutdown(socket.SHUT_RDWR)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        deltas = [event["delta"] for event in events if "delta" in event]
        assert "".join(deltas) == text_of(events[-1]["response"])
        assert len(deltas) > 20
        with chat_v2(served) as connection:
            for number in range(-1, len(events) - 1):
                resume(connection, id, number)
                assert events_until_done(connection) == events[number + 1 :]
    assert not server_tracebacks(caplog)


@pytest.mark.slow
def test_a_hundred_clients_that_vanish_leave_no_task_slot_or_thread(settings: Settings) -> None:
    settings = replace(settings, responses_per_user=200, linger=0)
    with serve(create_app(settings, opens_tiny)) as served, chat_v2(served, BOB) as watcher:
        ask(watcher, "warm up", max_output_tokens=3)
        events_until_done(watcher)
        tasks, threads = call(served, all_tasks()), set(threading.enumerate())
        with ExitStack() as stack:
            connections = [stack.enter_context(chat_v2(served, max_queue=None)) for _ in range(100)]
            for number, connection in enumerate(connections):
                ask(connection, "Hello", temperature=1)
                events_until(connection, "response.created")
                if number % 2:
                    connection.socket.shutdown(socket.SHUT_RDWR)
        events_until(watcher, "parley.presence.left")
        call(served, wait_for_other_tasks(tasks))
        # The engine's thread runs this after everything that the others left there. It is greedy, so it does not stop.
        ask(watcher, "Still there?", max_output_tokens=3, temperature=0)
        assert events_until_done(watcher)[-1]["response"]["status"] == "incomplete"
        state = served.app.state
        assert state.chat._engine.scheduler.free_slots == settings.slots
        assert (state.admission.free, len(state.admission.waiting)) == (settings.slots, 0)
        # The connections to the database are threads too: a pool of five, and at most ten more.
        database = {thread for thread in threading.enumerate() if "_connection_worker" in thread.name}
        assert set(threading.enumerate()) - database <= threads
        assert len(database) <= 15


# Hostile frames

EVENTS: list[Json] = [
    {"type": "response.create", "stream_id": "1", "input": "say yes", "stop": ["END"], "instructions": "Hi", "seed": 5},
    {"type": "response.create", "input": "say yes", "store": False, "previous_response_id": "resp_1", "include": ["x"]},
    {"type": "response.create", "input": "say yes", "conversation": {"id": "conv_1", "after": "msg_1"}},
    {
        "type": "response.create",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "say yes"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "say yes"},
        ],
        "conversation": "new",
        "metadata": {"a": "b"},
        "top_p": 0.5,
    },
    {
        "type": "response.create",
        "input": [{"type": "item_reference", "id": "msg_1"}],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "reasoning": {"effort": "low"},
    },
    {"type": "parley.response.cancel", "stream_id": "4", "response_id": "resp_1"},
    {"type": "parley.response.resume", "stream_id": "5", "response_id": "resp_1", "starting_after": 0},
]
CODES_OF_VALID_EVENTS = (
    *("response_not_found", "previous_response_not_found", "conversation_not_found", "item_not_found"),
    *("conversation_locked", "too_many_responses"),
)
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 0.5, 2**70, 10**400, math.inf, math.nan),
    *("", " ", "x", "new", "none", "\0", "\u2028", "\ud800", "é" * 300, "$.session", "`", "response.create"),
    *([], {}, [[]], [None], ["x"] * 9, {"x": {"x": {}}}, {"role": "user", "content": "Hi"}, {"type": "x"}),
]


def spoiled(value: Any, chance: random.Random) -> Any:
    """A JSON value with one part of it replaced, renamed or removed."""
    if isinstance(value, list) and value:
        return [*value[:-1], spoiled(value[-1], chance)]
    if not isinstance(value, dict) or not value or chance.random() < 0.03:
        text = "".join(map(chr, chance.choices(range(0x3000), k=4)))
        return chance.choice([*VALUES, text, chance.uniform(-3, 3), chance.randint(-3, 3)])
    nested = [name for name in value if isinstance(value[name], dict | list)]
    name = chance.choice(nested if nested and chance.random() < 0.7 else list(value))
    rest = {other: value[other] for other in value if other != name}
    fate = chance.random()
    if fate < 0.1:
        return rest
    if fate < 0.2:
        return rest | {chance.choice(["x", "type", "\ud800", ""]): value[name]}
    return rest | {name: spoiled(value[name], chance)}


def hostile_frame(chance: random.Random) -> str | bytes:
    """A client event with something wrong, as text or bytes. It may be no JSON at all."""
    event: Any = chance.choice(EVENTS)
    for _ in range(chance.randint(1, 3)):
        event = spoiled(event, chance)
    frame = json.dumps(event)
    fate = chance.random()
    if fate < 0.05:
        frame = frame[: chance.randrange(len(frame))]
    elif fate < 0.1:
        frame = "".join(chance.choices(frame, k=len(frame)))
    elif fate < 0.15:
        return chance.randbytes(chance.randrange(60))
    return frame if chance.random() < 0.5 else frame.encode()


class ParsingSession(ChatSession):
    """A session that parses events, and does nothing that they ask for."""

    def __init__(self, client: Client) -> None:
        super().__init__(FakeResponses(), ModelList([ModelInfo("scripted", 4096, Options())]), "ann", {}, client)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        coroutine.close()


def expected_error(frame: str | bytes) -> Json | None:
    """The error that a frame must get; None for a valid event."""
    client = FakeClient()
    session = ParsingSession(client)
    client.sent.get_nowait()
    session.receive(frame)
    errors: list[Json] = [client.sent.get_nowait() for _ in range(client.sent.qsize())]
    return next((error for error in errors if error["error"]["code"] not in CODES_OF_VALID_EVENTS), None)


def errors_of(connection: ClientConnection, *frames: str | bytes) -> list[Json]:
    """Send frames at once. Returns the errors for those that are no valid events, in the order of the frames."""
    for frame in frames:
        connection.send(frame)
    connection.send('{"type": "parley.response.cancel", "stream_id": "last", "response_id": "none"}')
    errors = [event for event in events_until(connection, "error") if event["type"] == "error"]
    while errors[-1].get("stream_id") != "last":
        errors += [event for event in events_until(connection, "error") if event["type"] == "error"]
    return [error for error in errors if error["error"]["code"] not in CODES_OF_VALID_EVENTS]


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param("[" * 100_000, id="deep list"),
        pytest.param('{"a":' * 100_000, id="deep object"),
        pytest.param('{"type":"response.create","input":"x","seed":' + "9" * 5_000 + "}", id="number of 5,000 digits"),
        pytest.param('{"type":"response.create","input":"x","temperature":1e999}', id="infinity"),
        pytest.param('{"type":"response.create","input":"x","temperature":NaN}', id="not a number"),
        pytest.param('{"type":"response.create","input":"\\ud800"}', id="lone surrogate"),
        pytest.param('{"type":"\\ud800"}', id="lone surrogate as type"),
    ],
)
def test_an_extreme_frame_gets_an_error(scripted_server: Served, caplog: pytest.LogCaptureFixture, frame: str) -> None:
    with chat_v2(scripted_server) as connection:
        errors = errors_of(connection, frame, frame.encode())
        assert [error["error"]["type"] for error in errors] == 2 * ["invalid_request_error"]
        assert errors == [expected_error(frame), expected_error(frame.encode())]
    assert not server_tracebacks(caplog)


def ask_until_answered(connection: ClientConnection) -> None:
    """Ask for a reply until it comes: earlier requests may fill the connection."""
    ask(connection, "say still here")
    while True:
        event = json.loads(connection.recv())
        if event["type"] in ENDS and text_of(event["response"]) == "still here":
            return
        if event["type"] == "error" and event["error"]["code"] == "too_many_responses":
            events_until_done(connection)  # one request less waits
            ask(connection, "say still here")


@pytest.mark.slow
def test_each_of_ten_thousand_hostile_frames_gets_its_error(
    scripted_server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(0)
    with chat_v2(scripted_server) as connection:
        for _ in range(625):
            frames = [hostile_frame(chance) for _ in range(16)]  # fewer bad frames in a row than close a connection
            assert errors_of(connection, *frames) == [error for frame in frames if (error := expected_error(frame))]
        ask_until_answered(connection)
    assert not server_tracebacks(caplog)


# Secrets and the log


def test_no_secret_is_logged_at_any_level(
    settings: Settings, scripted: ScriptedChat, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(1)
    protocols = [Subprotocol("chat.v2"), Subprotocol(bearer_subprotocol(ANN))]
    ways: list[tuple[str, Json]] = [
        (f"?userid=ann&secret={quote(ANN)}", {}),
        (f"?userid=ann&s%65cret={quote(ANN)}", {}),
        ("", {"additional_headers": bearer()}),
        ("", {"subprotocols": protocols}),
    ]
    with serve(create_app(settings, scripted.opened), log_level="trace") as served:
        for query, options in ways:
            with connect(served.ws + query, **options) as connection:
                connection.send("say yes")
                assert connection.recv() != "authentication failed"
        with httpx2.Client() as client:
            client.post(served.url + "/login", data={"secret": ANN})
            client.get(served.url + f"/?secret={quote(ANN)}", headers=bearer())
    clients = ("websockets.client", "httpx2", "httpcore2")  # they run in this process, and log what they send
    texts = [record.getMessage() for record in caplog.records if not record.name.startswith(clients)]
    assert any("/ws" in text for text in texts)
    for secret in (ANN, quote(ANN), bearer_subprotocol(ANN).removeprefix("bearer.")):
        assert not [text for text in texts if secret in text]
