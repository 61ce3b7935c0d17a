"""A server with several models: clients choose one by its name, in every protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from models.model_info import ModelInfo
from models.options import Options
from models.settings import Settings
from server import create_app
from tests.support.client import ANN
from tests.support.scripted import ScriptedChat

HEADERS = {"Authorization": f"Bearer {ANN}"}
HI = [{"role": "user", "content": "say hi"}]


@pytest.fixture
def scripted() -> ScriptedChat:
    chat = ScriptedChat()
    chat.other_models = ("large", "huge")
    return chat


@pytest.fixture
def client(settings: Settings, scripted: ScriptedChat) -> Iterator[TestClient]:
    aliases = ("gpt-4o-mini", "gpt-4o=large")
    with TestClient(create_app(replace(settings, model_aliases=aliases), scripted.opened), headers=HEADERS) as client:
        yield client


def test_all_models_are_listed_with_their_other_names(client: TestClient) -> None:
    listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert listed == ["scripted", "gpt-4o-mini", "large", "gpt-4o", "huge"]
    assert client.get("/v1/models/huge").json()["id"] == "huge"


@pytest.mark.parametrize(
    ("name", "asked"), [("scripted", "scripted"), ("gpt-4o-mini", "scripted"), ("gpt-4o", "large"), ("huge", "huge")]
)
def test_every_protocol_asks_the_model_that_a_request_names(
    client: TestClient, scripted: ScriptedChat, name: str, asked: str
) -> None:
    chat = client.post("/v1/chat/completions", json={"model": name, "messages": HI}).json()
    text = client.post("/v1/completions", json={"model": name, "prompt": "say hi"}).json()
    response = client.post("/v1/responses", json={"model": name, "input": "say hi"}).json()
    assert [one["model"] for one in (chat, text, response)] == [name] * 3
    with client.websocket_connect("/v1/responses") as socket:
        socket.send_json({"type": "response.create", "model": name, "input": "say hi"})
        assert socket.receive_json()["response"]["model"] == name
        while socket.receive_json()["type"] != "response.completed":
            pass
    assert [request.model for request in scripted.requests] == [asked] * 4


def test_a_request_that_names_no_model_asks_the_first(client: TestClient, scripted: ScriptedChat) -> None:
    assert client.post("/v1/responses", json={"input": "say hi"}).json()["model"] == "scripted"
    assert [request.model for request in scripted.requests] == ["scripted"]


@pytest.mark.parametrize(
    ("path", "body"),
    [("chat/completions", {"messages": HI}), ("completions", {"prompt": "say hi"}), ("responses", {"input": "say hi"})],
)
def test_the_error_for_an_unknown_model_names_all_models(
    client: TestClient, path: str, body: dict[str, object]
) -> None:
    answer = client.post(f"/v1/{path}", json={"model": "gpt-5", **body})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "scripted, large, huge" in answer.json()["error"]["message"]


def test_a_stored_response_keeps_the_name_of_its_model(client: TestClient, scripted: ScriptedChat) -> None:
    id = client.post("/v1/responses", json={"model": "large", "input": "say hi", "temperature": 0.1}).json()["id"]
    scripted.models.replace([ModelInfo("new", 4096, Options(temperature=0.9))])
    told = client.get(f"/v1/responses/{id}").json()
    assert (told["model"], told["temperature"]) == ("large", 0.1)


def test_the_page_learns_of_all_models(client: TestClient) -> None:
    with client.websocket_connect("/ws", subprotocols=["chat.v2"]) as socket:
        session = socket.receive_json()["session"]
    assert session["model"] == "scripted"
    assert [model["model"] for model in session["models"]] == ["scripted", "large", "huge"]
    assert session["models"][1].keys() == {"model", "context_length", "options", "capabilities"}
