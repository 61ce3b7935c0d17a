from __future__ import annotations

import asyncio
import json
import socket as sockets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.admission import Admission, Ticket
from models.chat import Chat
from models.item import Message
from models.metrics import Metrics
from models.options import Options
from models.reply import Delta, Done, Event, MessagesRefused, Queued, Started, Usage
from models.settings import Settings
from server import ChatSocket, create_app
from tests.conftest import BOB
from tests.scripted import ScriptedChat
from tests.serving import Served, serve
from tests.test_server import Json, bearer, log_in, until_done
from tests.test_uvicorn import ask as ask_by_wire, call, chat_v1, closed_with, until as until_by_wire
from tests.tiny import opens_tiny

HISTOGRAMS = ["time_to_first_token", "inter_token_latency", "request_queue_time", "e2e_request_latency", "engine_step"]
COUNTERS = ["prompt_tokens", "prompt_tokens_cached", "generation_tokens", "responses"]
COUNTERS += ["login_failures", "slow_clients_closed"]
LABELS = ["status", "reason"]
GAUGES = ["num_requests_running", "num_requests_waiting", "num_slots", "kv_cache_usage_perc", "sockets_open"]

Look = dict[str, float]


def read(text: str) -> Look:
    """Every sample by its name, behind which stand status and reason; no times of creation."""
    return {
        " ".join(
            [sample.name.removeprefix("parley_"), *map(sample.labels.__getitem__, LABELS[: len(sample.labels)])]
        ): (sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def look(client: TestClient) -> Look:
    return read(client.get("/metrics").text)


def moved(before: Look, after: Look) -> Look:
    """By how much samples differ, times left out."""
    names = [name for name in after if not name.endswith("_sum")]
    return {name: after[name] - before.get(name, 0) for name in names if after[name] != before.get(name, 0)}


class QueueingChat(ScriptedChat):
    """Has one slot, and room for nine who wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(slots=1, queue=9, per_user=9)

    async def reply(
        self, ticket: Ticket, messages: Sequence[Message], options: Options, whole: bool = False
    ) -> AsyncGenerator[Event, None]:
        async with aclosing(super().reply(ticket, messages, options)) as reply:
            async for event in reply:
                yield event
                if isinstance(event, Started):
                    async for position in ticket.turn():
                        yield Queued(position)


@pytest.fixture
def client(settings: Settings, scripted: ScriptedChat) -> Iterator[TestClient]:
    """Of an app that says what the test wants."""
    with TestClient(create_app(settings, scripted.opened)) as client:
        yield client


def ask(socket: Any, input: str, **fields: Any) -> None:
    socket.send_json({"type": "response.create", "response": {"input": input, **fields}})


def until(socket: Any, type: str) -> Json:
    while (event := socket.receive_json())["type"] != type:
        pass
    return dict(event)


def complete(client: TestClient, said: str, **more: Any) -> Any:
    body = {"model": "scripted", "messages": [{"role": "user", "content": said}], **more}
    return client.post("/v1/chat/completions", json=body, headers=bearer())


# The page


def test_the_page_is_prometheus_text_with_all_the_names(client: TestClient) -> None:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] in (
        "text/plain; version=0.0.4; charset=utf-8",
        "text/plain; version=1.0.0; charset=utf-8",
    )
    families = {family.name: family.type for family in text_string_to_metric_families(answer.text)}
    types = {f"parley_{name}_seconds": "histogram" for name in HISTOGRAMS}
    types |= {f"parley_{name}": "counter" for name in COUNTERS}
    types |= {f"parley_{name}": "gauge" for name in GAUGES}
    assert {name: type for name, type in families.items() if not name.endswith("_created")} == types
    assert all(family.documentation for family in text_string_to_metric_families(answer.text))


def test_at_the_start_nothing_has_moved(client: TestClient) -> None:
    assert {name: value for name, value in look(client).items() if value} == {"num_slots": 100}


def test_looking_moves_nothing(client: TestClient) -> None:
    assert look(client) == look(client)


def test_two_apps_in_a_process_do_not_share_numbers(settings: Settings, client: TestClient) -> None:
    with TestClient(create_app(settings, ScriptedChat().opened)) as other:
        before = look(other)
        assert complete(client, "say one").status_code == 200
        log_in(client, "wrong")
        assert look(client)["responses_total completed stop"] == 1
        assert look(other) == before


# Replies


def test_a_reply_moves_its_latencies_its_tokens_and_what_became_of_it(client: TestClient) -> None:
    with client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        socket.receive_json()
        before = look(client)
        ask(socket, "say it in five pieces")
        events = until_done(socket)
        usage = events[-1]["response"]["usage"]
        assert sum("delta" in event for event in events) == usage["output_tokens"] == 5
        assert moved(before, look(client)) == {
            "time_to_first_token_seconds_count": 1,
            "inter_token_latency_seconds_count": 4,
            "request_queue_time_seconds_count": 1,
            "e2e_request_latency_seconds_count": 1,
            "prompt_tokens_total": usage["input_tokens"],
            "generation_tokens_total": 5,
            "responses_total completed stop": 1,
        }


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_moves_the_same(client: TestClient, stream: bool) -> None:
    before = look(client)
    assert complete(client, "say it in five pieces", stream=stream).status_code == 200
    assert moved(before, look(client)) == {
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 4,
        "request_queue_time_seconds_count": 1,
        "e2e_request_latency_seconds_count": 1,
        "prompt_tokens_total": 1,
        "generation_tokens_total": 5,
        "responses_total completed stop": 1,
    }


def test_a_plain_reply_counts_too(client: TestClient) -> None:
    with client.websocket_connect("/ws", headers=bearer()) as socket:
        for number in range(3):
            socket.send_text("say it")
            assert socket.receive_text() == "it"
            socket.send_text("break")  # tells its end
            assert socket.receive_text().startswith("error: ")
            after = look(client)
            assert after["responses_total completed stop"] == number + 1
            assert after["responses_total failed server_error"] == number + 1


def test_replies_are_counted_by_what_became_of_them_and_why(client: TestClient, scripted: ScriptedChat) -> None:
    with client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        socket.receive_json()
        for said in ("say one", "break it", "say two"):
            ask(socket, said)
            until_done(socket)
        ask(socket, "wait")
        until(socket, "response.created")
        socket.send_json({"type": "response.cancel"})
        until_done(socket)
        ask(socket, "say three", conversation="conv_of_nobody")
        assert until(socket, "error")["error"]["code"] == "conversation_not_found"
        scripted.admission.per_user = 0
        for _ in range(2):
            ask(socket, "say four")
            assert until(socket, "error")["error"]["code"] == "too_many_responses"
        scripted.admission.close()
        ask(socket, "say five")
        assert until(socket, "error")["error"]["code"] == "server_shutdown"
    assert complete(client, "say six").status_code == 503
    counts = {name: value for name, value in look(client).items() if name.startswith("responses")}
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
    before = look(client)
    assert complete(client, "say one").status_code == 429
    assert moved(before, look(client)) == {"responses_total refused too_many_responses": 1}


def test_a_reply_that_ends_since_nobody_listens_is_counted_as_that(settings: Settings, scripted: ScriptedChat) -> None:
    with serve(create_app(replace(settings, linger=0), scripted.opened)) as served:
        with chat_v1(served) as connection:
            ask_by_wire(connection, "wait here")
            until_by_wire(connection, "response.output_text.delta")
        body = {"model": "scripted", "messages": [{"role": "user", "content": "wait here"}], "stream": True}
        call(served, idle(scripted))
        with httpx2.stream(
            "POST", f"{served.url}/v1/chat/completions", json=body, headers=bearer(), timeout=None
        ) as answer:
            next(answer.iter_lines())
        call(served, idle(scripted))
        after = read(httpx2.get(f"{served.url}/metrics").text)
    assert after["responses_total cancelled client_disconnected"] == 2
    assert after["num_requests_running"] == 0


async def idle(scripted: ScriptedChat) -> None:
    """Wait until no reply is being made."""
    if scripted.running:
        await scripted.idle.wait()


# What is in use


def test_running_and_waiting_are_counted_while_they_run_and_wait(settings: Settings) -> None:
    def counts() -> tuple[float, float]:
        now = look(client)
        return now["num_requests_running"], now["num_requests_waiting"]

    with TestClient(create_app(settings, QueueingChat().opened)) as client:
        with (
            client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as ann,
            client.websocket_connect("/ws", ["chat.v1"], headers=bearer(BOB)) as bob,
        ):
            for socket in (ann, bob):
                until(socket, "session.created")
            ask(ann, "wait one", conversation="new")
            first = until(ann, "response.output_text.delta")["response_id"]
            assert counts() == (1, 0)
            ask(ann, "wait two", conversation="new")
            second = until(ann, "response.queued")["response_id"]
            assert counts() == (1, 1)
            ask(bob, "wait three", conversation="new")
            third = until(bob, "response.queued")["response_id"]
            assert counts() == (1, 2)
            for socket, id, left in ((ann, second, (1, 1)), (ann, first, (1, 0)), (bob, third, (0, 0))):
                socket.send_json({"type": "response.cancel", "response_id": id})
                until_done(socket)
                assert counts() == left
        after = look(client)
    assert after["responses_total cancelled client_cancelled"] == 3
    assert after["request_queue_time_seconds_count"] == 2, "one never had a slot"
    assert after["e2e_request_latency_seconds_count"] == 3
    assert (after["prompt_tokens_total"], after["generation_tokens_total"]) == (2, 1 + 2), "nothing was read of it"


def test_a_full_queue_is_seen_as_refusals(settings: Settings) -> None:
    chat = QueueingChat()
    chat.admission = Admission(slots=0, queue=0, per_user=9)
    with TestClient(create_app(settings, chat.opened)) as client:
        assert complete(client, "say one").status_code == 503
        after = look(client)
    assert (after["responses_total refused queue_full"], after["num_slots"]) == (1, 0)


def test_slots_and_cache_are_what_the_chat_says(client: TestClient, scripted: ScriptedChat) -> None:
    scripted.admission.shrink(7)
    scripted.cache_usage = 0.25
    after = look(client)
    assert (after["num_slots"], after["kv_cache_usage_perc"]) == (7, 0.25)


def test_sockets_are_counted_while_they_are_open_and_belong_to_a_user(client: TestClient) -> None:
    assert look(client)["sockets_open"] == 0
    with client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as first:
        first.receive_json()
        assert look(client)["sockets_open"] == 1
        with client.websocket_connect("/ws", ["chat.v1"], headers=bearer(BOB)) as second:
            second.receive_json()
            assert look(client)["sockets_open"] == 2
            with client.websocket_connect("/ws", headers=bearer(BOB)) as third:
                third.send_text("say here")
                assert third.receive_text() == "here"
                assert look(client)["sockets_open"] == 3
        with client.websocket_connect("/ws", ["chat.v1"]) as stranger:
            assert stranger.receive_json()["type"] == "error"
            assert look(client)["sockets_open"] == 1
    assert look(client)["sockets_open"] == 0


# Troubles


def test_wrong_credentials_count_however_they_come_and_right_ones_do_not(client: TestClient) -> None:
    def failures() -> float:
        return look(client)["login_failures_total"]

    log_in(client)
    assert client.get("/v1/models", headers=bearer()).status_code == 200
    assert failures() == 0
    log_in(client, "wrong")
    assert client.get("/v1/models", headers=bearer("wrong")).status_code == 401
    assert failures() == 2
    for url, protocols in (("/ws?secret=wrong", None), ("/ws?secret=wrong", ["chat.v1"]), ("/ws", ["bearer.d3Jvbmc"])):
        with client.websocket_connect(url, protocols, headers={"Cookie": ""}) as socket:
            socket.receive_text()
    assert failures() == 5


def test_no_credentials_at_all_are_no_failed_login(client: TestClient) -> None:
    assert client.get("/v1/models").status_code == 401
    assert look(client)["login_failures_total"] == 0


def test_slow_clients_that_are_closed_are_counted(scripted_server: Served) -> None:
    with sockets.socket() as slow_socket:
        slow_socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        slow_socket.connect(("127.0.0.1", scripted_server.port))
        with chat_v1(scripted_server, sock=slow_socket, max_queue=1, close_timeout=30) as slow:
            assert slow_clients(scripted_server) == 0
            for _ in range(12):
                slow.send(json.dumps({"type": "session.update", "session": {"instructions": "x" * 1_000_000}}))
            assert closed_with(slow) == 1013
            assert slow_clients(scripted_server) == 1


def slow_clients(served: Served) -> float:
    return read(httpx2.get(f"{served.url}/metrics").text)["slow_clients_closed_total"]


async def stuck_connection(app: Starlette, headers: list[tuple[bytes, bytes]]) -> None:
    """Connect to an app, and read nothing of what it sends."""
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
        "subprotocols": ["chat.v1"],
    }
    await app(scope, events.get, send)


@pytest.mark.parametrize("known", [True, False], ids=["a user", "a stranger"])
def test_who_reads_nothing_is_counted_even_before_a_login(
    settings: Settings,
    scripted: ScriptedChat,
    caplog: pytest.LogCaptureFixture,
    known: bool,
) -> None:
    class ImpatientSocket(ChatSocket):
        patience = 0

    app = create_app(settings, scripted.opened)
    app.router.routes.insert(0, WebSocketRoute("/ws", ImpatientSocket))
    headers = [(name.lower().encode(), value.encode()) for name, value in bearer().items()] if known else []
    with TestClient(app) as client:
        assert client.portal
        client.portal.call(stuck_connection, app, headers)
        assert look(client)["slow_clients_closed_total"] == 1
        assert look(client)["sockets_open"] == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# Over a real engine


@pytest.fixture
def tiny_client(settings: Settings) -> Iterator[TestClient]:
    """The whole app, as it is but for the size of its model."""
    with TestClient(create_app(settings, opens_tiny)) as client:
        yield client


def test_tokens_are_those_of_the_usage_and_steps_are_timed(tiny_client: TestClient) -> None:
    with tiny_client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        socket.receive_json()
        usages = []
        for said in ("Hello there", "And again", "And once more"):
            ask(socket, said, temperature=0, max_output_tokens=7)
            usages.append(until_done(socket)[-1]["response"]["usage"])
    after = look(tiny_client)
    assert after["prompt_tokens_total"] == sum(usage["input_tokens"] for usage in usages) > 0
    assert after["prompt_tokens_cached_total"] == sum(usage["cached_tokens"] for usage in usages) > 0
    assert after["generation_tokens_total"] == sum(usage["output_tokens"] for usage in usages) > 0
    assert after["engine_step_seconds_count"] >= after["generation_tokens_total"], "one reply at a time"
    assert 0 < after["engine_step_seconds_sum"] < after["e2e_request_latency_seconds_sum"]
    assert after["time_to_first_token_seconds_sum"] < after["e2e_request_latency_seconds_sum"]
    assert (after["num_slots"], after["kv_cache_usage_perc"], after["num_requests_running"]) == (4, 0, 0)


def test_a_reply_that_was_cut_and_one_that_is_too_long_are_told_apart(tiny_client: TestClient) -> None:
    for said, status in (("Hi", 200), ("x" * 300, 400)):
        body = {"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": said}], "max_tokens": 1}
        assert tiny_client.post("/v1/chat/completions", json=body, headers=bearer()).status_code == status
    after = look(tiny_client)
    assert after["responses_total incomplete max_output_tokens"] == 1
    assert after["responses_total refused context_length_exceeded"] == 1


@pytest.mark.anyio
async def test_cache_usage_is_the_share_of_the_slots_room_that_has_tokens(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    seen: list[float] = []
    async with Chat.running(tokenizer, llama, settings, lambda seconds: seen.append(chat.cache_usage)) as chat:
        with chat.admission.place("ann") as ticket:
            options = chat.defaults.updated({"max_output_tokens": 5, "temperature": 0})
            events = [event async for event in chat.reply(ticket, [{"role": "user", "content": "Hi"}], options)]
        assert chat.cache_usage == 0
    assert isinstance(events[0], Started)
    read = events[0].usage.input_tokens
    steps = events[0].usage.output_tokens
    room = settings.slots * 256
    assert seen[: steps - 1] == [(read + step) / room for step in range(steps - 1)]  # at the last one it has ended


# Times


class Clock:
    """Tells the time it is set to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The time that metrics and tickets go by."""
    return Clock()


Script = Sequence[tuple[float, Event | Exception]]


async def observed(clock: Clock, ticket: Ticket, script: Script) -> Look:
    """What a reply comes to whose events come after so many seconds each."""
    metrics = Metrics(clock.monotonic)

    async def reply() -> AsyncGenerator[Event, None]:
        for seconds, event in script:
            clock.now += seconds
            if isinstance(event, Exception):
                raise event
            yield event

    async def all_of(events: AsyncIterator[Event]) -> list[Event]:
        return [event async for event in events]

    if any(isinstance(event, Exception) for _, event in script):
        with pytest.raises(MessagesRefused):
            await all_of(metrics.observe(ticket, reply()))
    else:
        assert await all_of(metrics.observe(ticket, reply())) == [event for _, event in script]
    return {name: value for name, value in read(metrics.text().decode()).items() if value}


@pytest.mark.anyio
async def test_times_are_measured_from_the_request_to_the_first_text_from_text_to_text_and_to_the_end(
    clock: Clock,
) -> None:
    places = Admission(slots=1, queue=1, per_user=1, clock=clock.monotonic)
    clock.now += 5
    with places.place("ann") as ticket:
        usage = Usage(30, cached_tokens=10, output_tokens=3)
        script: Script = [(1, Started(usage)), (2, Delta("a")), (4, Delta("b")), (8, Delta("c")), (16, Done("stop"))]
        assert await observed(clock, ticket, script) == {
            "time_to_first_token_seconds_count": 1,
            "time_to_first_token_seconds_sum": 3,
            "inter_token_latency_seconds_count": 2,
            "inter_token_latency_seconds_sum": 12,
            "request_queue_time_seconds_count": 1,
            "e2e_request_latency_seconds_count": 1,
            "e2e_request_latency_seconds_sum": 31,
            "prompt_tokens_total": 30,
            "prompt_tokens_cached_total": 10,
            "generation_tokens_total": 3,
        }


@pytest.mark.anyio
async def test_the_queue_time_ends_with_the_slot_and_counts_in_the_first_token(clock: Clock) -> None:
    places = Admission(slots=1, queue=2, per_user=3, clock=clock.monotonic)
    first, second, ticket = (places.enter(user) for user in ("ann", "bob", "eve"))
    clock.now += 2
    places.leave(first)
    assert ticket.position == 1
    clock.now += 5
    places.leave(second)
    assert ticket.position == 0
    after = await observed(clock, ticket, [(1, Started(Usage(1))), (1, Delta("a")), (1, Done("stop"))])
    assert after["request_queue_time_seconds_sum"] == 7
    assert after["time_to_first_token_seconds_sum"] == 9
    assert after["e2e_request_latency_seconds_sum"] == 10


@pytest.mark.anyio
async def test_who_leaves_the_queue_is_seen_in_the_end_to_end_time_only(clock: Clock) -> None:
    places = Admission(slots=1, queue=1, per_user=3, clock=clock.monotonic)
    places.enter("ann")
    ticket = places.enter("bob")
    after = await observed(clock, ticket, [(1, Started(Usage(50))), (2, Queued(1))])
    assert after == {"e2e_request_latency_seconds_count": 1, "e2e_request_latency_seconds_sum": 3}


@pytest.mark.anyio
async def test_a_reply_that_fails_is_seen_as_far_as_it_came(clock: Clock) -> None:
    with Admission(slots=1, queue=1, per_user=3, clock=clock.monotonic).place("ann") as ticket:
        usage = Usage(7, output_tokens=1)
        after = await observed(clock, ticket, [(1, Started(usage)), (2, Delta("a")), (4, MessagesRefused("no"))])
    assert (after["prompt_tokens_total"], after["generation_tokens_total"]) == (7, 1)
    assert (after["time_to_first_token_seconds_sum"], after["e2e_request_latency_seconds_sum"]) == (3, 7)
    assert "inter_token_latency_seconds_count" not in after


@pytest.mark.anyio
async def test_a_reply_that_is_closed_early_closes_what_it_comes_from() -> None:
    ended = asyncio.Event()

    async def reply() -> AsyncGenerator[Event, None]:
        try:
            yield Started(Usage(1))
            yield Delta("a")
        finally:
            ended.set()

    with Admission(slots=1, queue=1, per_user=3).place("ann") as ticket:
        async with aclosing(Metrics().observe(ticket, reply())) as coming:
            await anext(coming)
        assert ended.is_set()
