from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from models.errors import ContextLengthExceededError, PreviousResponseNotFoundError
from models.generation.response import BATCH, ActiveResponse
from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.protocols.responses.stream import ResponseResult, ResponseStream
from models.validation import Json
from tests.support.fake_responses import FakeResponses, answer, conclude, new_response, perform
from tests.support.openai_types import check_response, check_stream

pytestmark = pytest.mark.anyio

MODEL = ModelList([ModelInfo("tiny", 4096, Options())])
SCRIPT = 'think Let me see | call f {"a": 1} | say It is so.'


def event_of(frame: str) -> Json:
    """The event in a frame of server-sent events."""
    name, data, *rest = frame.split("\n")
    event: Json = json.loads(data.removeprefix("data: "))
    assert (name, rest) == (f"event: {event['type']}", ["", ""])
    return event


async def events_of(stream: ResponseStream) -> list[Json]:
    return [event_of(frame) async for frame in stream.frames()]


def running(listener: ResponseStream | ResponseResult) -> ActiveResponse:
    """A response that somebody listens to."""
    response = new_response()
    response.add_listener(listener)
    return response


# Whole


async def test_a_response_is_returned_whole_when_it_has_ended() -> None:
    result = ResponseResult(MODEL)
    response = running(result)
    answer(response, SCRIPT)
    whole = await result.finished()
    assert check_response(whole).output_text == "It is so."
    assert whole["id"] == response.id


class NotesThread(ModelInfo):
    """Tells by its name whether the event loop waits for what tells the name."""

    def __getattribute__(self, field: str) -> Any:
        in_loop = threading.current_thread() is threading.main_thread()
        return ("loop" if in_loop else "thread") if field == "name" else super().__getattribute__(field)


async def test_a_whole_response_is_made_beside_the_event_loop() -> None:
    result = ResponseResult(ModelList([NotesThread("tiny", 4096, Options())]))
    answer(running(result), SCRIPT)
    assert (await result.finished())["model"] == "thread"


async def test_a_response_in_the_background_is_returned_as_soon_as_it_is_accepted() -> None:
    result = ResponseResult(MODEL)
    response = running(result)
    response.announce()
    begun = await result.created()
    assert (check_response(begun).status, begun["id"], begun["output"]) == ("queued", response.id, [])


async def test_a_rejected_response_raises_its_error() -> None:
    result = ResponseResult(MODEL)
    running(result).reject(ContextLengthExceededError("too long"))
    for waiting in (result.created(), result.finished()):
        with pytest.raises(ContextLengthExceededError, match="too long"):
            await waiting


# Streamed


async def test_a_stream_has_the_events_of_the_standard_as_server_sent_events() -> None:
    stream = ResponseStream(MODEL)
    answer(running(stream), SCRIPT)
    await stream.wait_accepted()
    check_stream(await events_of(stream))


async def test_a_stream_can_begin_after_any_event() -> None:
    whole = ResponseStream(MODEL)
    response = running(whole)
    answer(response, SCRIPT)
    live = await events_of(whole)
    for number in range(-1, len(live)):
        rest = ResponseStream(MODEL, starting_after=number)
        await response.catch_up(rest)
        assert await events_of(rest) == live[number + 1 :]


async def test_a_rejected_stream_raises_before_it_begins_and_has_no_events() -> None:
    stream = ResponseStream(MODEL)
    running(stream).reject(PreviousResponseNotFoundError("resp_1"))
    with pytest.raises(PreviousResponseNotFoundError):
        await stream.wait_accepted()
    assert await events_of(stream) == []


async def test_a_line_break_in_a_text_stays_in_its_event() -> None:
    stream = ResponseStream(MODEL)
    response = running(stream)
    response.announce()
    response.add_text("message", "a\n\nevent: x\r\u2028")
    conclude(response, "stop")
    deltas = [event["delta"] for event in await events_of(stream) if "delta" in event]
    assert deltas == ["a\n\nevent: x\r\u2028"]


async def test_a_stream_follows_a_running_response_to_its_end(fake: FakeResponses) -> None:
    id = fake.create(new_response().request, None)
    response = await fake.next()
    response.announce()
    perform(response, "think hm")
    stream = ResponseStream(MODEL, starting_after=2)
    frames = stream.followed(fake.follow("ann", id, stream))
    seen = [event_of(await anext(frames))]
    perform(response, "say ok")
    conclude(response, "stop")
    seen += [event_of(frame) async for frame in frames]
    check_stream(seen, first=3)
    assert seen[-1]["type"] == "response.completed"


async def test_a_stream_that_follows_slowly_is_waited_for(fake: FakeResponses) -> None:
    id = fake.create(new_response().request, None)
    response = await fake.next()
    response.announce()
    for _ in range(2 * BATCH + 1):
        response.add_text("message", "x")
    stream = ResponseStream(MODEL)
    frames = stream.followed(fake.follow("ann", id, stream))
    await anext(frames)
    await asyncio.sleep(0)
    assert stream._events.qsize() <= BATCH + 2
    conclude(response, "stop")
    seen = [event_of(frame) async for frame in frames]
    check_stream(seen, first=1)
    assert len([event for event in seen if "delta" in event]) == 2 * BATCH + 1


async def test_a_stream_that_fails_to_follow_ends(fake: FakeResponses) -> None:
    stream = ResponseStream(MODEL)
    assert [frame async for frame in stream.followed(fake.follow("ann", "resp_1", stream))] == []


async def test_a_stream_that_is_closed_stops_following(fake: FakeResponses) -> None:
    id = fake.create(new_response().request, None)
    response = await fake.next()
    response.announce()
    for _ in range(BATCH):
        response.add_text("message", "x")
    stream = ResponseStream(MODEL)
    frames = stream.followed(fake.follow("ann", id, stream))
    await anext(frames)
    await frames.aclose()
    for _ in range(2):
        await asyncio.sleep(0)
    count = stream._events.qsize()
    conclude(response, "stop")
    assert stream._events.qsize() == count
