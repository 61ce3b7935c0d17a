"""A server in a process of its own, as those see it who start, signal, watch and use it."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.breakable import run

Json = dict[str, Any]
T = TypeVar("T")

PATIENCE = 30.0  # seconds; what has not come by then is not coming
ROOT = Path(__file__).parent.parent
COMMANDS = ("python server.py", "uvicorn server:app")
RESTARTS = (1012, "the server restarts")
COMPLAINT = re.compile("Traceback|was destroyed|never retrieved|never awaited|Exception ignored")

# A process that has imported everything once, and of which each server is a copy.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.breakable", "tests.survivor"])


def until(condition: Callable[[], T], what: str) -> T:
    """What a condition comes to once that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"in {PATIENCE:g} s it did not come to this: {what}"
        time.sleep(0.02)
    return value


def stored(data: Path) -> list[tuple[str, str | None, str | None]]:
    """What the database has when the server has ended: contents, and of replies what became of them and why."""
    with closing(sqlite3.connect(data / "parley.db")) as database:
        return database.execute("SELECT content, status, reason FROM items ORDER BY created, position").fetchall()


class Process(Protocol):
    """A child, as multiprocessing has it."""

    @property
    def pid(self) -> int | None: ...

    @property
    def exitcode(self) -> int | None: ...

    def join(self, timeout: float | None) -> None: ...

    def kill(self) -> None: ...


class Spawned(subprocess.Popen[bytes]):
    """A child that is nobody's copy."""

    def join(self, timeout: float | None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout)

    @property
    def exitcode(self) -> int | None:
        return self.poll()


class Log:
    """What comes out of a pipe, as it comes."""

    def __init__(self, pipe: Connection) -> None:
        self.text = ""
        self._pipe = pipe
        self._ended = False
        self._more = threading.Condition()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        with open(self._pipe.fileno(), errors="replace", closefd=False) as lines:
            for line in lines:
                with self._more:
                    self.text += line
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def find(self, pattern: str) -> re.Match[str]:
        """Wait until it says so."""
        with self._more:
            self._more.wait_for(lambda: self._ended or re.search(pattern, self.text), PATIENCE)
        found = re.search(pattern, self.text)
        assert found, f"{pattern!r} is not in the log:\n{self.text}"
        return found

    def whole(self) -> str:
        """All of it, when the process has ended."""
        self._reading.join(PATIENCE)
        assert self._ended, "the log goes on"
        return self.text


class Server:
    """A running server. What it lets users do is asked for its first one."""

    def __init__(self, process: Process, commands: Connection, output: Connection) -> None:
        self.process = process
        self.log = Log(output)
        self._commands = commands
        self.secret = self.log.find(r"admin\. The secret, shown this once: (\S+)")[1]
        self.port = int(self.log.find(r"http://127\.0\.0\.1:(\d+)")[1])
        self.log.find("Application startup complete")

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secret}"}

    def release(self) -> None:
        """Let go on what waits for it."""
        os.write(self._commands.fileno(), b".")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def limit(self, which: int, soft: int | None) -> None:
        """Set one of the limits that the system has for the process; None is as much as may be."""
        _, hard = resource.prlimit(self.pid, which)
        resource.prlimit(self.pid, which, (hard if soft is None else soft, hard))

    def exit_code(self) -> int:
        """Wait until the process has ended."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"it does not end:\n{self.log.text}"
        return int(self.process.exitcode)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, headers=self.headers, timeout=PATIENCE)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, headers=self.headers, timeout=PATIENCE, **body)

    def ready(self) -> tuple[int, str]:
        """What it says of itself."""
        answer = self.get("/ready")
        return answer.status_code, answer.text

    def said(self, conversation: str) -> list[tuple[str, str | None]]:
        """What is in a conversation in the database: contents, and what became of replies."""
        items = self.get(f"/v1/conversations/{conversation}").json().get("items", ())
        return [(item["content"], item.get("status")) for item in items]

    @contextmanager
    def connected(self) -> Iterator[Client]:
        """A connection by chat.v1."""
        with self.connection([Subprotocol("chat.v1")]) as connection:
            yield Client(connection)

    def connection(self, protocols: list[Subprotocol] | None = None) -> ClientConnection:
        """A connection, for plain text where it is for no protocol."""
        url = f"ws://127.0.0.1:{self.port}/ws"
        return connect(url, subprotocols=protocols, additional_headers=self.headers, max_queue=None, close_timeout=1)


class Client:
    """One who chats by chat.v1, and forgets nothing."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.heard: list[Json] = []
        self.conversation: str = self.hear("session.created")["session"]["conversation"]

    def ask(self, input: str, **fields: Any) -> None:
        request = {"input": input, "temperature": 0, **fields}
        self.connection.send(json.dumps({"type": "response.create", "event_id": input, "response": request}))

    def asked(self, input: str, **fields: Any) -> Json:
        """Ask, and wait until the reply is on its way."""
        self.ask(input, **fields)
        return dict(self.hear("response.created", event_id=input)["response"])

    def of(self, type: str, **wanted: Any) -> list[Json]:
        """The events so far with some fields, their own or their response's or error's."""
        fields = wanted.items()
        found = [event for event in self.heard if event["type"] == type]
        return [event for event in found if fields <= (event | event.get("response", event.get("error", {}))).items()]

    def hear(self, type: str, **wanted: Any) -> Json:
        """The first such event; wait for it if it has not come."""
        while not (found := self.of(type, **wanted)):
            try:
                self.heard.append(json.loads(self.connection.recv(PATIENCE)))
            except (TimeoutError, ConnectionClosed) as error:
                pytest.fail(f"{error!r} instead of {type} with {wanted}, after {self.heard}")
        return found[0]

    def done(self, id: str) -> tuple[str, str, str]:
        """Wait for a reply's end: what became of it, why, and its text, which is that of its deltas."""
        response = self.hear("response.done", id=id)["response"]
        deltas = (event["delta"] for event in self.of("response.output_text.delta", response_id=id))
        assert "".join(deltas) == response["output_text"]
        return response["status"], response["status_details"]["reason"], response["output_text"]

    def closed(self) -> tuple[int, str] | None:
        """Hear all that comes until the connection is closed, and with what."""
        try:
            while True:
                self.heard.append(json.loads(self.connection.recv(PATIENCE)))
        except ConnectionClosed as closed:
            return (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else None


@contextmanager
def launched(
    data: Path, app: str = "scripted", command: str = COMMANDS[0], quiet: bool = True, **settings: object
) -> Iterator[Server]:
    """An app of `tests.breakable`, run as by a command; `quiet` if there is to be no traceback in its log."""

    def start(environment: dict[str, str], stdin: Connection, output: Connection) -> Process:
        process = processes.Process(target=run, args=(app, command, environment, stdin, output), daemon=True)
        process.start()
        return process

    with _serving(start, data, settings, quiet) as server:
        yield server


@contextmanager
def spawned(data: Path, app: str, **settings: object) -> Iterator[Server]:
    """An app anywhere in the tests, run by `python -m uvicorn`."""

    def start(environment: dict[str, str], stdin: Connection, output: Connection) -> Process:
        command = [sys.executable, "-m", "uvicorn", app, "--port=0"]
        return Spawned(command, cwd=ROOT, env=os.environ | environment, stdin=stdin, stdout=output, stderr=output)

    with _serving(start, data, settings, quiet=True) as server:
        yield server


@contextmanager
def _serving(
    start: Callable[[dict[str, str], Connection, Connection], Process],
    data: Path,
    settings: dict[str, object],
    quiet: bool,
) -> Iterator[Server]:
    values = {"data": data, "context": 512, "slots": 4, "compile": False} | settings
    environment = {f"PARLEY_{name.upper()}": str(value) for name, value in values.items()}
    stdin, commands = processes.Pipe(duplex=False)
    lines, output = processes.Pipe(duplex=False)
    process = start(environment, stdin, output)
    stdin.close()
    output.close()
    with commands, lines:
        try:
            server = Server(process, commands, lines)
            yield server
        finally:
            process.kill()
            process.join(PATIENCE)
        text = server.log.whole()
    assert not (quiet and COMPLAINT.search(text)), text
