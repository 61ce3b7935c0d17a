"""What the page is told on `/ws` beside the standard: more of each response, and its end in any case."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from models.settings import Settings
from server import create_app
from tests.support.client import ask, bearer, chat_v2, events_until_done, reply
from tests.support.scripted import ScriptedChat


@pytest.fixture
def client(settings: Settings, scripted: ScriptedChat) -> Iterator[TestClient]:
    with TestClient(create_app(settings, scripted.opened)) as client:
        yield client


def test_responses_and_the_branch_tell_the_node_before_each_one(client: TestClient) -> None:
    with chat_v2(client) as socket:
        ask(socket, "say one", conversation="new", temperature=1)
        created, *_, done = events_until_done(socket)
        conversation = created["response"]["conversation"]["id"]
        reply(socket, "say two", conversation=conversation)
    branch = client.get(f"/v1/conversations/{conversation}/branch", headers=bearer()).json()["data"]
    parents = [None, *(node["id"] for node in branch)]
    assert [node["parley"]["parent"] for node in branch] == parents[:-1]
    assert created["response"]["parley"]["parent"] == branch[0]["id"]
    assert created["response"]["parley"]["options"] == {"temperature": 1}
    del branch[1]["parley"]["versions"]
    assert done["response"] == branch[1]


def test_a_reply_without_a_question_of_its_own_tells_the_node_before_it(client: TestClient) -> None:
    with chat_v2(client) as socket:
        first = reply(socket, "say one", conversation="new")
        place = {"id": first["conversation"]["id"], "after": first["parley"]["parent"]}
        socket.send_json({"type": "response.create", "input": [], "conversation": place})
        again = events_until_done(socket)[0]["response"]
    assert again["parley"]["parent"] == first["parley"]["parent"]


def test_the_standard_socket_tells_nothing_of_it(client: TestClient) -> None:
    with client.websocket_connect("/v1/responses", headers=bearer()) as socket:
        assert "parley" not in reply(socket, "say one")


def test_the_end_is_sent_to_a_client_that_has_seen_more_than_is_stored(client: TestClient) -> None:
    with chat_v2(client) as socket:
        response = reply(socket, "say one", conversation="new")
        socket.send_json(
            {"type": "parley.response.resume", "response_id": response["id"], "starting_after": 1000, "stream_id": "s"}
        )
        [done] = events_until_done(socket)
    assert (done["type"], done["stream_id"], done["response"]) == ("response.completed", "s", response)
