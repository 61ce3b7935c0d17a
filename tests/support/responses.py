"""What tests do with the Responses API over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from starlette.testclient import TestClient

from models.validation import Json
from tests.support.client import ANN, ENDS, bearer
from tests.support.openai_types import check_stream

PARTS = 'think hm, so | say I look | call f {"a": 1} | call g {} | say done'  # of a reply with parts of every kind


def create(client: TestClient, input: Any, status: int = 200, secret: str = ANN, **fields: Any) -> Json:
    """What `POST /v1/responses` answers."""
    response = client.post("/v1/responses", json={"input": input, **fields}, headers=bearer(secret))
    assert response.status_code == status, response.text
    return dict(response.json())


def stream(client: TestClient, input: Any, **fields: Any) -> list[Json]:
    """The events of a response that is streamed."""
    body = {"input": input, "stream": True, **fields}
    response = client.post("/v1/responses", json=body, headers=bearer())
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text.splitlines())


def get(client: TestClient, path: str, status: int = 200, **parameters: Any) -> Json:
    """What a path under `/v1/responses` answers."""
    response = client.get(f"/v1/responses/{path}", params=parameters, headers=bearer())
    assert response.status_code == status, response.text
    return dict(response.json())


def follow(client: TestClient, id: str, starting_after: int | None = None) -> list[Json]:
    """The events of a response after a number, once it has ended."""
    parameters: Json = {"stream": "true"} | ({} if starting_after is None else {"starting_after": starting_after})
    response = client.get(f"/v1/responses/{id}", params=parameters, headers=bearer())
    assert response.status_code == 200, response.text
    return events_of(response.text.splitlines())


def events_of(lines: Iterable[str]) -> list[Json]:
    """The events in the lines of server-sent events."""
    events: list[Json] = []
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            events.append(json.loads(value))
            assert events[-1]["type"] == name
    return events


def check_events(events: list[Json]) -> Json:
    """Check that events are all those of one response, as the SDK has them; returns the response at the end."""
    check_stream(events)
    assert [event["type"] for event in events if event["type"] in ENDS] == [events[-1]["type"]]
    texts = dict[int, str]()
    for event in events:
        if event["type"].endswith(".delta"):
            assert event["delta"], "a delta is never empty"
            index = event["output_index"]
            texts[index] = texts.get(index, "") + event["delta"]
    response: Json = events[-1]["response"]
    for index, item in enumerate(response["output"]):
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert texts.get(index, "") == text
    return response
