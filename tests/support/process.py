"""A server in a process of its own, for those who start, signal, watch and use it."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import resource
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, closing, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from models.store.item import node_id
from models.validation import Json
from tests.support.breakable import run
from tests.support.client import ENDS, text_of

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0  # seconds to wait for anything, before the test fails
COMMANDS = ("python server.py", "uvicorn server:app")
RESTARTS = (1012, "the server restarts")  # how connections are closed at the end
COMPLAINT = re.compile("Traceback|was destroyed|never retrieved|never awaited|Exception ignored")

# A process that imports everything once. Each server is a fork of it.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([f"tests.support.{name}" for name in ("jumping_clock", "breakable", "survivor")])
_starting = threading.Lock()


def fork(target: Callable[..., None], *arguments: object) -> ForkServerProcess:
    """Start a function in a fork of the process that has imported everything."""
    with _starting, chdir(ROOT):  # where the fork server of Python 3.11 looks for modules, else it imports none
        multiprocessing.forkserver.ensure_running()
    process = processes.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def until(condition: Callable[[], T], what: str) -> T:
    """Wait until a condition is true, and return its value. `what` describes it."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.02)
    return value


def stored(data: Path) -> list[tuple[str, str | None, str | None]]:
    """The items in the database of a server that has ended: content, status and reason."""
    with closing(sqlite3.connect(data / "parley.db")) as database:
        return database.execute("SELECT content, status, reason FROM items ORDER BY created, depth").fetchall()


class Pipe(Protocol):
    """The reading end of a pipe."""

    def fileno(self) -> int: ...


class Log:
    """The output of a process, read while it comes."""

    def __init__(self, pipe: Pipe) -> None:
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
        """Wait for a pattern."""
        with self._more:
            self._more.wait_for(lambda: self._ended or re.search(pattern, self.text), PATIENCE)
        found = re.search(pattern, self.text)
        assert found, f"{pattern!r} is not in the log:\n{self.text}"
        return found

    def whole(self) -> str:
        """All of it, once the process has ended."""
        self._reading.join(PATIENCE)
        assert self._ended, "the process still writes"
        return self.text


class Child:
    """A process that runs an app of `tests.support.breakable`. It is killed at the end of the context."""

    def __init__(self, process: ForkServerProcess, log: Log, commands: Connection) -> None:
        self.process = process
        self.log = log
        self.commands = commands

    @classmethod
    @contextmanager
    def running(cls, app: str, command: str, **settings: object) -> Iterator[Child]:
        """Run an app by a command, with some settings in its environment. A name in capitals is any variable."""
        environment = {
            name if name.isupper() else f"PARLEY_{name.upper()}": str(value) for name, value in settings.items()
        }
        stdin, commands = processes.Pipe(duplex=False)
        lines, output = processes.Pipe(duplex=False)
        process = fork(run, app, command, environment, stdin, output)
        stdin.close()
        output.close()
        with commands, lines:
            child = cls(process, Log(lines), commands)
            try:
                yield child
            finally:
                process.kill()
                process.join(PATIENCE)
                child.log.whole()

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    def exit_code(self) -> int:
        """Wait until the process has ended."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"it does not end:\n{self.log.text}"
        return self.process.exitcode


class Program(Protocol):
    """A process that runs a server."""

    log: Log

    @property
    def pid(self) -> int: ...

    def exit_code(self) -> int:
        """Wait until the process has ended."""


class Server:
    """A server that has started, and its first user."""

    def __init__(self, child: Program) -> None:
        self.child = child
        self.log = child.log
        self.secret = self.log.find(r"admin\. The secret, shown only this once: (\S+)")[1]
        self.port = int(self.log.find(r"http://127\.0\.0\.1:(\d+)")[1])
        self.log.find("Application startup complete")

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secret}"}

    def release(self) -> None:
        """Let the replies go on that wait for this."""
        assert isinstance(self.child, Child)
        os.write(self.child.commands.fileno(), b".")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def limit(self, which: int, soft: int | None) -> None:
        """Set a limit of the operating system for the process; None is the highest one allowed."""
        _, hard = resource.prlimit(self.pid, which)
        resource.prlimit(self.pid, which, (hard if soft is None else soft, hard))

    def exit_code(self) -> int:
        """Wait until the process has ended."""
        return self.child.exit_code()

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self._request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx2.Response:
        return self._request("POST", path, **options)

    def ready(self) -> tuple[int, str]:
        """The status and text of `/ready`."""
        response = self.get("/ready")
        return response.status_code, response.text

    def items(self, conversation: str) -> list[tuple[str, str | None]]:
        """The stored turns of a conversation: the text of each, and the status of replies."""
        turns = self.get(f"/v1/conversations/{conversation}/branch").json().get("data", ())
        return [
            (text_of(turn), turn["status"]) if "output" in turn else (turn["content"][0]["text"], None)
            for turn in turns
        ]

    @contextmanager
    def connected(self) -> Iterator[Client]:
        """A connection by chat.v2."""
        with self.connection([Subprotocol("chat.v2")]) as connection:
            yield Client(connection)

    def connection(self, protocols: list[Subprotocol] | None = None) -> ClientConnection:
        """A connection; plain text without protocols."""
        options = {"additional_headers": self.headers, "max_queue": None, "close_timeout": 1}
        return connect(self.ws, subprotocols=protocols, **options)  # type: ignore[arg-type]

    def _request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        options = options | {"headers": self.headers, "timeout": PATIENCE}
        return httpx2.request(method, self.url + path, verify=False, **options)  # to read certificates takes 40 ms


class Client:
    """A client of chat.v2 that keeps all events. Its requests are in one conversation, unless they say otherwise."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.events: list[Json] = []
        self.conversation = "new"
        self.wait_for("parley.session.created")

    def ask(self, input: str, **fields: Any) -> None:
        """Send a `response.create`, with the input as stream id too."""
        request = {"input": input, "conversation": self.conversation, "temperature": 0, "truncation": "auto", **fields}
        self.connection.send(json.dumps({"type": "response.create", "stream_id": input, **request}))

    def start(self, input: str, **fields: Any) -> Json:
        """Ask, and wait until the response is created."""
        self.ask(input, **fields)
        response = dict(self.wait_for("response.created", stream_id=input)["response"])
        if "conversation" not in fields:
            self.conversation = response["conversation"]["id"]
        return response

    def find(self, *types: str, **fields: Any) -> list[Json]:
        """The events so far with some fields, their own ones or those of their response or error."""

        def matches(event: Json) -> bool:
            inner: Json = event.get("response") or event.get("error") or {}
            return event["type"] in types and fields.items() <= (event | inner).items()

        return [event for event in self.events if matches(event)]

    def wait_for(self, *types: str, **fields: Any) -> Json:
        """The first such event, which may have come already."""
        while not (found := self.find(*types, **fields)):
            try:
                self.events.append(json.loads(self.connection.recv(PATIENCE)))
            except (TimeoutError, ConnectionClosed) as error:
                pytest.fail(f"{error!r} instead of {types} with {fields}, after {self.events}")
        return found[0]

    def outcome(self, id: str) -> tuple[str, str | None, str]:
        """Wait for the end of a response: its status, why it did not complete, and its text, which is that of its
        deltas."""
        response = self.wait_for(*ENDS, id=id)["response"]
        text = text_of(response)
        deltas = self.find("response.output_text.delta")
        assert "".join(event["delta"] for event in deltas if node_id(event["item_id"]) == id) == text
        why = (response["incomplete_details"] or {}).get("reason") or (response["error"] or {}).get("message")
        return response["status"], why, text

    def wait_for_close(self) -> tuple[int, str] | None:
        """Keep all events until the connection is closed; returns the code and the reason."""
        try:
            while True:
                self.events.append(json.loads(self.connection.recv(PATIENCE)))
        except ConnectionClosed as closed:
            return (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else None


@contextmanager
def launched(
    data: Path, app: str = "scripted", command: str = COMMANDS[0], quiet: bool = True, **settings: object
) -> Iterator[Server]:
    """A server with an app of `tests.support.breakable`. Where `quiet` is set, its log must have no traceback."""
    settings = {"data": data, "context": 512, "slots": 4, "compile": False} | settings
    with Child.running(app, command, **settings) as child:
        yield Server(child)
    assert not (quiet and COMPLAINT.search(child.log.text)), child.log.text
