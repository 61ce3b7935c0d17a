"""Several workers are one server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from tests.support.client import BOB, ENDS, bearer, text_of
from tests.support.process import RESTARTS, ROOT, Client, until
from tests.support.workers_process import Workers, descriptors, runs, workers

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Workers]:
    with workers(tmp_path / "data", queue=1000, responses_per_user=300, sockets_per_user=300) as server:
        yield server


@contextmanager
def client_of_each(server: Workers) -> Iterator[list[Client]]:
    """A client of each worker."""
    with ExitStack() as stack:
        found: dict[int, Client] = {}
        while len(found) < 2:
            client = stack.enter_context(server.connected())
            found.setdefault(pid_of(server, client), client)
        yield [*found.values()]


def pid_of(server: Workers, client: Client) -> int:
    """The worker of a client."""
    return server.worker_of(int(client.connection.socket.getsockname()[1]))


def resume(client: Client, id: str, after: int) -> None:
    client.connection.send(json.dumps({"type": "parley.response.resume", "response_id": id, "starting_after": after}))


def last_number(client: Client) -> int:
    return max(int(event["sequence_number"]) for event in client.events if "sequence_number" in event)


# One server


def test_all_workers_have_one_hub_and_load_no_torch(server: Workers) -> None:
    arguments = {json.dumps(server.get("/args").json()) for _ in range(20)}
    assert len(arguments) == 1
    assert server.log.text.count("The secret, shown only this once") == 1
    assert len(server.workers) == 2
    for pid in server.workers:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
        assert not any("parley.db" in path for path in descriptors(pid))  # nothing has read the database yet


def test_the_metrics_count_what_all_workers_do(server: Workers) -> None:
    with client_of_each(server) as clients:
        for client in clients:
            client.outcome(client.start("say it")["id"])
        lines = {server.get("/metrics").text for _ in range(10)}
        assert all('parley_responses_total{reason="stop",status="completed"} 2.0' in text for text in lines)


def test_users_hear_of_others_on_other_workers(server: Workers, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "server.py"), "users", "add", "bob", "--secret", BOB]
    subprocess.run(command, env=os.environ | {"PARLEY_DATA": str(tmp_path / "data")}, check=True)
    with client_of_each(server) as clients:
        headers = bearer(BOB)
        with connect(server.ws, subprotocols=[Subprotocol("chat.v2")], additional_headers=headers) as bob:
            bob.recv()
            for client in clients:
                client.wait_for("parley.presence.joined", user="bob")
        for client in clients:
            client.wait_for("parley.presence.left", user="bob")


# A worker ends


def test_another_worker_resumes_the_reply_of_a_killed_one_without_a_gap(server: Workers) -> None:
    with client_of_each(server) as (one, two):
        response = one.start("wait a fox and a hound")
        other = two.start("wait another reply")
        one.wait_for("response.output_text.delta")
        os.kill(pid_of(server, one), signal.SIGKILL)
        assert one.wait_for_close() is None
        resume(two, response["id"], last_number(one))
        two.wait_for("response.output_text.delta")
        server.release()
        ended = two.wait_for(*ENDS, id=response["id"])["response"]
        assert (ended["status"], text_of(ended)) == ("completed", "a fox and a hound")
        texts = [event["delta"] for client in (one, two) for event in deltas(client, response["id"])]
        assert "".join(texts) == "a fox and a hound"
        assert two.outcome(other["id"]) == ("completed", None, "another reply")
    until(lambda: len(server.workers) == 2, "there is a new worker")
    with client_of_each(server) as clients:
        assert [client.outcome(client.start("say hello")["id"])[0] for client in clients] == ["completed"] * 2


def deltas(client: Client, id: str) -> list[Any]:
    """The deltas of a response."""
    part = id.removeprefix("resp_")
    return [event for event in client.find("response.output_text.delta") if part in event["item_id"]]


# The hub ends


FAILED = ("failed", "The server could not finish the reply; try again.", "as far as it was stored")


def test_if_the_hub_is_killed_all_replies_fail_and_all_sockets_stay(tmp_path: Path) -> None:
    with workers(tmp_path / "data", quiet=False) as server, client_of_each(server) as clients:
        responses = [client.start("wait as far as it was stored") for client in clients]
        conversations = [response["conversation"]["id"] for response in responses]
        stored = ("as far as it was stored", "in_progress")
        until(lambda: all(stored in server.items(id) for id in conversations), "the texts are stored")
        before = server.hub
        os.kill(before, signal.SIGKILL)
        for client, response in zip(clients, responses, strict=True):
            assert client.outcome(response["id"]) == FAILED
        until(lambda: server.ready()[0] == 503, "the workers tell that there is no hub")
        until(lambda: server.ready() == (200, "ready"), "there is a new hub")
        assert server.hub != before
        for client, conversation in zip(clients, conversations, strict=True):
            assert server.items(conversation)[-1] == ("as far as it was stored", "failed")
            assert client.outcome(client.start("say on")["id"]) == ("completed", None, "on")


# Races between workers


def test_of_many_requests_for_one_conversation_one_is_answered_and_nothing_is_lost(server: Workers) -> None:
    with client_of_each(server) as clients:
        conversation = clients[0].start("say begin")["conversation"]["id"]
        clients[0].wait_for(*ENDS)
        outcomes = ask_in_turn(clients, 200, conversation=conversation)
        assert outcomes == {"response.created": 1, "conversation_locked": 199}
        server.release()
        created = [event["stream_id"] for client in clients for event in client.find("response.created")]
        (winner,) = [asked for asked in created if asked.startswith("wait")]
        until(lambda: server.items(conversation)[-1][1] == "completed", "the reply is stored")
        texts = [text for text, _ in server.items(conversation)]
        assert texts == ["say begin", "begin", winner, winner.removeprefix("wait ")]


def test_all_forks_of_one_response_are_made_and_kept(server: Workers) -> None:
    with client_of_each(server) as clients:
        client = clients[0]
        first = client.start("say begin", conversation=None, store=True)
        client.wait_for(*ENDS)
        for number in range(200):
            clients[number % 2].ask(f"say {number}", conversation=None, previous_response_id=first["id"])
        made = [
            clients[number % 2].wait_for("response.created", stream_id=f"say {number}")["response"]["id"]
            for number in range(200)
        ]
        for number, id in enumerate(made):
            assert clients[number % 2].outcome(id) == ("completed", None, str(number))
        with ThreadPoolExecutor(8) as pool:
            kept = [*pool.map(lambda id: text_of(server.get(f"/v1/responses/{id}").json()), made)]
        assert kept == [str(number) for number in range(200)]


# Limits


def test_wrong_secrets_count_over_all_workers(server: Workers) -> None:
    def guess(number: int) -> int:
        return httpx2.get(f"{server.url}/v1/models", headers=bearer(f"wrong {number}")).status_code

    with ThreadPoolExecutor(8) as pool:
        assert Counter(pool.map(guess, range(40))) == {401: 10, 429: 30}


def test_replies_at_once_count_over_all_workers(tmp_path: Path) -> None:
    with workers(tmp_path / "data", responses_per_user=4, queue=0) as server, client_of_each(server) as clients:
        outcomes = ask_in_turn(clients, 40)
        assert outcomes == {"response.created": 4, "too_many_responses": 36}


def test_requests_a_minute_count_over_all_workers(tmp_path: Path) -> None:
    with workers(tmp_path / "data", rate="5/minute") as server, client_of_each(server) as clients:
        assert ask_in_turn(clients, 40) == {"response.created": 5, "rate_limit_exceeded": 35}


def ask_in_turn(clients: list[Client], count: int, conversation: str | None = None) -> Counter[str]:
    """Ask for replies that wait, by the clients in turn; counts what the first events are."""
    for number in range(count):
        clients[number % 2].ask(f"wait {number}", conversation=conversation)
    return Counter(first_event(clients[number % 2], f"wait {number}") for number in range(count))


def first_event(client: Client, stream_id: str) -> str:
    """The type of the first event of a request, or the code of its error."""
    event = client.wait_for("response.created", "error", stream_id=stream_id)
    return str(event["error"]["code"] if event["type"] == "error" else event["type"])


# Signals


def test_sighup_replaces_the_workers_and_loses_nothing(server: Workers) -> None:
    with client_of_each(server) as clients:
        responses = [client.start("wait for it") for client in clients]
        before = server.workers
        server.signal(signal.SIGHUP)
        until(lambda: len({*server.workers} - {*before}) == 1, "the first new worker has started")
        server.release()
        for client, response in zip(clients, responses, strict=True):
            assert client.outcome(response["id"])[0] == "completed"
            assert client.wait_for_close() == RESTARTS
        until(lambda: not {*server.workers} & {*before}, "all workers are new")
    with client_of_each(server) as clients:
        assert [client.outcome(client.start("say hello")["id"])[0] for client in clients] == ["completed"] * 2


def test_sigterm_lets_all_workers_and_the_hub_finish(server: Workers) -> None:
    with client_of_each(server) as clients:
        responses = [client.start("wait for it") for client in clients]
        pids = [server.hub, *server.workers]
        server.signal(signal.SIGTERM)
        server.log.find("waiting up to")
        assert server.ready()[0] == 503
        server.release()
        for client, response in zip(clients, responses, strict=True):
            assert client.outcome(response["id"]) == ("completed", None, "for it")
            assert client.wait_for_close() == RESTARTS
        assert server.exit_code() == 0
    until(lambda: not any(map(runs, pids)), "all processes have ended")


def test_ctrl_c_in_a_terminal_lets_replies_finish_too(server: Workers) -> None:
    with client_of_each(server) as clients:
        responses = [client.start("wait for it") for client in clients]
        os.killpg(server.pid, signal.SIGINT)
        server.log.find("waiting up to")
        until(lambda: server.log.text.count("stopping; another signal") == 3, "all processes have the signal")
        server.release()
        for client, response in zip(clients, responses, strict=True):
            assert client.outcome(response["id"]) == ("completed", None, "for it")
        assert server.exit_code() == 0


def test_replies_that_do_not_finish_in_time_fail_before_the_sockets_close(tmp_path: Path) -> None:
    with workers(tmp_path / "data", drain=1) as server, client_of_each(server) as clients:
        responses = [client.start("wait for ever") for client in clients]
        server.signal(signal.SIGTERM)
        for client, response in zip(clients, responses, strict=True):
            assert client.outcome(response["id"])[0] == "failed"
            assert client.wait_for_close() == RESTARTS
        assert server.exit_code() == 0


def test_a_second_server_with_the_same_data_is_refused(server: Workers, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uvicorn", "tests.support.worker_apps:worker", "--factory", "--workers=2"]
    environment = os.environ | {"PARLEY_DATA": str(tmp_path / "data")}
    second = subprocess.run([*command, "--port=0"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, check=False)
    assert f"another server uses this PARLEY_DATA, process {server.pid}" in second.stderr.decode()
    assert server.ready() == (200, "ready")


def test_all_processes_end_when_the_supervisor_is_killed(server: Workers) -> None:
    pids = [server.hub, *server.workers]
    server.signal(signal.SIGKILL)
    server.exit_code()
    until(lambda: not any(map(runs, pids)), "all processes have ended")
