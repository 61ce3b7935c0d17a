"""PARLEY_RATE and PARLEY_TOKEN_RATE, whichever way a client asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from starlette.testclient import TestClient

from models.settings import Settings
from models.validation import Json
from server import create_app
from tests.support.client import ANN, BOB, ENDS, ask, bearer, complete, events_until_done, until
from tests.support.tiny import opens_tiny


def request_completion(client: TestClient, secret: str = ANN, stream: bool = False) -> Any:
    return complete(client, "Hi", secret, model="SmolLM2-135M-Instruct", max_tokens=2, stream=stream)


def request_reply(socket: Any) -> Json:
    """The last event of a request: the end of the reply, or the error."""
    ask(socket, "Hi", max_output_tokens=2)
    return until(socket, *ENDS, "error")


def test_requests_by_websocket_and_by_http_count_together(settings: Settings) -> None:
    with TestClient(create_app(replace(settings, rate="4/day"), opens_tiny)) as client:
        with (
            client.websocket_connect("/ws", ["chat.v2"], headers=bearer()) as first,
            client.websocket_connect("/ws?userid=ann", ["chat.v2"], headers=bearer()) as second,
            client.websocket_connect("/ws", headers=bearer()) as plain,
        ):
            for socket in (first, second):
                until(socket, "parley.session.created")
                assert request_reply(socket)["type"] == "response.incomplete"
            assert request_completion(client).status_code == 200
            assert request_completion(client, stream=True).status_code == 200
            for stream in (False, True):
                response = request_completion(client, stream=stream)
                assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
                assert 0 < int(response.headers["retry-after"]) <= 86_400
            for socket in (first, second):
                error = request_reply(socket)["error"]
                assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
            plain.send_text("Hi")
            assert plain.receive_text().startswith("error: you may have 4 requests per 1 day")
        assert request_completion(client, BOB).status_code == 200


def test_tokens_by_websocket_and_by_http_count_together(settings: Settings) -> None:
    with TestClient(create_app(replace(settings, token_rate="30/day"), opens_tiny)) as client:
        assert request_completion(client).json()["usage"]["total_tokens"] > 15
        with client.websocket_connect("/ws", ["chat.v2"], headers=bearer()) as socket:
            until(socket, "parley.session.created")
            ask(socket, "Hi", max_output_tokens=2)
            assert events_until_done(socket)[-1]["response"]["usage"]["total_tokens"] > 15
            assert "tokens" in request_reply(socket)["error"]["message"]
        assert request_completion(client).status_code == 429
        assert request_completion(client, BOB).status_code == 200
