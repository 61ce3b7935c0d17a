"""What tests do with a real WebSocket client, at a real server."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from models.validation import Json
from tests.support.client import ANN, ENDS, bearer
from tests.support.serving import Served

T = TypeVar("T")


@contextmanager
def chat_v2(served: Served, secret: str = ANN, **options: Any) -> Iterator[ClientConnection]:
    """A connection by chat.v2 that has had its `parley.session.created`."""
    protocols = [Subprotocol("chat.v2")]
    with connect(
        served.ws, subprotocols=protocols, additional_headers=bearer(secret), max_size=None, **options
    ) as connection:
        assert json.loads(connection.recv())["type"] == "parley.session.created"
        yield connection


def ask(connection: ClientConnection, input: str, **fields: Any) -> None:
    """Send a `response.create`."""
    connection.send(json.dumps({"type": "response.create", "input": input, "truncation": "auto", **fields}))


def resume(connection: ClientConnection, response_id: str, starting_after: int = -1, **fields: Any) -> None:
    """Send a `parley.response.resume`."""
    event = {"type": "parley.response.resume", "response_id": response_id, "starting_after": starting_after}
    connection.send(json.dumps(event | fields))


def receive(connection: ClientConnection) -> Json:
    """The next event that is not of a conversation."""
    while (event := json.loads(connection.recv()))["type"].startswith("parley.conversation."):
        pass
    return dict(event)


def events_until(connection: ClientConnection, *types: str) -> list[Json]:
    """All events up to the first of some types, which is the last; without those of conversations."""
    events = [receive(connection)]
    while events[-1]["type"] not in types:
        events.append(receive(connection))
    return events


def events_until_done(connection: ClientConnection) -> list[Json]:
    """All events up to the end of a response."""
    return events_until(connection, *ENDS)


def close_code(connection: ClientConnection) -> int | None:
    """The code of the close, after everything that comes before it."""
    try:
        while True:
            connection.recv()
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None


def server_tracebacks(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the server logged with a traceback; the client in this process may have trouble of its own."""
    return [record for record in caplog.records if record.exc_info and record.name != "websockets.client"]


def call(served: Served, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in the event loop of a server."""
    return asyncio.run_coroutine_threadsafe(coroutine, served.loop).result()


async def all_tasks() -> set[asyncio.Task[Any]]:
    """The tasks of the event loop that runs this."""
    return asyncio.all_tasks()


async def wait_for_other_tasks(before: set[asyncio.Task[Any]]) -> None:
    """Wait until no task is left but those that were there before."""
    while others := asyncio.all_tasks() - before - {own for own in [asyncio.current_task()] if own}:
        await asyncio.wait(others)
