"""The page /metrics, and what each kind of request changes on it."""

from __future__ import annotations

import asyncio
import socket as sockets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.chat_request import ChatRequest
from models.generation.admission import Admission
from models.language.engine_chat import EngineChat
from models.language.events import Done
from models.ops.metrics import GAUGES
from models.settings import Settings
from models.store.item import node_id
from models.validation import Json
from models.web.chat_socket import ChatSocket
from server import create_app
from tests.support.client import BOB, ask, bearer, complete, events_until_done, log_in, reply, until
from tests.support.samples import Samples, changes, read_samples
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served, serve
from tests.support.sockets import ask as ask_server, call, chat_v2, close_code, events_until as server_events_until
from tests.support.tiny import opens_tiny


@pytest.fixture
def client(settings: Settings, scripted: ScriptedChat) -> Iterator[TestClient]:
    """A client of an app over the scripted chat."""
    with TestClient(create_app(settings, scripted.opened)) as client:
        yield client


@pytest.fixture
def chat_socket(client: TestClient) -> Iterator[Any]:
    """A WebSocket of ann's by chat.v2."""
    with client.websocket_connect("/ws", ["chat.v2"], headers=bearer()) as socket:
        until(socket, "parley.session.created")
        yield socket


def get_samples(client: TestClient) -> Samples:
    return read_samples(client.get("/metrics").text)


def get_server_samples(served: Served) -> Samples:
    return read_samples(httpx2.get(f"{served.url}/metrics").text)


# The page


def test_the_page_is_prometheus_text_with_all_gauges(client: TestClient) -> None:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] in (
        "text/plain; version=0.0.4; charset=utf-8",
        "text/plain; version=1.0.0; charset=utf-8",
    )
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert {f"parley_{name}" for name in GAUGES} <= families.keys()


def test_only_the_slots_are_not_0_at_the_start(client: TestClient) -> None:
    assert {name: value for name, value in get_samples(client).items() if value} == {"num_slots": 100}


def test_reading_the_page_changes_nothing(client: TestClient) -> None:
    assert get_samples(client) == get_samples(client)


def test_two_apps_in_one_process_share_no_numbers(settings: Settings, client: TestClient) -> None:
    with TestClient(create_app(replace(settings, data=settings.data / "other"), ScriptedChat().opened)) as other:
        before = get_samples(other)
        assert complete(client, "say one").status_code == 200
        log_in(client, "wrong")
        assert get_samples(client)["responses_total completed stop"] == 1
        assert get_samples(other) == before


# Replies

FIVE_DELTAS = {
    "time_to_first_token_seconds_count": 1,
    "inter_token_latency_seconds_count": 4,
    "request_queue_time_seconds_count": 1,
    "e2e_request_latency_seconds_count": 1,
    "prompt_tokens_total": 1,
    "generation_tokens_total": 5,
    "responses_total completed stop": 1,
}


def test_a_reply_by_websocket_counts_its_latencies_tokens_and_status(client: TestClient, chat_socket: Any) -> None:
    before = get_samples(client)
    ask(chat_socket, "say it in five pieces")
    events = events_until_done(chat_socket)
    usage = events[-1]["response"]["usage"]
    assert sum("delta" in event for event in events) == usage["output_tokens"] == 5
    assert usage["input_tokens"] == 1
    assert changes(before, get_samples(client)) == FIVE_DELTAS


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_chat_completion_counts_the_same(client: TestClient, stream: bool) -> None:
    before = get_samples(client)
    assert complete(client, "say it in five pieces", stream=stream).status_code == 200
    assert changes(before, get_samples(client)) == FIVE_DELTAS


def test_a_reply_in_plain_text_counts_too(client: TestClient) -> None:
    with client.websocket_connect("/ws", headers=bearer()) as socket:
        for number in range(3):
            socket.send_text("say it")
            assert socket.receive_text() == "it"
            socket.send_text("break")  # its end is told
            assert socket.receive_text().startswith("error: ")
            samples = get_samples(client)
            assert samples["responses_total completed stop"] == number + 1
            assert samples["responses_total failed server_error"] == number + 1


def test_replies_are_counted_by_status_and_reason(client: TestClient, scripted: ScriptedChat, chat_socket: Any) -> None:
    for message in ("say one", "break it", "say two"):
        ask(chat_socket, message)
        events_until_done(chat_socket)
    ask(chat_socket, "wait")
    until(chat_socket, "response.created")
    chat_socket.send_json({"type": "parley.response.cancel"})
    events_until_done(chat_socket)
    ask(chat_socket, "say three", conversation="conv_of_nobody")
    assert until(chat_socket, "error")["error"]["code"] == "conversation_not_found"
    scripted.admission.per_user = 0
    for _ in range(2):
        ask(chat_socket, "say four")
        assert until(chat_socket, "error")["error"]["code"] == "too_many_responses"
    scripted.admission.close()
    ask(chat_socket, "say five")
    assert until(chat_socket, "error")["error"]["code"] == "server_shutdown"
    assert complete(client, "say six").status_code == 503
    counts = {name: value for name, value in get_samples(client).items() if name.startswith("responses")}
    assert counts == {
        "responses_total completed stop": 2,
        "responses_total failed server_error": 1,
        "responses_total cancelled client_cancelled": 1,
        "responses_total refused conversation_not_found": 1,
        "responses_total refused too_many_responses": 2,
        "responses_total refused server_shutdown": 2,
    }


def test_a_refused_reply_has_no_latencies_and_no_tokens(client: TestClient, scripted: ScriptedChat) -> None:
    scripted.admission.per_user = 0
    before = get_samples(client)
    assert complete(client, "say one").status_code == 429
    assert changes(before, get_samples(client)) == {"responses_total refused too_many_responses": 1}


def test_a_reply_in_an_unknown_conversation_has_no_latencies(client: TestClient, chat_socket: Any) -> None:
    before = get_samples(client)
    ask(chat_socket, "say one", conversation="conv_of_nobody")
    until(chat_socket, "error")
    assert changes(before, get_samples(client)) == {"responses_total refused conversation_not_found": 1}


def test_replies_that_nobody_follows_are_counted_as_disconnected(settings: Settings, scripted: ScriptedChat) -> None:
    with serve(create_app(replace(settings, linger=0), scripted.opened)) as served:
        with chat_v2(served) as connection:
            ask_server(connection, "wait here")
            server_events_until(connection, "response.output_text.delta")
        call(served, wait_until_idle(scripted))
        body = {"model": "scripted", "messages": [{"role": "user", "content": "wait here"}], "stream": True}
        url = f"{served.url}/v1/chat/completions"
        with httpx2.stream("POST", url, json=body, headers=bearer(), timeout=None) as response:
            next(response.iter_lines())
        call(served, wait_until_idle(scripted))
        samples = get_server_samples(served)
    assert samples["responses_total cancelled client_disconnected"] == 2
    assert samples["num_requests_running"] == 0


async def wait_until_idle(scripted: ScriptedChat) -> None:
    """Wait until no reply is running."""
    if scripted.running:
        await scripted.idle.wait()


# What is in use


def test_running_and_waiting_replies_are_counted(settings: Settings, scripted: ScriptedChat) -> None:
    scripted.admission = Admission(slots=1, queue=9, per_user=9)
    with TestClient(create_app(settings, scripted.opened)) as client:
        with (
            client.websocket_connect("/ws", ["chat.v2"], headers=bearer()) as ann,
            client.websocket_connect("/ws", ["chat.v2"], headers=bearer(BOB)) as bob,
        ):
            for socket in (ann, bob):
                until(socket, "parley.session.created")
            ask(ann, "wait one", stream_id="first")
            first = node_id(until(ann, "response.output_text.delta")["item_id"])
            assert running_and_waiting(client) == (1, 0)
            ask(ann, "wait two", stream_id="second")
            second = until(ann, "parley.queue")["response_id"]
            assert running_and_waiting(client) == (1, 1)
            ask(bob, "wait three")
            third = until(bob, "parley.queue")["response_id"]
            assert running_and_waiting(client) == (1, 2)
            cancel(ann, second)
            assert running_and_waiting(client) == (1, 1)
            cancel(ann, first)
            assert running_and_waiting(client) == (1, 0)
            for _ in range(2):
                until(bob, "response.output_text.delta")
            cancel(bob, third)
            assert running_and_waiting(client) == (0, 0)
        samples = get_samples(client)
    assert samples["responses_total cancelled client_cancelled"] == 3
    assert samples["request_queue_time_seconds_count"] == 2, "one never had a slot"
    assert samples["e2e_request_latency_seconds_count"] == 3
    assert (samples["prompt_tokens_total"], samples["generation_tokens_total"]) == (2, 1 + 2), "it read no prompt"


def running_and_waiting(client: TestClient) -> tuple[float, float]:
    samples = get_samples(client)
    return samples["num_requests_running"], samples["num_requests_waiting"]


def cancel(socket: Any, response_id: str) -> None:
    """Cancel a reply and wait for its end."""
    socket.send_json({"type": "parley.response.cancel", "response_id": response_id})
    events_until_done(socket)


def test_a_full_wait_queue_is_counted_as_a_refusal(settings: Settings, scripted: ScriptedChat) -> None:
    scripted.admission = Admission(slots=0, queue=0, per_user=9)
    with TestClient(create_app(settings, scripted.opened)) as client:
        assert complete(client, "say one").status_code == 503
        samples = get_samples(client)
    assert (samples["responses_total refused queue_full"], samples["num_slots"]) == (1, 0)


def test_slots_and_cache_usage_are_those_of_the_moment(client: TestClient, scripted: ScriptedChat) -> None:
    scripted.admission.shrink(7)
    scripted.cache_usage = 0.25
    samples = get_samples(client)
    assert (samples["num_slots"], samples["kv_cache_usage_perc"]) == (7, 0.25)


def test_only_open_connections_of_users_are_counted(client: TestClient) -> None:
    assert get_samples(client)["sockets_open"] == 0
    with client.websocket_connect("/ws", ["chat.v2"], headers=bearer()) as first:
        until(first, "parley.session.created")
        assert get_samples(client)["sockets_open"] == 1
        with client.websocket_connect("/ws", ["chat.v2"], headers=bearer(BOB)) as second:
            until(second, "parley.session.created")
            assert get_samples(client)["sockets_open"] == 2
            with client.websocket_connect("/ws", headers=bearer(BOB)) as third:
                third.send_text("say here")
                assert third.receive_text() == "here"
                assert get_samples(client)["sockets_open"] == 3
        with client.websocket_connect("/ws", ["chat.v2"]) as stranger:
            assert stranger.receive_json()["type"] == "error"
            assert get_samples(client)["sockets_open"] == 1
    assert get_samples(client)["sockets_open"] == 0


# Failed logins and slow clients


def test_wrong_credentials_of_every_kind_are_counted(client: TestClient) -> None:
    def failures() -> float:
        return get_samples(client)["login_failures_total"]

    log_in(client)
    assert client.get("/v1/models", headers=bearer()).status_code == 200
    assert failures() == 0
    log_in(client, "wrong")
    assert client.get("/v1/models", headers=bearer("wrong")).status_code == 401
    assert failures() == 2
    for url, protocols in (("/ws?secret=wrong", None), ("/ws?secret=wrong", ["chat.v2"]), ("/ws", ["bearer.d3Jvbmc"])):
        with client.websocket_connect(url, protocols, headers={"Cookie": ""}) as socket:
            socket.receive_text()
    assert failures() == 5


def test_a_request_without_credentials_is_not_a_failed_login(client: TestClient) -> None:
    assert client.get("/v1/models").status_code == 401
    assert get_samples(client)["login_failures_total"] == 0


def test_a_client_that_does_not_read_is_closed_and_counted(scripted_server: Served) -> None:
    with sockets.socket() as slow_socket:
        slow_socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        slow_socket.connect(("127.0.0.1", scripted_server.port))
        with chat_v2(scripted_server, sock=slow_socket, max_queue=1, close_timeout=30) as slow:
            assert get_server_samples(scripted_server)["slow_clients_closed_total"] == 0
            for _ in range(50):  # each response tells its instructions three times
                ask_server(slow, "say it", instructions="😀" * 30_000, store=False)
            assert close_code(slow) == 1013
            assert get_server_samples(scripted_server)["slow_clients_closed_total"] == 1


async def connect_without_reading(app: Starlette, headers: list[tuple[bytes, bytes]]) -> None:
    """Connect to an app by chat.v2, and never read what it sends."""
    events: asyncio.Queue[Json] = asyncio.Queue()
    events.put_nowait({"type": "websocket.connect"})

    async def send(message: Mapping[str, Any]) -> None:
        if message["type"] != "websocket.accept":
            await asyncio.Event().wait()

    scope = {
        "type": "websocket",
        "path": "/ws",
        "raw_path": b"/ws",
        "query_string": b"",
        "headers": headers,
        "client": ("10.0.0.1", 5),
        "subprotocols": ["chat.v2"],
    }
    await app(scope, events.get, send)


@pytest.mark.parametrize("known", [True, False], ids=["user", "stranger"])
def test_a_client_that_reads_nothing_is_counted_even_without_a_login(
    settings: Settings, scripted: ScriptedChat, caplog: pytest.LogCaptureFixture, known: bool
) -> None:
    class ImpatientSocket(ChatSocket):
        unsent_seconds = 0

    app = create_app(settings, scripted.opened)
    app.router.routes.insert(0, WebSocketRoute("/ws", ImpatientSocket))
    headers = [(name.lower().encode(), value.encode()) for name, value in bearer().items()] if known else []
    with TestClient(app) as client:
        assert client.portal
        client.portal.call(connect_without_reading, app, headers)
        assert get_samples(client)["slow_clients_closed_total"] == 1
        assert get_samples(client)["sockets_open"] == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# A real engine


@pytest.fixture
def tiny_client(settings: Settings) -> Iterator[TestClient]:
    """A client of the app over a tiny model."""
    with TestClient(create_app(settings, opens_tiny)) as client:
        yield client


def test_counted_tokens_are_those_of_the_usage_and_steps_are_timed(tiny_client: TestClient) -> None:
    with tiny_client.websocket_connect("/ws", ["chat.v2"], headers=bearer()) as socket:
        until(socket, "parley.session.created")
        usages = []
        previous = None
        for message in ("Hello there", "And again", "And once more"):
            response = reply(socket, message, temperature=0, max_output_tokens=7, previous_response_id=previous)
            previous = response["id"]
            usages.append(response["usage"])
    samples = get_samples(tiny_client)
    assert samples["prompt_tokens_total"] == sum(usage["input_tokens"] for usage in usages) > 0
    assert (
        samples["prompt_tokens_cached_total"]
        == sum(usage["input_tokens_details"]["cached_tokens"] for usage in usages)
        > 0
    )
    assert samples["generation_tokens_total"] == sum(usage["output_tokens"] for usage in usages) > 0
    assert samples["engine_step_seconds_count"] >= samples["generation_tokens_total"], "one reply at a time"
    assert 0 < samples["engine_step_seconds_sum"] < samples["e2e_request_latency_seconds_sum"]
    assert samples["time_to_first_token_seconds_sum"] < samples["e2e_request_latency_seconds_sum"]
    assert (samples["num_slots"], samples["kv_cache_usage_perc"], samples["num_requests_running"]) == (4, 0, 0)


def test_a_cut_reply_and_a_prompt_that_is_too_long_are_told_apart(tiny_client: TestClient) -> None:
    for message, status in (("Hi", 200), ("x" * 300, 400)):
        response = complete(tiny_client, message, model="SmolLM2-135M-Instruct", max_tokens=1)
        assert response.status_code == status
    samples = get_samples(tiny_client)
    assert samples["responses_total incomplete max_output_tokens"] == 1
    assert samples["responses_total refused context_length_exceeded"] == 1


@pytest.mark.anyio
async def test_cache_usage_is_the_share_of_tokens_in_the_slots(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    shares: list[float] = []

    def on_step(seconds: float) -> None:
        shares.append(chat.cache_usage)

    async with EngineChat.opened(tokenizer, llama, settings, on_step=on_step) as chat:
        options = chat.models.default.defaults.updated({"max_output_tokens": 5, "temperature": 0})
        reply = await chat.prepare(ChatRequest("ann", [{"role": "user", "content": "Hi"}], options))
        assert chat.cache_usage == 0
        events = [event async for event in reply.events()]
        assert chat.cache_usage == 0
    assert isinstance(events[-1], Done)
    steps, room = reply.usage.output_tokens, settings.slots * (settings.context or 0)
    assert steps > 1
    # After the last step the reply has ended.
    assert shares[: steps - 1] == [(reply.usage.input_tokens + step) / room for step in range(steps - 1)]
