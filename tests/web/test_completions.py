"""OpenAI's API over HTTP; tests/system/test_openai.py has more, with OpenAI's own package."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from models.settings import Settings
from models.validation import Json
from server import create_app
from tests.support.client import ANN, bearer, complete
from tests.support.running_app import RunningApp, start
from tests.support.scripted import ScriptedChat


def test_the_one_model_is_listed(client: TestClient) -> None:
    listed = client.get("/v1/models", headers=bearer()).json()
    (model,) = listed["data"]
    assert listed == {"object": "list", "data": [model]}
    assert list(model) == ["id", "object", "created", "owned_by", "max_model_len"]
    assert (model["id"], model["max_model_len"]) == ("scripted", 4096)
    assert client.get("/v1/models/scripted", headers=bearer()).json() == model


@pytest.mark.parametrize("id", ["other", "owner/other"])
def test_another_model_is_not_found(client: TestClient, id: str) -> None:
    response = client.get(f"/v1/models/{id}", headers=bearer())
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    response = complete(client, "say yes", model=id)
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")


def test_a_completion_is_returned_as_one_object(client: TestClient) -> None:
    response = complete(client, "say all of it")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json()["choices"][0]["message"]["content"] == "all of it"


def test_a_stream_is_sent_as_events_that_proxies_pass_on(client: TestClient) -> None:
    response = complete(client, "say all of it", stream=True)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    *events, end = response.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == "all of it"


@pytest.mark.parametrize("stream", [False, True], ids=["one object", "stream"])
def test_a_refusal_has_a_status_and_an_error_object(
    own_client: TestClient, scripted: ScriptedChat, stream: bool
) -> None:
    scripted.admission.per_user = 0
    response = complete(own_client, "say yes", stream=stream)
    assert (response.status_code, response.headers["retry-after"]) == (429, "5")
    assert list(response.json()["error"]) == ["message", "type", "param", "code"]
    assert response.json()["error"]["code"] == "too_many_responses"


def test_a_completion_with_a_bad_body_is_refused(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", content=b"{", headers=bearer())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_the_end_user_is_logged_with_the_user(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    complete(client, "say yes", user="visitor 7")
    (message,) = [record.getMessage() for record in caplog.records if "visitor 7" in record.getMessage()]
    assert "user=ann" in message


def start_with(settings: Settings, *aliases: str) -> AbstractContextManager[RunningApp]:
    return start(create_app(replace(settings, model_aliases=aliases), ScriptedChat().opened))


def test_a_model_is_found_by_its_other_names(settings: Settings) -> None:
    with start_with(settings, "gpt-4o", "org/other", "gpt-4o") as app:
        client = app.client()
        listed = client.get("/v1/models", headers=bearer()).json()["data"]
        assert [model["id"] for model in listed] == ["scripted", "gpt-4o", "org/other"]
        assert client.get("/v1/models/org/other", headers=bearer()).json() == listed[2]
        for name in ("scripted", "gpt-4o", "org/other"):
            assert complete(client, "say yes", model=name).json()["model"] == name
        assert complete(client, "say yes", model="gpt-5").status_code == 404


def test_a_model_may_have_every_name(settings: Settings) -> None:
    with start_with(settings, "*") as app:
        client = app.client()
        assert [model["id"] for model in client.get("/v1/models", headers=bearer()).json()["data"]] == ["scripted"]
        assert client.get("/v1/models/any/name", headers=bearer()).json()["id"] == "any/name"
        assert '"model":"any/name"' in complete(client, "say yes", model="any/name", stream=True).text


def test_a_text_is_continued(client: TestClient) -> None:
    body: Json = {"model": "scripted", "prompt": "say and so on"}
    whole = client.post("/v1/completions", json=body, headers=bearer()).json()
    assert (whole["object"], whole["choices"][0]["text"]) == ("text_completion", "and so on")
    response = client.post("/v1/completions", json=body | {"stream": True}, headers=bearer())
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, end = response.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
    assert "".join(texts) == "and so on"


class HangingUp:
    """A client that sends a request and hangs up when `gone` is set. The server sets `listens` when it waits for that,
    and `started` when it begins its response."""

    def __init__(self, body: Any) -> None:
        self.body = json.dumps(body).encode()
        self.sent = False
        self.gone, self.listens = asyncio.Event(), asyncio.Event()
        self.started = asyncio.Event()
        self.messages: list[Any] = []

    async def receive(self) -> Any:
        if not self.sent:
            self.sent = True
            return {"type": "http.request", "body": self.body}
        self.listens.set()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(message)
        self.started.set()


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("order", ["wait", "hold"])
@pytest.mark.parametrize("stream", [False, True], ids=["one object", "stream"])
def test_a_client_that_hangs_up_ends_its_reply(
    own_app: RunningApp, scripted: ScriptedChat, stream: bool, order: str, choices: int
) -> None:
    messages = [{"role": "user", "content": f"{order} here"}]
    client = HangingUp({"model": "scripted", "messages": messages, "stream": stream, "n": choices})
    headers = [(b"authorization", f"Bearer {ANN}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}

    async def hang_up() -> None:
        request = asyncio.create_task(own_app.app({**scope}, client.receive, client.send))
        async with asyncio.timeout(10):  # else a reply that goes on would be awaited for ever
            await client.listens.wait()
            if stream:
                await client.started.wait()
            client.gone.set()
            await request

    own_app.call(hang_up)
    assert client.messages[0]["status"] == 200
    assert (scripted.running, dict(scripted.admission.in_flight)) == (0, {})
