from __future__ import annotations

import os
import resource
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from tests.databases import PostgreSQL
from tests.process import COMMANDS, RESTARTS, Client, Server, launched, spawned, stored, until

pytestmark = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux lets one limit another process")

READY = (200, "ready")


# The engine


def test_a_poisonous_message_fails_alone(tmp_path: Path) -> None:
    with launched(tmp_path, "faulty", quiet=False) as server, server.connected() as client:
        usual = client.done(client.asked("hello", conversation="new", max_output_tokens=100)["id"])
        others = [client.asked("% hello", conversation="none", max_output_tokens=100)]
        poisonous = client.asked("~", conversation="new")
        others.append(client.asked("hello", conversation="none", max_output_tokens=100))
        server.release()
        assert client.done(poisonous["id"]) == ("failed", "server_error", "")
        assert client.done(others[0]["id"])[:2] == usual[:2] == ("incomplete", "max_output_tokens")
        assert client.done(others[1]["id"]) == usual
        assert client.done(client.asked("hello", conversation="none", max_output_tokens=100)["id"]) == usual
        assert server.ready() == READY
        server.log.find(r"an engine step of \d sequences failed(.|\n)*fails alone too: ValueError: the model chokes")


def test_where_memory_runs_out_replies_go_on_in_fewer_slots(tmp_path: Path) -> None:
    with launched(tmp_path, "faulty", quiet=False) as server, server.connected() as client:
        assert "parley_num_slots 4.0" in server.get("/metrics").text
        replies = [client.asked(input, conversation="new", max_output_tokens=50) for input in ("% large", "^ larger")]
        server.release()
        replies.append(client.asked("next", conversation="new", max_output_tokens=50))
        assert [client.done(reply["id"])[0] for reply in replies] == 3 * ["incomplete"]
        assert "parley_num_slots 2.0" in server.get("/metrics").text
        assert server.ready() == READY
        server.log.find("out of memory: from 4 slots to 2")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_server_whose_engine_is_broken_says_why_and_ends_with_1(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, "faulty", command, quiet=False) as server, server.connected() as client:
        replies = [client.asked("% runs"), client.asked("@", conversation="new")]
        server.release()
        assert [client.done(reply["id"])[:2] for reply in replies] == 2 * [("failed", "server_error")]
        assert client.closed() == RESTARTS
        assert server.exit_code() == 1
        server.log.find(r"the engine stopped(.|\n)*CUDA error: device-side assert")


# Where it is kept


def starved(server: Server, client: Client, running: str) -> None:
    """Wait until it is told that a running reply is not kept, and see that all else goes on."""
    error = client.hear("error", code="not_kept")["error"]
    assert error["response_id"] == running
    assert "event_id" not in error
    status, text = server.ready()
    assert (status, text[:10]) == (200, "ready, but")
    assert server.post("/login", data={"secret": server.secret}).status_code == 303
    with server.connected() as another:
        answered(another, "say it", conversation="new")


def answered(client: Client, input: str, **fields: str) -> str:
    """See that a message is answered and told once that it is not kept; returns the conversation."""
    response = client.asked(input, **fields)
    assert client.done(response["id"]) == ("completed", "stop", input.split()[1])
    assert len(client.of("error", code="not_kept", response_id=response["id"])) == 1
    return str(response["conversation"])


def recovered(server: Server) -> None:
    """Wait until it is as before, and see that the log tells no more than that."""
    until(lambda: server.ready() == READY, "it is ready again")
    for line in ("what is said cannot be written down", "what is said can be written down again"):
        assert server.log.text.count(line) == 1
    assert server.log.text.count("the database cannot be read") <= 1


def test_with_the_disk_full_all_is_answered_and_it_is_written_when_there_is_room(tmp_path: Path) -> None:
    with launched(tmp_path) as server, server.connected() as client:
        client.done(client.asked("say one")["id"])
        running = client.asked("wait two")
        server.limit(resource.RLIMIT_FSIZE, 0)
        starved(server, client, running["id"])
        new = answered(client, "say three", conversation="new")
        server.release()
        assert client.done(running["id"]) == ("completed", "stop", "two")
        answered(client, "say four")
        assert client.of("response.done")[-1]["response"]["usage"]["input_tokens"] == 5  # it was told all before
        server.limit(resource.RLIMIT_FSIZE, None)
        recovered(server)
        assert server.said(client.conversation) == [
            *[("say one", None), ("one", "completed"), ("wait two", None), ("two", "completed")],
            *[("say four", None), ("four", "completed")],
        ]
        assert server.said(new) == [("say three", None), ("three", "completed")]


def test_what_waits_to_be_written_is_written_at_the_end_where_it_can_be(tmp_path: Path) -> None:
    with launched(tmp_path) as server, server.connected() as client:
        running = client.asked("wait two")
        server.limit(resource.RLIMIT_FSIZE, 0)
        client.hear("error", code="not_kept")
        server.release()
        client.done(running["id"])
        server.limit(resource.RLIMIT_FSIZE, None)
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
    assert stored(tmp_path) == [("wait two", None, None), ("two", "completed", "stop")]


def test_a_server_that_ends_with_the_disk_full_says_how_much_is_lost(tmp_path: Path) -> None:
    with launched(tmp_path, drain=0) as server, server.connected() as client:
        running = client.asked("wait two")
        server.limit(resource.RLIMIT_FSIZE, 0)
        client.hear("error", code="not_kept")
        server.signal(signal.SIGTERM)
        assert client.done(running["id"]) == ("failed", "server_shutdown", "two")
        assert client.closed() == RESTARTS
        assert server.exit_code() == 0
        server.log.find("could not be written down, and are lost: 1")


def test_with_the_database_away_all_is_answered_and_it_is_written_when_it_is_back(tmp_path: Path) -> None:
    with PostgreSQL.running() as postgresql:
        url = f"postgresql://postgres@/postgres?host={postgresql.folder}"
        with launched(tmp_path, database_url=url) as server, server.connected() as client:
            running = client.asked("wait two")
            postgresql.stop()
            starved(server, client, running["id"])
            new = answered(client, "say three", conversation="new")
            client.done(client.asked("say nothing of it", conversation="none")["id"])
            server.release()
            assert client.done(running["id"]) == ("completed", "stop", "two")
            client.ask("say four")
            assert client.hear("error", event_id="say four")["error"]["code"] == "database_unavailable"
            assert server.get("/v1/conversations").status_code == 503
            postgresql.start()
            recovered(server)
            assert server.said(client.conversation) == [("wait two", None), ("two", "completed")]
            assert server.said(new) == [("say three", None), ("three", "completed")]


# What the system has


def test_with_as_many_files_open_as_may_be_new_connections_wait(tmp_path: Path) -> None:
    with launched(tmp_path) as server, server.connected() as client:
        running = client.asked("wait hello")
        server.limit(resource.RLIMIT_NOFILE, len(os.listdir(f"/proc/{server.pid}/fd")) + 4)
        with ExitStack() as connections:
            for _ in range(8):
                connections.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            server.log.find("as many files and sockets are open as may be")
            server.release()
            assert client.done(running["id"]) == ("completed", "stop", "hello")
        assert server.ready() == READY
        with server.connected() as another:
            another.done(another.asked("say more")["id"])
        kept = [("wait hello", None), ("hello", "completed")]
        until(lambda: server.said(client.conversation) == kept, "what was said meanwhile is kept")
        assert server.log.text.count("as many files and sockets are open as may be") == 1


def test_a_clock_that_jumps_changes_nothing_of_what_is_said(tmp_path: Path) -> None:
    jumps = ("back -3600", "forward 86400", "again 0")
    with spawned(tmp_path, "tests.clock:app", rate="100/minute") as server, server.connected() as client:
        for jump in jumps:
            cookies = server.post("/login", data={"secret": server.secret}).cookies
            assert client.done(client.asked(jump)["id"]) == ("completed", "stop", jump.split()[1])
            assert server.ready() == READY
            assert httpx2.get(server.url, cookies=cookies).status_code == 200
        replies = [[(jump, None), (jump.split()[1], "completed")] for jump in jumps]
        assert server.said(client.conversation) == [item for reply in replies for item in reply]
        server.signal(signal.SIGTERM)
        assert client.closed() == RESTARTS
        assert server.exit_code() == 0
