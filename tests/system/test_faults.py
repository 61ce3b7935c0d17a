"""A server in trouble: a failing model, a full disk, no database, no file descriptors, a clock that jumps."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sqlite3
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.databases import PostgreSQL
from tests.support.process import COMMANDS, PATIENCE, RESTARTS, Child, Client, Server, launched, stored, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux can limit another process"),
]

READY = (200, "ready")
FAILED = "The server could not finish the reply; try again."
STOPPED = "The server stopped before the reply ended."
FORM = b"Content-Type: application/x-www-form-urlencoded"
UNFINISHED = b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n%s\r\n\r\nsecre" % FORM
KEY = "a key of all hosts, which is long enough"
HTTP = "models.web.http_protocol:HTTPProtocol"


# The engine


def test_a_prompt_that_breaks_the_model_fails_alone(tmp_path: Path) -> None:
    with launched(tmp_path, "faulty", quiet=False) as server, server.connected() as client:
        usual = client.outcome(client.start("hello", conversation="new", max_output_tokens=100)["id"])
        others = [client.start("% hello", conversation=None, max_output_tokens=100)]
        bad = client.start("~", conversation="new")
        others.append(client.start("hello", conversation=None, max_output_tokens=100))
        server.release()
        assert client.outcome(bad["id"]) == ("failed", FAILED, "")
        assert client.outcome(others[0]["id"])[:2] == usual[:2] == ("incomplete", "max_output_tokens")
        assert client.outcome(others[1]["id"]) == usual
        assert client.outcome(client.start("hello", conversation=None, max_output_tokens=100)["id"]) == usual
        assert server.ready() == READY
        server.log.find(r"an engine step of \d sequences failed(.|\n)*fails alone too: ValueError: the model chokes")


def test_out_of_memory_reduces_the_slots_and_replies_go_on(tmp_path: Path) -> None:
    with launched(tmp_path, "faulty", quiet=False) as server, server.connected() as client:
        assert "parley_num_slots 4.0" in server.get("/metrics").text
        replies = [client.start(input, conversation="new", max_output_tokens=50) for input in ("% large", "^ larger")]
        server.release()
        server.log.find("out of memory: from 4 slots to 2")
        replies.append(client.start("next", conversation="new", max_output_tokens=50))
        assert [client.outcome(reply["id"])[0] for reply in replies] == 3 * ["incomplete"]
        assert "parley_num_slots 2.0" in server.get("/metrics").text
        assert server.ready() == READY


@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_engine_is_logged_and_ends_the_server_with_1(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, "faulty", command, quiet=False) as server, server.connected() as client:
        replies = [client.start("% runs"), client.start("@", conversation="new")]
        server.release()
        assert [client.outcome(reply["id"])[:2] for reply in replies] == 2 * [("failed", FAILED)]
        assert client.wait_for_close() == RESTARTS
        assert server.exit_code() == 1
        server.log.find(r"the engine stopped(.|\n)*CUDA error: device-side assert")


# Storage


def expect_a_warning_and_service(server: Server, client: Client, running: str) -> None:
    """Wait until a running reply has its warning that it is not stored, and check that everything else works."""
    client.wait_for("parley.warning", code="not_kept", response_id=running)
    status, text = server.ready()
    assert (status, text[:10]) == (200, "ready, but")
    assert server.post("/login", data={"secret": server.secret}).status_code == 303
    with server.connected() as another:
        expect_an_unstored_answer(another, "say it", conversation="new")


def expect_an_unstored_answer(client: Client, input: str, **fields: Any) -> str:
    """Check that a message is answered, with one warning that it is not stored; returns the conversation."""
    response = client.start(input, **fields)
    assert client.outcome(response["id"]) == ("completed", None, input.split()[1])
    assert len(client.find("parley.warning", code="not_kept", response_id=response["id"])) == 1
    return str(response["conversation"]["id"])


def expect_recovery(server: Server) -> None:
    """Wait until the server is ready again, and check that the log has one line for each change."""
    until(lambda: server.ready() == READY, "it is ready again")
    for line in ("messages cannot be stored, and wait in memory", "messages can be stored again"):
        assert server.log.text.count(line) == 1
    assert server.log.text.count("the database cannot be read") <= 1


def test_with_a_full_disk_replies_go_on_and_are_stored_later(tmp_path: Path) -> None:
    with launched(tmp_path) as server, server.connected() as client:
        client.outcome(client.start("say one")["id"])
        running = client.start("wait two")
        server.limit(resource.RLIMIT_FSIZE, 0)
        expect_a_warning_and_service(server, client, running["id"])
        new = expect_an_unstored_answer(client, "say three", conversation="new")
        server.release()
        assert client.outcome(running["id"]) == ("completed", None, "two")
        expect_an_unstored_answer(client, "say four")
        usage = client.find("response.completed")[-1]["response"]["usage"]
        assert usage["input_tokens"] == 5  # the prompt has the unstored messages too
        server.limit(resource.RLIMIT_FSIZE, None)
        expect_recovery(server)
        assert server.items(client.conversation) == [
            *[("say one", None), ("one", "completed"), ("wait two", None), ("two", "completed")],
            *[("say four", None), ("four", "completed")],
        ]
        assert server.items(new) == [("say three", None), ("three", "completed")]


def test_unstored_replies_are_stored_at_the_end_if_possible(tmp_path: Path) -> None:
    with launched(tmp_path) as server, server.connected() as client:
        running = client.start("wait two")
        server.limit(resource.RLIMIT_FSIZE, 0)
        client.wait_for("parley.warning", code="not_kept")
        server.release()
        client.outcome(running["id"])
        server.limit(resource.RLIMIT_FSIZE, None)
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
    assert stored(tmp_path) == [("wait two", None, None), ("two", "completed", "stop")]


def test_a_server_that_ends_with_a_full_disk_logs_how_much_is_lost(tmp_path: Path) -> None:
    with launched(tmp_path, drain=0) as server, server.connected() as client:
        running = client.start("wait two")
        server.limit(resource.RLIMIT_FSIZE, 0)
        client.wait_for("parley.warning", code="not_kept")
        server.signal(signal.SIGTERM)
        assert client.outcome(running["id"]) == ("failed", STOPPED, "two")
        assert client.wait_for_close() == RESTARTS
        assert server.exit_code() == 0
        server.log.find("lost 1 replies that could not be stored")


def test_while_another_process_locks_sqlite_replies_start_and_end_and_are_stored_later(tmp_path: Path) -> None:
    with launched(tmp_path) as server, server.connected() as client:
        first = client.start("wait zero")
        with closing(sqlite3.connect(tmp_path / "parley.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            deadline = time.monotonic() + PATIENCE  # for all of them together: five seconds for each would be a minute
            asked = [f"say {number}" for number in range(12)]
            for input in asked:  # all at once, since none may wait for another one's write
                client.ask(input, conversation="new")
            replies = [client.wait_for("response.created", stream_id=input)["response"] for input in asked]
            outcomes = [client.outcome(reply["id"]) for reply in replies]
            assert outcomes == [("completed", None, str(number)) for number in range(12)]
            server.release()
            assert client.outcome(first["id"]) == ("completed", None, "zero")
            assert len(client.find("parley.warning", code="not_kept")) == 13
            assert time.monotonic() < deadline, "the replies waited for the lock, one after the other"
            assert other.execute("SELECT count(*) FROM items").fetchone() == (2,), "the lock was held all the time"
            other.execute("ROLLBACK")
        expect_recovery(server)
        for number, reply in enumerate(replies):
            items = [(f"say {number}", None), (str(number), "completed")]
            assert server.items(reply["conversation"]["id"]) == items
        assert server.items(client.conversation) == [("wait zero", None), ("zero", "completed")]


@pytest.mark.parametrize(("command", "code"), [(COMMANDS[0], 1), (COMMANDS[1], 3)])
def test_a_second_process_on_one_database_is_refused_and_disturbs_nothing(
    tmp_path: Path, command: str, code: int
) -> None:
    with launched(tmp_path) as server, server.connected() as client:
        running = client.start("wait here")
        with Child.running("scripted", command, data=tmp_path, compile=False) as second:
            assert second.exit_code() == code
            second.log.find(f"another Parley uses this database, process {server.pid} on .*: run one process only")
            assert "Traceback" not in second.log.text
        server.release()
        assert client.outcome(running["id"]) == ("completed", None, "here")
        assert server.items(client.conversation) == [("wait here", None), ("here", "completed")]


def test_a_server_whose_database_was_taken_over_ends(tmp_path: Path) -> None:
    with launched(tmp_path) as server, server.connected() as client:
        running = client.start("wait here")
        with closing(sqlite3.connect(tmp_path / "parley.db")) as other:
            other.execute("UPDATE owners SET id = 'other'")
            other.execute("UPDATE items SET status = 'failed', owner = NULL WHERE status = 'in_progress'")
            other.commit()
        assert client.outcome(running["id"])[:2] == ("failed", STOPPED)
        assert server.exit_code() == 1
        server.log.find("another process has taken over from this one")
    assert stored(tmp_path) == [("wait here", None, None), ("", "failed", None)]


@pytest.mark.postgresql
def test_a_host_fails_the_replies_of_another_one_that_was_killed(tmp_path: Path) -> None:
    with PostgreSQL.running() as postgresql:
        url = f"postgresql://postgres@/postgres?host={postgresql.folder}"
        with launched(tmp_path / "first", database_url=url, key=KEY) as server, server.connected() as client:
            client.start("wait here")
            settings = {"database_url": url, "compile": False}
            with Child.running("scripted", COMMANDS[0], data=tmp_path / "third", **settings) as third:
                assert third.exit_code() == 1
                third.log.find("belong to another key: set PARLEY_KEY to the same value on all hosts")
            with Child.running("scripted", COMMANDS[0], data=tmp_path / "second", key=KEY, **settings) as second:
                server.port = int(second.log.find(r"http://127\.0\.0\.1:(\d+)")[1])  # from now on, it asks this one
                assert [status for _, status in server.items(client.conversation)] == [None, "in_progress"]
                server.signal(signal.SIGKILL)
                second.log.find("1 replies were cut off when their server ended")
                assert [status for _, status in server.items(client.conversation)] == [None, "failed"]


@pytest.mark.postgresql
def test_without_the_database_replies_go_on_and_are_stored_later(tmp_path: Path) -> None:
    with PostgreSQL.running() as postgresql:
        url = f"postgresql://postgres@/postgres?host={postgresql.folder}"
        with launched(tmp_path, database_url=url) as server, server.connected() as client:
            running = client.start("wait two")
            postgresql.stop()
            expect_a_warning_and_service(server, client, running["id"])
            new = expect_an_unstored_answer(client, "say three", conversation="new")
            client.outcome(client.start("say nothing of it", conversation=None)["id"])
            server.release()
            assert client.outcome(running["id"]) == ("completed", None, "two")
            client.ask("say four")
            assert client.wait_for("error", stream_id="say four")["error"]["code"] == "database_unavailable"
            assert server.get("/v1/conversations").status_code == 503
            postgresql.start()
            expect_recovery(server)
            assert server.items(client.conversation) == [("wait two", None), ("two", "completed")]
            assert server.items(new) == [("say three", None), ("three", "completed")]


# The operating system


def test_without_free_file_descriptors_new_connections_wait(tmp_path: Path) -> None:
    warning = "too many files and sockets are open"
    with launched(tmp_path) as server, server.connected() as client:
        running = client.start("wait hello")
        server.limit(resource.RLIMIT_NOFILE, len(os.listdir(f"/proc/{server.pid}/fd")) + 4)
        with ExitStack() as connections:
            for _ in range(8):
                connections.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            server.log.find(warning)
            server.release()
            assert client.outcome(running["id"]) == ("completed", None, "hello")
        assert server.ready() == READY
        with server.connected() as another:
            another.outcome(another.start("say more")["id"])
        items = [("wait hello", None), ("hello", "completed")]
        until(lambda: server.items(client.conversation) == items, "the messages are stored")
        assert server.log.text.count(warning) == 1


@pytest.mark.parametrize("command", [COMMANDS[0], f"{COMMANDS[1]} --http {HTTP}"])
def test_strangers_leave_descriptors_for_users_and_the_database(tmp_path: Path, command: str) -> None:
    with launched(tmp_path, "crowded", command) as server, server.connected() as client, ExitStack() as connections:
        for sent in (b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n", UNFINISHED) * 30:
            connection = connections.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            with suppress(ConnectionError):  # it has made room for a later one
                connection.sendall(sent)
        server.log.find("too many connections are open")
        for _ in range(5):
            assert server.get("/health").text == "ok"
            assert server.get("/v1/conversations").status_code == 200
            assert server.post("/login", data={"secret": server.secret}).status_code == 303
        assert client.outcome(client.start("say more", conversation="new")["id"])[2] == "more"
        with server.connected() as another:
            another.outcome(another.start("say it")["id"])
        assert server.ready() == READY
        assert server.log.text.count("too many connections are open") == 1
        # uvicorn's own listener accepts all of a burst before any of them can make room.
        assert server.log.text.count("too many files") <= (command != COMMANDS[0])


def test_a_clock_that_jumps_disturbs_nothing(tmp_path: Path) -> None:
    jumps = ("back -3600", "forward 86400", "again 0")
    with launched(tmp_path, "jumping", COMMANDS[1], rate="100/minute") as server, server.connected() as client:
        for jump in jumps:
            cookies = server.post("/login", data={"secret": server.secret}).cookies
            assert client.outcome(client.start(jump)["id"]) == ("completed", None, jump.split()[1])
            assert server.ready() == READY
            assert server.get("/", cookies=cookies).status_code == 200
        turns = server.get(f"/v1/conversations/{client.conversation}/branch").json()["data"]
        assert turns[4]["created_at"] - turns[2]["created_at"] > 80_000  # so the clock has jumped
        replies = [[(jump, None), (jump.split()[1], "completed")] for jump in jumps]
        assert server.items(client.conversation) == [item for reply in replies for item in reply]
        server.signal(signal.SIGTERM)
        assert client.wait_for_close() == RESTARTS
        assert server.exit_code() == 0
