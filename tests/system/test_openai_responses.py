"""The openai package, unmodified, with the Responses API of a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response
from pydantic import BaseModel

from models.validation import Json
from tests.support.client import ANN
from tests.support.responses import PARTS, check_events
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served
from tests.support.sockets import all_tasks, call, wait_for_other_tasks

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning"),  # by openai
]

MODEL = "scripted"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    "strict": False,
}


@pytest.fixture
def client(scripted_server: Served) -> Iterator[OpenAI]:
    """The package, as ann, at a server with a scripted model."""
    with OpenAI(base_url=f"{scripted_server.url}/v1", api_key=ANN, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(scripted_server: Served) -> AsyncIterator[AsyncOpenAI]:
    """The same, for asyncio."""
    async with AsyncOpenAI(base_url=f"{scripted_server.url}/v1", api_key=ANN, max_retries=0) as client:
        yield client


def calls_of(response: Response) -> list[Any]:
    return [item for item in response.output if item.type == "function_call"]


# Over HTTP


def as_sent(event: Any) -> Json:
    """An event as the server has sent it: the package makes floats of times, which are whole seconds."""
    sent: Json = event.to_dict()
    for name in ("created_at", "completed_at"):
        if sent.get("response", {}).get(name) is not None:
            assert float(sent["response"][name]).is_integer()
            sent["response"][name] = int(sent["response"][name])
    return sent


def test_a_text_is_answered(client: OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="say all of it", instructions="be brief")
    assert (response.status, response.output_text, response.instructions) == ("completed", "all of it", "be brief")
    assert response.usage
    assert response.usage.output_tokens == 3


def test_a_streamed_response_has_the_events_of_the_package(client: OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input=f"perform {PARTS}", stream=True))
    response = check_events([as_sent(event) for event in events])
    assert [item["type"] for item in response["output"]] == [
        *("reasoning", "message", "function_call", "function_call", "message"),
    ]


def test_the_streaming_helper_gathers_the_response(client: OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=f"perform {PARTS}", tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.output_text.delta", "response.function_call_arguments.delta"} <= kinds
    assert final.output_text == "I lookdone"
    assert [call.arguments for call in calls_of(final)] == ['{"a": 1}', "{}"]


class Place(BaseModel):
    name: str
    warm: bool


def test_a_reply_is_parsed_into_a_model(client: OpenAI, scripted: ScriptedChat) -> None:
    parsed = client.responses.parse(model=MODEL, input='say {"name": "Paris", "warm": true}', text_format=Place)
    assert parsed.output_parsed == Place(name="Paris", warm=True)
    form = scripted.requests[-1].format
    assert form.type == "json_schema"
    assert isinstance(form.value, dict)
    assert form.value["required"] == ["name", "warm"]


def test_a_streamed_reply_is_parsed_into_a_model(client: OpenAI) -> None:
    asked = 'say {"name": "Paris", "warm": true}'
    with client.responses.stream(model=MODEL, input=asked, text_format=Place) as stream:
        assert stream.get_final_response().output_parsed == Place(name="Paris", warm=True)


def test_a_tool_is_called_and_answered(client: OpenAI, scripted: ScriptedChat) -> None:
    input: Any = [{"role": "user", "content": 'perform think hm | call get_weather {"place": "Paris"}'}]
    first = client.responses.create(model=MODEL, input=input, tools=[WEATHER])
    (asked,) = calls_of(first)
    output: Any = {"type": "function_call_output", "call_id": asked.call_id, "output": "say warm"}
    by_id = client.responses.create(model=MODEL, input=[output], previous_response_id=first.id, tools=[WEATHER])
    heard = scripted.requests[-1].messages
    input += [*first.output, output]
    stateless = client.responses.create(model=MODEL, input=input, tools=[WEATHER], store=False)
    assert by_id.output_text == stateless.output_text == "warm"
    assert heard[-1] == {"role": "tool", "content": "say warm", "tool_call_id": asked.call_id}
    assert scripted.requests[-1].messages[-1] == heard[-1]


def test_a_response_is_retrieved_cancelled_deleted_and_its_input_listed(client: OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="say it")
    assert client.responses.retrieve(response.id) == response
    items = client.responses.input_items.list(response.id, order="asc").data
    assert [item.type for item in items] == ["message"]
    assert client.responses.cancel(response.id).status == "completed"
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_all_input_items_are_paged_through(client: OpenAI) -> None:
    input: Any = [{"role": "user", "content": f"say {number}"} for number in range(25)]
    response = client.responses.create(model=MODEL, input=input)
    listed: Any = list(client.responses.input_items.list(response.id, order="asc", limit=10))
    assert [item.content[0].text for item in listed] == [one["content"] for one in input]


def test_a_stream_is_dropped_and_retrieved_after_each_event(client: OpenAI) -> None:
    events = [as_sent(event) for event in client.responses.create(model=MODEL, input=f"perform {PARTS}", stream=True)]
    id = check_events(events)["id"]
    for number in range(len(events)):
        rest = client.responses.retrieve(id, stream=True, starting_after=number)
        assert [as_sent(event) for event in rest] == events[number + 1 :]
    assert [as_sent(event) for event in client.responses.retrieve(id, stream=True)] == events


def test_a_response_in_the_background_is_polled_and_cancelled(client: OpenAI) -> None:
    queued = client.responses.create(model=MODEL, input="wait here", background=True)
    assert queued.status == "queued"
    for event in client.responses.retrieve(queued.id, stream=True):
        if event.type == "response.output_text.delta":
            break
    assert client.responses.retrieve(queued.id).status == "in_progress"
    cancelled = client.responses.cancel(queued.id)
    assert (cancelled.status, cancelled.output_text) == ("cancelled", "here")
    assert client.responses.retrieve(queued.id) == cancelled


def test_a_client_that_leaves_a_stream_leaves_no_task_behind(
    scripted_server: Served, client: OpenAI, scripted: ScriptedChat
) -> None:
    tasks = call(scripted_server, all_tasks())
    queued = client.responses.create(model=MODEL, input="wait here", background=True)
    for _ in range(3):
        with client.responses.retrieve(queued.id, stream=True) as stream:
            assert next(iter(stream)).type == "response.created"
    scripted_server.in_loop(scripted.release)
    call(scripted_server, wait_for_other_tasks(tasks))
    assert client.responses.retrieve(queued.id).output_text == "here"


def test_errors_are_those_of_the_package(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model=MODEL, input="say it", temperature=5)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    for stream in (True, False):
        with pytest.raises(openai.BadRequestError, match="resp_1"):
            client.responses.create(model=MODEL, input="say it", previous_response_id="resp_1", stream=stream)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt-4", input="say it")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").responses.create(model=MODEL, input="say it")


# Conversations


def test_conversations_are_made_read_changed_and_deleted(client: OpenAI) -> None:
    made = client.conversations.create(
        items=[{"type": "message", "role": "user", "content": "one"}], metadata={"topic": "numbers"}
    )
    assert (made.object, made.metadata) == ("conversation", {"topic": "numbers"})
    response = client.responses.create(model=MODEL, input=f"perform {PARTS}", conversation=made.id)
    assert response.conversation
    assert response.conversation.id == made.id
    items = list(client.conversations.items.list(made.id, order="asc", limit=2))
    assert [item.type for item in items] == [
        *("message", "message", "reasoning", "message", "function_call", "function_call", "message"),
    ]
    for item in items:
        assert item.id
        assert client.conversations.items.retrieve(item.id, conversation_id=made.id) == item
    added = client.conversations.items.create(made.id, items=[{"type": "message", "role": "user", "content": "two"}])
    assert len(added.data) == 1
    changed = client.conversations.update(made.id, metadata={"topic": "letters"})
    assert client.conversations.retrieve(made.id) == changed
    assert items[0].id
    assert client.conversations.items.delete(items[0].id, conversation_id=made.id).id == made.id
    assert len(list(client.conversations.items.list(made.id))) == 7
    assert client.conversations.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(made.id)


# Over a socket


def test_a_socket_answers_one_request_after_the_other(client: OpenAI) -> None:
    with client.responses.connect() as connection:
        previous = None
        for text in ("one", "two", "three"):
            event: Any = {"type": "response.create", "model": MODEL, "input": f"say {text}"}
            connection.send(event | ({"previous_response_id": previous} if previous else {}))
            events = []
            for received in connection:
                events.append(received)
                if received.type == "response.completed":
                    break
            response = check_events([as_sent(event) for event in events])
            assert response["output"][0]["content"][0]["text"] == text
            previous = response["id"]


def test_a_socket_answers_several_streams_at_the_same_time(
    client: OpenAI, scripted_server: Served, scripted: ScriptedChat
) -> None:
    with client.responses.connect() as connection:
        for lane in ("a", "b", "c"):
            connection.send({"type": "response.create", "model": MODEL, "input": f"wait {lane}", "stream_id": lane})
        begun: set[str | None] = set()
        events: list[Any] = []
        for event in connection:
            events.append(event)
            if event.type == "response.output_text.delta":
                begun.add(event.stream_id)
            if begun == {"a", "b", "c"}:
                break
        scripted_server.in_loop(scripted.release)
        while sum(event.type == "response.completed" for event in events) < 3:
            events.append(connection.recv())
    for lane in ("a", "b", "c"):
        own = [as_sent(event) for event in events if event.stream_id == lane]
        assert check_events(own)["output"][0]["content"][0]["text"] == lane


async def test_tools_are_called_on_several_streams_of_an_asynchronous_socket(
    async_client: AsyncOpenAI, scripted: ScriptedChat
) -> None:
    lanes = [f"lane {number}" for number in range(4)]
    texts: dict[str, str] = {}
    async with async_client.responses.connect() as connection:

        async def send(lane: str, input: Any, **fields: Any) -> None:
            event = {"type": "response.create", "model": MODEL, "store": False, "tools": [WEATHER]}
            await connection.send(event | {"stream_id": lane, "input": input, **fields})  # type: ignore[arg-type]

        for lane in lanes:
            place = json.dumps({"place": lane})
            await send(lane, f"perform think hm | call get_weather {place} | call get_weather {place}")
        async for event in connection:
            if event.type != "response.completed":
                assert event.type != "error"
                continue
            assert event.stream_id
            if calls := calls_of(event.response):
                assert len(calls) == 2
                places = [json.loads(one.arguments)["place"] for one in calls]
                outputs: list[Json] = [
                    {"type": "function_call_output", "call_id": one.call_id, "output": f"say it is warm in {place}"}
                    for one, place in zip(calls, places, strict=True)
                ]
                await send(event.stream_id, outputs, previous_response_id=event.response.id)
            else:
                texts[event.stream_id] = event.response.output_text
            if len(texts) == len(lanes):
                break
    assert texts == {lane: f"it is warm in {lane}" for lane in lanes}


async def test_an_error_on_an_asynchronous_socket_ends_only_its_request(async_client: AsyncOpenAI) -> None:
    async with asyncio.timeout(30), async_client.responses.connect() as connection:
        await connection.send({"type": "response.create", "model": MODEL, "input": "say it", "temperature": 5})
        error: Any = await connection.recv()
        assert (error.type, error.status, error.error.param) == ("error", 400, "temperature")
        await connection.send({"type": "response.create", "model": MODEL, "input": "say it"})
        async for event in connection:
            if event.type == "response.completed":
                assert event.response.output_text == "it"
                break


def test_a_socket_with_a_wrong_secret_is_refused(client: OpenAI) -> None:
    with pytest.raises(Exception, match="401"), client.with_options(api_key="wrong").responses.connect() as connection:
        connection.recv()
