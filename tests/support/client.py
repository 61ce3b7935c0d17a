"""What tests do with Starlette's `TestClient`."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from models.validation import Json

ANN, BOB = "ann's secret", "bob's secret"  # the secrets of the two users of most tests


def bearer(secret: str = ANN) -> dict[str, str]:
    """The header with a secret; a new one each time, since the test client writes into what it is given."""
    return {"Authorization": f"Bearer {secret}"}


def bearer_subprotocol(secret: str) -> str:
    """The WebSocket subprotocol that carries a secret."""
    return "bearer." + base64.urlsafe_b64encode(secret.encode()).decode().rstrip("=")


def log_in(client: TestClient, secret: str = ANN) -> Any:
    """Send the login form; the response sets the session cookie."""
    return client.post("/login", data={"secret": secret}, follow_redirects=False)


def complete(client: Any, message: str, secret: str = ANN, model: str = "scripted", **more: Any) -> Any:
    """Ask for a chat completion; returns the response."""
    body = {"model": model, "messages": [{"role": "user", "content": message}], **more}
    return client.post("/v1/chat/completions", json=body, headers=bearer(secret))


ENDS = ("response.completed", "response.incomplete", "response.failed")  # the last events of a response


def ask(socket: Any, input: Any, **fields: Any) -> None:
    """Send a `response.create`."""
    socket.send_json({"type": "response.create", "input": input, "truncation": "auto", **fields})


def events_until(socket: Any, *types: str) -> list[Json]:
    """All events up to the first of some types, which is the last; without those of conversations, unless asked for."""
    events: list[Json] = []
    while not events or events[-1]["type"] not in types:
        event = socket.receive_json()
        if event["type"] in types or not event["type"].startswith("parley.conversation."):
            events.append(event)
    return events


def until(socket: Any, *types: str) -> Json:
    """The next event of some types."""
    return events_until(socket, *types)[-1]


def events_until_done(socket: Any) -> list[Json]:
    """All events up to the end of a response."""
    return events_until(socket, *ENDS)


def reply(socket: Any, input: Any, **fields: Any) -> Json:
    """Ask, and wait for the response."""
    ask(socket, input, **fields)
    response: Json = events_until_done(socket)[-1]["response"]
    return response


def text_of(response: Json) -> str:
    """The text of all messages in a response."""
    messages = [item for item in response["output"] if item["type"] == "message"]
    return "".join(part["text"] for message in messages for part in message["content"])


def close_code(socket: Any) -> int:
    """The code of the close, after everything that comes before it."""
    try:
        while True:
            socket.receive_text()
    except WebSocketDisconnect as disconnect:
        return disconnect.code


@contextmanager
def chat_v2(client: TestClient, secret: str = ANN) -> Iterator[Any]:
    """A connection by chat.v2 that has had its `parley.session.created`."""
    with client.websocket_connect("/ws", ["chat.v2"], headers=bearer(secret)) as socket:
        assert socket.receive_json()["type"] == "parley.session.created"
        yield socket


def converse(client: TestClient, *inputs: str, conversation: str = "new", secret: str = ANN) -> str:
    """Send some messages as a user and wait for the replies; returns the id of the conversation."""
    with chat_v2(client, secret) as socket:
        for input in inputs:
            conversation = reply(socket, input, conversation=conversation)["conversation"]["id"]
    return conversation


CONTENT_SECURITY_POLICY = {
    "default-src 'self'",
    "img-src 'self' data:",
    "base-uri 'none'",
    "form-action 'self'",
    "frame-ancestors 'none'",
}


def assert_security_headers(response: Any, cache: str = "no-store") -> None:
    """Check the headers that protect browsers."""
    headers = response.headers
    policy = headers["content-security-policy"].split(";")
    assert {directive.strip() for directive in policy} == CONTENT_SECURITY_POLICY
    assert len(policy) == len(CONTENT_SECURITY_POLICY)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"] == cache
    for name in ("content-security-policy", "cache-control", "referrer-policy", "x-content-type-options"):
        assert len(headers.get_list(name)) == 1
    assert "access-control-allow-origin" not in headers
