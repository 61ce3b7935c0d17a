from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.testclient import TestClient

from models.settings import Settings
from models.store.conversations import Conversations
from models.store.item import Item
from models.validation import Json
from models.web.request_body import BODY_BYTES
from server import create_app
from tests.support.client import ANN, bearer, chat_v2, converse, events_until, events_until_done, reply, text_of
from tests.support.responses import create
from tests.support.running_app import RunningApp
from tests.support.scripted import ScriptedChat, keeping_in


class CountingConversations(Conversations):
    """A store that counts how often items are listed."""

    def __init__(self, database: AsyncEngine) -> None:
        super().__init__(database)
        self.listed = 0

    async def list_items(
        self, user: str, id: str, limit: int, after: str | None = None, ascending: bool = False
    ) -> tuple[list[Item], bool]:
        self.listed += 1
        return await super().list_items(user, id, limit, after, ascending)


FIELDS = ["id", "object", "created_at", "metadata", "title", "updated_at", "leaf", "response_id"]


@pytest.fixture
def secret(shared_app: RunningApp) -> str:
    """The secret of a user who has no conversations yet."""
    return shared_app.new_user()


def get(client: TestClient, path: str, status: int = 200, secret: str = ANN, **parameters: Any) -> Json:
    """What a path under /v1/conversations answers."""
    response = client.get(f"/v1/conversations{path}", params=parameters, headers=bearer(secret))
    assert response.status_code == status, response.text
    return dict(response.json())


def post(client: TestClient, path: str, status: int = 200, **body: Any) -> Json:
    """What a path under /v1/conversations answers to a body."""
    response = client.post(f"/v1/conversations{path}", json=body, headers=bearer())
    assert response.status_code == status, response.text
    return dict(response.json())


def texts(page: Json) -> list[str]:
    """The texts of a list of message items."""
    return [item["content"][0]["text"] for item in page["data"]]


def turns(branch: Json) -> list[str]:
    """The texts of the turns of a branch."""
    return [text_of(turn) if "output" in turn else turn["content"][0]["text"] for turn in branch["data"]]


def user(text: str) -> Json:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


# List


def test_conversations_are_listed_latest_first_in_pages(client: TestClient, secret: str) -> None:
    made = [converse(client, f"say {number}", secret=secret) for number in range(5)]
    listed: list[str] = []
    parameters: Json = {"limit": 2}
    while True:
        page = get(client, "", secret=secret, **parameters)
        listed += [conversation["id"] for conversation in page["data"]]
        if not page["has_more"]:
            break
        parameters["after"] = listed[-1]
    assert listed == made[::-1]
    assert list(page) == ["object", "data", "first_id", "last_id", "has_more"]
    assert list(page["data"][0]) == FIELDS


def test_conversations_are_found_by_their_text(client: TestClient, secret: str) -> None:
    converse(client, "say one", secret=secret)
    wanted = converse(client, "say the needle is here", "say two", secret=secret)
    found = get(client, "", secret=secret, query="NEEDLE")
    assert [conversation["id"] for conversation in found["data"]] == [wanted]


def test_responses_without_a_conversation_are_not_listed(client: TestClient, secret: str) -> None:
    with chat_v2(client, secret) as socket:
        first = reply(socket, "say one")
        assert reply(socket, "say two", previous_response_id=first["id"])["conversation"] is None
    assert get(client, "", secret=secret)["data"] == []


def test_a_user_without_conversations_gets_an_empty_list(client: TestClient, secret: str) -> None:
    empty: Json = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert get(client, "", secret=secret) == empty


@pytest.mark.parametrize("parameter", ["limit", "query"])
def test_a_bad_listing_is_refused(client: TestClient, parameter: str) -> None:
    error = get(client, "", 400, **{parameter: "x" * 300})["error"]
    assert (error["code"], error["param"]) == ("invalid_value", parameter)


def test_a_page_after_an_unknown_conversation_is_not_found(client: TestClient) -> None:
    assert get(client, "", 404, after="conv_unknown")["error"]["code"] == "conversation_not_found"


# Create


def test_an_empty_conversation_is_created_without_a_body(client: TestClient) -> None:
    response = client.post("/v1/conversations", headers=bearer())
    assert response.status_code == 200
    made = response.json()
    assert list(made) == FIELDS
    assert (made["object"], made["metadata"], made["leaf"]) == ("conversation", {}, None)
    assert get(client, f"/{made['id']}") == made
    assert get(client, f"/{made['id']}/items")["data"] == []


def test_a_conversation_is_created_with_items_metadata_and_a_title(client: TestClient) -> None:
    call = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "call_1", "output": "7"}
    made = post(client, "", items=[user("one"), call, output], metadata={"topic": "numbers"}, title="Numbers")
    assert (made["metadata"], made["title"]) == ({"topic": "numbers"}, "Numbers")
    items = get(client, f"/{made['id']}/items", order="asc")["data"]
    assert [item["type"] for item in items] == ["message", "function_call", "function_call_output"]
    for sent, item in zip((user("one"), call, output), items, strict=True):
        assert sent.items() <= item.items()
    assert made["leaf"] == items[-1]["id"]


def test_a_reply_continues_a_created_conversation(client: TestClient) -> None:
    id = post(client, "", items=[user("one"), {"role": "assistant", "content": "two"}])["id"]
    with chat_v2(client) as socket:
        assert reply(socket, "say three", conversation=id)["conversation"] == {"id": id}
    assert texts(get(client, f"/{id}/items", order="asc")) == ["one", "two", "say three", "three"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"items": "one"}, "items"),
        ({"items": 21 * [user("one")]}, "items"),
        ({"items": [{"type": "item_reference", "id": "msg_1"}]}, "items[0]"),
        ({"metadata": {"topic": 7}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"title": " "}, "title"),
        ({"colour": "red"}, "colour"),
    ],
    ids=["no list", "too many", "reference", "number in metadata", "too much metadata", "empty title", "unknown"],
)
def test_a_bad_new_conversation_is_refused(client: TestClient, body: Json, param: str) -> None:
    before = get(client, "", limit=100)
    assert post(client, "", 400, **body)["error"]["param"] == param
    assert get(client, "", limit=100) == before


# Items


def test_the_items_of_a_conversation_are_listed_in_pages_and_in_either_order(client: TestClient) -> None:
    path = f"/{converse(client, 'say one', 'perform think hm | say two | call f {}')}/items"
    items = get(client, path, order="asc")["data"]
    kinds = ["message", "message", "message", "reasoning", "message", "function_call"]
    assert [item["type"] for item in items] == kinds
    assert get(client, path)["data"] == items[::-1]
    for order, expected in (("asc", items), ("desc", items[::-1])):
        for limit in (1, 2, 4):
            listed: list[Json] = []
            parameters: Json = {"limit": limit, "order": order}
            while True:
                page = get(client, path, **parameters)
                listed += page["data"]
                assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
                if not page["has_more"]:
                    break
                parameters["after"] = page["last_id"]
            assert listed == expected
    for item in items:
        assert get(client, f"{path}/{item['id']}") == item


def test_items_are_added_to_a_conversation(client: TestClient) -> None:
    id = converse(client, "say one")
    added = post(client, f"/{id}/items", items=[user("two"), {"role": "assistant", "content": "three"}])
    assert (added["object"], texts(added), added["has_more"]) == ("list", ["two", "three"], False)
    assert texts(get(client, f"/{id}/items", order="asc")) == ["say one", "one", "two", "three"]
    assert get(client, f"/{id}")["leaf"] == added["last_id"]


def test_no_items_are_added_while_a_reply_runs(own_client: TestClient) -> None:
    with chat_v2(own_client) as socket:
        socket.send_json({"type": "response.create", "input": "wait here", "conversation": "new"})
        id = events_until(socket, "response.created")[-1]["response"]["conversation"]["id"]
        error = post(own_client, f"/{id}/items", 409, items=[user("two")])["error"]
        assert error["code"] == "conversation_locked"


def test_a_deleted_item_is_gone_and_what_follows_stays(client: TestClient) -> None:
    id = converse(client, "say one", "perform say two | call f {}", "say three")
    items = get(client, f"/{id}/items", order="asc")["data"]
    gone = [items[0]["id"], items[3]["id"]]
    for item in gone:
        response = client.delete(f"/v1/conversations/{id}/items/{item}", headers=bearer())
        assert (response.status_code, response.json()["object"]) == (200, "conversation")
        assert get(client, f"/{id}/items/{item}", 404)["error"]["code"] == "item_not_found"
    assert get(client, f"/{id}/items", order="asc")["data"] == [item for item in items if item["id"] not in gone]


def test_many_replies_without_items_are_passed_at_once(settings: Settings, scripted: ScriptedChat) -> None:
    app = create_app(settings, keeping_in(CountingConversations, scripted.opened))
    with TestClient(app) as client:
        id = post(client, "", items=[user("one")])["id"]
        for _ in range(5):
            create(client, [], conversation=id, generate=False)
        assert texts(get(client, f"/{id}/items", limit=1)) == ["one"]
        assert app.state.conversations.listed == 2


def test_the_empty_message_of_a_reply_that_says_nothing_is_an_item(client: TestClient) -> None:
    id = converse(client, "say ")
    item = get(client, f"/{id}/items")["data"][0]
    assert (item["status"], texts({"data": [item]})) == ("completed", [""])
    assert get(client, f"/{id}/items/{item['id']}") == item


def test_an_unknown_item_is_not_found(client: TestClient) -> None:
    id, other = converse(client, "say one"), converse(client, "say two")
    for item in ("msg_unknown", "msg_1_0", get(client, f"/{other}/items")["last_id"]):
        for method in ("GET", "DELETE"):
            response = client.request(method, f"/v1/conversations/{id}/items/{item}", headers=bearer())
            assert (response.status_code, response.json()["error"]["code"]) == (404, "item_not_found")


def test_the_parts_of_a_reply_that_does_not_have_them_are_not_found(client: TestClient) -> None:
    id = converse(client, "say one")
    part = get(client, f"/{id}/items", order="desc")["first_id"]
    other = part.removesuffix("_0") + "_7"
    assert get(client, f"/{id}/items/{other}", 404)["error"]["code"] == "item_not_found"
    wrong_kind = part.replace("msg_", "rs_")
    assert get(client, f"/{id}/items/{wrong_kind}", 404)["error"]["code"] == "item_not_found"


# Branches


def test_the_branch_of_a_conversation_is_read_in_pages(client: TestClient) -> None:
    path = f"/{converse(client, 'say one', 'say two', 'say three')}/branch"
    page = get(client, path, limit=2)
    assert (turns(page), page["earlier"]) == (["say three", "three"], 4)
    page = get(client, path, limit=100, before=page["data"][0]["id"])
    assert (turns(page), page["earlier"]) == (["say one", "one", "say two", "two"], 0)
    error = get(client, path, 404, before="msg_unknown")["error"]
    assert (error["code"], error["param"]) == ("item_not_found", "before")


def test_a_branch_has_whole_responses_and_what_a_page_wants_to_know_of_them(client: TestClient) -> None:
    id = converse(client, "perform think hm | say one")
    question, answer = get(client, f"/{id}/branch")["data"]
    assert (question["role"], question["content"][0]["text"]) == ("user", "perform think hm | say one")
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    assert (answer["status"], answer["conversation"], answer["parley"]["reason"]) == ("completed", {"id": id}, "stop")
    whole = client.get(f"/v1/responses/{answer['id']}", headers=bearer()).json()
    assert whole | {"parley": answer["parley"]} == answer


def test_asking_again_after_an_earlier_turn_deletes_nothing(client: TestClient) -> None:
    id = converse(client, "say one", "say two")
    old = get(client, f"/{id}")["leaf"]
    first = get(client, f"/{id}/branch")["data"][1]["id"]
    with chat_v2(client) as socket:
        fork = reply(socket, "say three", conversation={"id": id, "after": first})
        assert turns(get(client, f"/{id}/branch")) == ["say one", "one", "say three", "three"]
        root = reply(socket, "say four", conversation={"id": id, "after": None})
        assert turns(get(client, f"/{id}/branch")) == ["say four", "four"]
        for leaf, expected in (
            (old, ["say one", "one", "say two", "two"]),
            (fork["id"], ["say one", "one", "say three", "three"]),
            (root["id"], ["say four", "four"]),
        ):
            assert post(client, f"/{id}", leaf=leaf)["leaf"] == leaf
            assert turns(get(client, f"/{id}/branch")) == expected
        post(client, f"/{id}", leaf=old)
        reply(socket, "say five", conversation=id)
    assert turns(get(client, f"/{id}/branch")) == ["say one", "one", "say two", "two", "say five", "five"]


def test_a_conversation_shows_the_version_that_its_branch_tells_of(client: TestClient) -> None:
    id = converse(client, "say one", "say two")
    with chat_v2(client) as socket:
        reply(socket, "say three", conversation={"id": id, "after": None})
    question = get(client, f"/{id}/branch")["data"][0]
    versions = question["parley"]["versions"]
    assert (versions["number"], versions["count"], versions["newer"]) == (2, 2, None)
    post(client, f"/{id}", leaf=versions["older"])
    branch = get(client, f"/{id}/branch")
    assert turns(branch) == ["say one", "one", "say two", "two"]
    assert branch["data"][0]["parley"]["versions"]["newer"] == question["id"]


def test_the_branch_stays_while_a_reply_runs_at_its_leaf(own_client: TestClient) -> None:
    id = converse(own_client, "say one")
    first = get(own_client, f"/{id}/branch")["data"][0]["id"]
    with chat_v2(own_client) as socket:
        socket.send_json({"type": "response.create", "input": "wait here", "conversation": id})
        response = events_until(socket, "response.created")[-1]["response"]["id"]
        assert get(own_client, f"/{id}")["response_id"] == response
        assert get(own_client, "")["data"][0]["response_id"] == response
        error = post(own_client, f"/{id}", 409, leaf=first, title="Another")["error"]
        assert error["code"] == "conversation_locked"
        assert get(own_client, f"/{id}")["title"] == "say one", "nothing is changed by a request that is refused"
        socket.send_json({"type": "parley.response.cancel"})
        events_until_done(socket)
    assert post(own_client, f"/{id}", leaf=first)["response_id"] is None


@pytest.mark.parametrize("after", ["msg_unknown", "resp_unknown"])
def test_nothing_is_asked_after_an_unknown_item(client: TestClient, after: str) -> None:
    id = converse(client, "say one")
    with chat_v2(client) as socket:
        socket.send_json({"type": "response.create", "input": "say two", "conversation": {"id": id, "after": after}})
        error = events_until(socket, "error")[-1]["error"]
        assert error["code"] == "item_not_found"
    assert turns(get(client, f"/{id}/branch")) == ["say one", "one"]


def test_the_leaf_of_another_conversation_is_refused(client: TestClient) -> None:
    id, other = converse(client, "say one"), converse(client, "say two")
    error = post(client, f"/{id}", 404, leaf=get(client, f"/{other}")["leaf"])["error"]
    assert error["code"] == "item_not_found"
    assert turns(get(client, f"/{id}/branch")) == ["say one", "one"]


# Read, change, delete


def test_a_conversation_is_read_without_its_items(client: TestClient) -> None:
    id = converse(client, "say one", "say two")
    response = client.get(f"/v1/conversations/{id}", headers=bearer())
    assert response.headers["cache-control"] == "no-store"
    assert list(response.json()) == FIELDS
    assert (response.json()["id"], response.json()["title"]) == (id, "say one")


def test_a_conversation_is_renamed(client: TestClient) -> None:
    id = converse(client, "say one")
    path = f"/v1/conversations/{id}"
    renamed = post(client, f"/{id}", title=" Numbers\n 数字 ")
    assert renamed["title"] == "Numbers 数字"
    assert list(renamed) == FIELDS
    for body in (b'{"title": 7}', b'{"title": " "}', b'{"title": "\\ud800"}'):
        response = client.post(path, content=body, headers=bearer())
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")
    for body in (b"", b"{", b"[]"):
        response = client.post(path, content=body, headers=bearer())
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    response = client.post(path, content=b"x" * BODY_BYTES * 2, headers=bearer())
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert get(client, f"/{id}")["title"] == "Numbers 数字"


def test_the_metadata_of_a_conversation_is_replaced(client: TestClient) -> None:
    made = post(client, "", metadata={"a": "1"}, title="One")
    changed = post(client, f"/{made['id']}", metadata={"b": "2"})
    assert (changed["metadata"], changed["title"]) == ({"b": "2"}, "One")
    assert get(client, f"/{made['id']}") == changed


def test_a_deleted_conversation_ends_its_reply(own_client: TestClient, scripted: ScriptedChat) -> None:
    with chat_v2(own_client) as socket:
        socket.send_json({"type": "response.create", "input": "wait here", "conversation": "new"})
        events = events_until(socket, "response.output_text.delta")
        id = events[0]["response"]["conversation"]["id"]
        response = own_client.delete(f"/v1/conversations/{id}", headers=bearer())
        assert response.json() == {"id": id, "object": "conversation.deleted", "deleted": True}
        assert events_until_done(socket)[-1]["response"]["status"] == "cancelled"
    assert scripted.running == 0
    assert get(own_client, f"/{id}", 404)["error"]["code"] == "conversation_not_found"
    assert get(own_client, "")["data"] == []


def test_the_responses_of_a_deleted_conversation_are_gone(client: TestClient) -> None:
    with chat_v2(client) as socket:
        response = reply(socket, "say one", conversation="new")
    path = f"/v1/responses/{response['id']}"
    assert client.get(path, headers=bearer()).status_code == 200
    client.delete(f"/v1/conversations/{response['conversation']['id']}", headers=bearer())
    assert client.get(path, headers=bearer()).status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("POST", ""),
        ("DELETE", ""),
        ("GET", "/items"),
        ("POST", "/items"),
        ("GET", "/items/msg_1"),
        ("DELETE", "/items/msg_1"),
        ("GET", "/branch"),
        ("GET", "/export"),
    ],
)
def test_an_unknown_conversation_is_not_found(client: TestClient, method: str, path: str) -> None:
    body = {"items": [user("one")]} if path == "/items" else {"title": "one"}
    content = body if method == "POST" else None
    response = client.request(method, f"/v1/conversations/conv_unknown{path}", json=content, headers=bearer())
    assert (response.status_code, response.json()["error"]["code"]) == (404, "conversation_not_found")


def test_a_conversation_stays_open_after_it_was_renamed(client: TestClient) -> None:
    with chat_v2(client) as socket:
        id = reply(socket, "say one", conversation="new")["conversation"]["id"]
        post(client, f"/{id}", title="one")
        assert text_of(reply(socket, "say two", conversation=id)) == "two"


# Export


def test_a_conversation_is_exported_as_markdown_or_json(client: TestClient) -> None:
    id = converse(client, "say **one**")
    path = f"/v1/conversations/{id}/export"
    response = client.get(path, headers=bearer())
    assert response.text == "# say **one**\n\n**User**\n\nsay **one**\n\n**Assistant**\n\n**one**\n"
    assert response.headers["content-type"].startswith("text/markdown")
    assert response.headers["content-disposition"] == f'attachment; filename="{id}.md"'
    response = client.get(path, params={"format": "json"}, headers=bearer())
    document = response.json()
    items = get(client, f"/{id}/items", order="asc")["data"]
    assert document == get(client, f"/{id}") | {"items": items, "branches": []}
    assert response.headers["content-disposition"] == f'attachment; filename="{id}.json"'
    response = client.get(path, params={"format": "pdf"}, headers=bearer())
    assert (response.status_code, response.json()["error"]["param"]) == (400, "format")


def test_a_download_has_every_branch(client: TestClient) -> None:
    id = converse(client, "say one", "say two")
    with chat_v2(client) as socket:
        first = get(client, f"/{id}/branch")["data"][1]["id"]
        reply(socket, "say three", conversation={"id": id, "after": first})
        reply(socket, "say four", conversation={"id": id, "after": None})
    document = get(client, f"/{id}/export", format="json")
    assert texts({"data": document["items"]}) == ["say four", "four"]
    branches = [(branch["after"], texts({"data": branch["items"]})) for branch in document["branches"]]
    answer = f"msg_{first.removeprefix('resp_')}_0"
    assert branches == [(None, ["say one", "one", "say three", "three"]), (answer, ["say two", "two"])]
    text = client.get(f"/v1/conversations/{id}/export", headers=bearer()).text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Instead of “say four”",
        "## Instead of “say three”",
    ]
    assert "say two" in text


def test_a_download_that_the_database_cannot_give_is_an_error_and_no_broken_file(own_app: RunningApp) -> None:
    client = own_app.client()
    id = converse(client, "say hello")

    async def lose_items() -> None:
        async with own_app.app.state.conversations._database.begin() as connection:
            await connection.exec_driver_sql("DROP TABLE items")

    own_app.call(lose_items)
    assert get(client, f"/{id}/export", 503)["error"]["code"] == "database_unavailable"
