from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from models.errors import NotStoredError
from models.generation.response import BATCH
from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.protocols.responses.chat_session import RESUMES, ChatSession
from models.validation import Json
from tests.support.fake_client import FakeClient
from tests.support.fake_responses import FakeResponses, answer, conclude, new_response, perform
from tests.support.openai_types import SOCKET_EVENT, check_stream

pytestmark = pytest.mark.anyio

MODEL = ModelList([ModelInfo("tiny", 4096, Options(temperature=0.5))])
SCRIPT = 'think Let me see | call f {"a": 1} | call g {} | say It is so.'


class Connection:
    """A session of ann's and its client."""

    def __init__(self, fake: FakeResponses, client: FakeClient | None = None) -> None:
        self.client = client or FakeClient()
        self.session = ChatSession(fake, MODEL, "ann", {"frame_bytes": 7}, self.client)

    def send(self, type: str, **fields: Any) -> None:
        assert self.session.receive(json.dumps({"type": type} | fields)) is None

    async def events(self, count: int) -> list[Json]:
        return [await self.client.sent.get() for _ in range(count)]


@pytest.fixture
async def connection(fake: FakeResponses) -> AsyncIterator[Connection]:
    connection = Connection(fake)
    connection.client.rest()
    yield connection
    connection.session.close()


async def test_a_session_begins_with_what_the_page_wants_to_know(fake: FakeResponses) -> None:
    (event,) = Connection(fake).client.rest()
    session = event["session"]
    assert (event["type"], session["user"], session["model"]) == ("parley.session.created", "ann", "tiny")
    assert (session["context_length"], session["limits"]) == (4096, {"frame_bytes": 7})
    assert session["options"] == MODEL.default.defaults.as_json()
    assert session["id"].startswith("sess_")


async def test_the_coming_and_going_of_others_is_told(connection: Connection) -> None:
    connection.session.presence_changed("joined", "bob")
    connection.session.presence_changed("left", "bob")
    assert connection.client.rest() == [
        {"type": "parley.presence.joined", "user": "bob"},
        {"type": "parley.presence.left", "user": "bob"},
    ]


async def test_a_waiting_response_tells_its_position_and_a_warning_what_is_wrong(
    connection: Connection, fake: FakeResponses
) -> None:
    connection.send("response.create", input="Hi")
    response = await fake.next()
    response.announce()
    response.set_position(3)
    response.warn(NotStoredError())
    conclude(response, "stop")
    events = await connection.events(9)
    assert events[2] == {"type": "parley.queue", "response_id": response.id, "position": 3}
    assert (events[3]["type"], events[3]["response_id"]) == ("parley.warning", response.id)
    assert events[3]["error"]["code"] == "not_kept"
    check_stream(events[:2] + events[4:])


# Cancelling


async def test_one_response_is_cancelled_by_its_id(connection: Connection, fake: FakeResponses) -> None:
    connection.send("response.create", input="Hi", stream_id="a")
    connection.send("response.create", input="Hi", stream_id="b")
    first, second = [await fake.next() for _ in range(2)]
    first.announce()
    perform(first, "say half")
    connection.send("parley.response.cancel", response_id=first.id)
    events = await connection.events(9)
    check_stream(events)
    assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.incomplete", "cancelled")
    assert second.status == "in_progress"


async def test_all_responses_of_the_connection_are_cancelled(connection: Connection, fake: FakeResponses) -> None:
    for lane in ("a", "b"):
        connection.send("response.create", input="Hi", stream_id=lane)
    responses = [await fake.next() for _ in range(2)]
    elsewhere = fake.create(new_response().request, None)
    connection.send("parley.response.cancel")
    assert [response.status for response in responses] == ["cancelled", "cancelled"]
    assert (await fake.find("ann", elsewhere))[1].status == "in_progress"


async def test_the_cancellation_of_an_unknown_response_gets_an_error(connection: Connection) -> None:
    connection.send("parley.response.cancel", response_id="resp_1", stream_id="a")
    (error,) = await connection.events(1)
    SOCKET_EVENT.validate_python(error)
    assert (error["status"], error["error"]["code"], error["stream_id"]) == (404, "response_not_found", "a")


@pytest.mark.parametrize("type", ["parley.response.cancel", "parley.response.resume"])
async def test_an_unknown_field_is_refused(connection: Connection, type: str) -> None:
    connection.send(type, response_id="resp_1", id="resp_1")
    (error,) = await connection.events(1)
    assert (error["status"], error["error"]["param"]) == (400, "id")


# Resuming


async def test_a_response_is_resumed_after_every_event_of_it(connection: Connection, fake: FakeResponses) -> None:
    connection.send("response.create", input="Hi")
    response = await fake.next()
    answer(response, SCRIPT)
    live = await connection.client.until("response.completed")
    check_stream(live)
    for number in range(-1, len(live)):
        other = Connection(fake)
        other.client.rest()
        other.send("parley.response.resume", response_id=response.id, starting_after=number)
        assert await other.events(len(live) - number - 1) == live[number + 1 :]
        assert other.client.rest() == []
        other.session.close()


async def test_a_running_response_is_resumed_on_another_connection(connection: Connection, fake: FakeResponses) -> None:
    connection.send("response.create", input="Hi")
    response = await fake.next()
    response.announce()
    perform(response, "say one")
    other = Connection(fake)
    other.client.rest()
    other.send("parley.response.resume", response_id=response.id, starting_after=1, stream_id="x")
    seen = await other.events(3)
    perform(response, "call f {}")
    conclude(response, "stop")
    live = await connection.events(13)
    seen += await other.events(8)
    check_stream(live)
    assert seen == [event | {"stream_id": "x"} for event in live[2:]]


async def test_a_response_is_resumed_on_its_own_connection_while_its_request_runs(
    connection: Connection, fake: FakeResponses
) -> None:
    connection.send("response.create", input="one")
    connection.send("response.create", input="two")
    response = await fake.next()
    response.announce()
    perform(response, "say one")
    before = await connection.events(5)
    connection.send("parley.response.resume", response_id=response.id)
    assert await connection.events(5) == before
    perform(response, "call f {}")
    conclude(response, "stop")
    check_stream(before + await connection.events(8))
    answer(await fake.next(), "say two")  # the lane goes on
    assert (await connection.events(9))[-1]["type"] == "response.completed"


async def test_a_reply_that_is_not_stored_can_be_continued_after_it_was_resumed(
    connection: Connection, fake: FakeResponses
) -> None:
    connection.send("response.create", input="one", store=False)
    response = await fake.next()
    response.announce()
    connection.send("parley.response.resume", response_id=response.id)
    await connection.events(4)
    perform(response, "say 1")
    conclude(response, "stop")
    await connection.events(7)
    connection.send("response.create", input="two", store=False, previous_response_id=response.id)
    await fake.next()
    assert [message["content"] for message in fake.asked[-1].chat.messages] == ["one", "1", "two"]


async def test_input_for_a_reply_that_was_resumed_is_answered_in_its_lane(
    connection: Connection, fake: FakeResponses
) -> None:
    connection.send("response.create", input="one", stream_id="a")
    response = await fake.next()
    response.announce()
    connection.send("parley.response.resume", response_id=response.id, stream_id="b")
    await connection.events(4)
    connection.send("response.steer", previous_response_id=response.id, input="more")
    accepted, incomplete = await connection.events(2)
    assert (accepted["type"], incomplete["type"]) == ("response.steer.accepted", "response.incomplete")
    answer(await fake.next(), "say ok")
    assert {event["stream_id"] for event in await connection.events(9)} == {"a"}


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"response_id": "resp_1"}, 404, "response_not_found"),
        ({}, 400, "missing_field"),
        ({"response_id": 7}, 400, "invalid_value"),
        ({"response_id": "resp_1", "starting_after": -2}, 400, "invalid_value"),
        ({"response_id": "resp_1", "starting_after": "0"}, 400, "invalid_value"),
    ],
)
async def test_a_response_that_cannot_be_resumed_gets_an_error_in_its_lane(
    connection: Connection, fields: Json, status: int, code: str
) -> None:
    connection.send("parley.response.resume", stream_id="a", **fields)
    (error,) = await connection.events(1)
    SOCKET_EVENT.validate_python(error)
    assert (error["status"], error["error"]["code"], error["stream_id"]) == (status, code, "a")


async def test_the_responses_of_other_users_are_not_found(connection: Connection, fake: FakeResponses) -> None:
    other = ChatSession(fake, MODEL, "bob", {}, FakeClient())
    connection.send("response.create", input="Hi")
    response = await fake.next()
    client = other._client
    assert isinstance(client, FakeClient)
    client.rest()
    for type in ("parley.response.resume", "parley.response.cancel"):
        assert other.receive(json.dumps({"type": type, "response_id": response.id})) is None
        assert (await client.sent.get())["error"]["code"] == "response_not_found"


async def test_a_bug_while_a_response_is_resumed_is_told(fake: FakeResponses) -> None:
    class Broken(FakeResponses):
        async def follow(self, user: str, id: str, follower: Any) -> None:
            raise RuntimeError("a bug")

    connection = Connection(Broken())
    connection.client.rest()
    connection.send("parley.response.resume", response_id="resp_1")
    (error,) = await connection.events(1)
    assert (error["status"], error["error"]["code"]) == (500, "server_error")


class SlowClient(FakeClient):
    """Reads nothing until it may; `behind` is set when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.reading, self.behind = asyncio.Event(), asyncio.Event()

    async def wait_sent(self) -> None:
        self.behind.set()
        await self.reading.wait()


async def test_only_so_many_responses_are_resumed_at_once_and_one_at_a_time(fake: FakeResponses) -> None:
    ids = [fake.create(new_response().request, None) for _ in range(RESUMES + 1)]
    for _ in ids:
        response = await fake.next()
        response.announce()
        for _ in range(BATCH):
            response.add_text("message", "x")
    client = SlowClient()
    connection = Connection(fake, client)
    client.rest()
    for id in ids:
        connection.send("parley.response.resume", response_id=id)
    (error,) = await connection.events(1)
    assert (error["status"], error["error"]["code"]) == (429, "too_many_responses")
    await client.behind.wait()
    assert client.sent.qsize() == BATCH + 4  # of the first one only
    client.reading.set()
    await connection.events(RESUMES * (BATCH + 4))
    connection.send("parley.response.resume", response_id=ids[-1])
    assert (await connection.events(1))[0]["type"] == "response.created"


async def test_a_connection_that_closes_while_it_catches_up_hears_nothing_more(fake: FakeResponses) -> None:
    id = fake.create(new_response().request, None)
    response = await fake.next()
    response.announce()
    for _ in range(BATCH):
        response.add_text("message", "x")
    client = SlowClient()
    connection = Connection(fake, client)
    connection.send("parley.response.resume", response_id=id)
    await client.behind.wait()
    client.rest()
    tasks = [*connection.session._tasks]
    connection.session.close()
    client.reading.set()
    await asyncio.wait(tasks)
    perform(response, "say more")
    conclude(response, "stop")
    assert client.rest() == []
