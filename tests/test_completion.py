from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models import completion
from models.admission import ServerStopping, TooManyResponses
from models.chat import Chat
from models.completion import Completion
from models.completion_request import CompletionRequest
from models.conversations import Conversations
from models.events import Json, ResponseCreate
from models.item import Message
from models.listing import Listing
from models.metrics import Metrics
from models.options import Options
from models.refused import InvalidValue, ServerFailed
from models.reply import ContextLengthExceeded, Delta, Done, MessagesRefused
from models.response import Response
from models.responses import ResponseNotFound, Responses
from models.sequence import Finish
from models.settings import Settings
from tests.scripted import ScriptedChat, running

pytestmark = pytest.mark.anyio


class Reader:
    """One who would follow a reply."""

    def __init__(self) -> None:
        self.heard: list[Json] = []

    def send(self, event: Json) -> None:
        self.heard.append(event)

    async def drained(self) -> None:
        pass


def said(*contents: str) -> list[Message]:
    return [{"role": "user", "content": content} for content in contents]


def made(chat: Any, *contents: str, usage: bool = False, **options: Any) -> Completion:
    return Completion("ann", CompletionRequest(said(*contents), options, True, usage, None), chat)


def asked(responses: Responses, chat: Any, *contents: str, usage: bool = False, **options: Any) -> Completion:
    """A completion that is being made."""
    reply = made(chat, *contents, usage=usage, **options)
    responses.create(reply.response, reply)
    return reply


async def chunks(reply: Completion) -> list[Json]:
    """What the frames of a completion hold, without the end, which is there."""
    await reply.begun()
    *frames, end = [frame async for frame in reply.frames()]
    assert end == "data: [DONE]\n\n"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames if not frame.startswith(":")]


def content(chunks: list[Json]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


# Told at once


async def test_a_completion_is_the_reply_its_end_and_what_it_took(responses: Responses, scripted: ScriptedChat) -> None:
    whole = await asked(responses, scripted, "Hi", "say all of it").whole()
    assert whole.pop("id").startswith("chatcmpl-")
    assert isinstance(whole.pop("created"), int)
    assert whole == {
        "object": "chat.completion",
        "model": "scripted",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "all of it", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_no_two_completions_have_one_id(responses: Responses, scripted: ScriptedChat) -> None:
    assert len({(await asked(responses, scripted, "say yes").whole())["id"] for _ in range(3)}) == 3


async def test_a_completion_has_the_servers_options_but_for_those_it_names(
    responses: Responses, scripted: ScriptedChat
) -> None:
    scripted.defaults = Options(instructions="Be brief.", temperature=1.5, seed=3)
    await asked(responses, scripted, "say yes", temperature=0.0, stop=("END",)).whole()
    assert scripted.heard == [(said("say yes"), Options("Be brief.", temperature=0.0, seed=3, stop=("END",)))]


# Told in chunks


async def test_chunks_say_who_speaks_then_what_then_how_it_ended(responses: Responses, scripted: ScriptedChat) -> None:
    first, *middle, last = await chunks(asked(responses, scripted, "say all of it"))
    assert [choice["delta"] for choice in first["choices"]] == [{"role": "assistant", "content": ""}]
    assert [chunk["choices"][0]["delta"] for chunk in middle] == [
        {"content": "all "},
        {"content": "of i"},
        {"content": "t"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in (first, *middle)] == [None] * 4
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    for chunk in (first, *middle, last):
        assert chunk.keys() == {"id", "object", "created", "model", "choices"}
        assert (chunk["id"], chunk["created"]) == (first["id"], first["created"])
        assert (chunk["object"], chunk["model"]) == ("chat.completion.chunk", "scripted")


async def test_usage_that_is_asked_for_comes_last_and_is_null_before(
    responses: Responses, scripted: ScriptedChat
) -> None:
    *before, last = await chunks(asked(responses, scripted, "say all of it", usage=True))
    assert [chunk["usage"] for chunk in before] == [None] * 5
    assert before[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == []
    assert last["usage"] == (await asked(responses, scripted, "say all of it").whole())["usage"]


async def test_a_place_in_the_queue_is_a_comment(responses: Responses, scripted: ScriptedChat) -> None:
    reply = asked(responses, scripted, "queue here")
    await reply.begun()
    _, *frames = [frame async for frame in reply.frames()]
    assert frames[:2] == [": waits, 2 in the queue\n\n", ": waits, 1 in the queue\n\n"]


async def test_a_completion_that_waits_has_begun_and_tells_its_first_chunk_at_once(
    responses: Responses, scripted: ScriptedChat
) -> None:
    reply = asked(responses, scripted, "hold here")
    await reply.begun()
    assert '"role":"assistant"' in await anext(reply.frames())
    assert scripted.running == 1


@pytest.mark.parametrize(
    "text", ["a\nb\r\n\r\nc\rd", "data: [DONE]\n\n", "\u2028\u2029\x85\x0b\x0c\x1c", "你好 😀", '"\\']
)
async def test_every_chunk_is_one_line_whatever_ends_a_line_and_says_what_was_said(
    responses: Responses, scripted: ScriptedChat, text: str
) -> None:
    reply = asked(responses, scripted, f"say {text}")
    await reply.begun()
    frames = [frame async for frame in reply.frames()]
    for frame in frames:
        assert frame.endswith("\n\n")
        assert len(frame.splitlines()) == 2, "one line with the data, and an empty one"
    assert content([json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]) == text


@pytest.mark.parametrize(
    ("reason", "finish"), [("stop", "stop"), ("max_output_tokens", "length"), ("context_length", "length")]
)
async def test_an_end_is_called_what_openai_calls_it(scripted: ScriptedChat, reason: Finish, finish: str) -> None:
    reply = made(scripted, "Hi")
    reply.response.listeners[reply] = True
    reply.response.announce()
    reply.response.take(Delta("Hello"))
    reply.response.take(Done(reason))
    reply.response.finish()
    assert (await chunks(reply))[-1]["choices"][0]["finish_reason"] == finish


# What goes wrong


async def test_what_is_refused_is_refused_before_the_first_chunk(responses: Responses, scripted: ScriptedChat) -> None:
    scripted.admission.per_user = 0
    with pytest.raises(TooManyResponses):
        await asked(responses, scripted, "say yes").whole()
    with pytest.raises(TooManyResponses):
        await asked(responses, scripted, "say yes").begun()
    assert not scripted.heard


async def test_a_reply_that_breaks_is_no_completion(
    responses: Responses, scripted: ScriptedChat, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ServerFailed):
        await asked(responses, scripted, "break here").whole()
    assert "the script says so" in caplog.text


async def test_a_reply_that_breaks_ends_its_chunks_with_the_error(
    responses: Responses, scripted: ScriptedChat, caplog: pytest.LogCaptureFixture
) -> None:
    *before, last = await chunks(asked(responses, scripted, "break here", usage=True))
    assert content(before) == "here"
    assert last == {"error": completion.error(ServerFailed())}


async def test_a_server_that_stops_says_so(
    scripted: ScriptedChat, conversations: Conversations, settings: Settings
) -> None:
    async with running(scripted, conversations, settings) as responses:
        at_once, in_chunks = (asked(responses, scripted, "wait here") for _ in range(2))
        await in_chunks.begun()
    with pytest.raises(ServerStopping):
        await at_once.whole()
    frames = [frame async for frame in in_chunks.frames()]
    assert json.loads(frames[-2].removeprefix("data: ")) == {"error": completion.error(ServerStopping())}


@pytest.fixture
async def tiny(tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel, settings: Settings) -> AsyncIterator[Chat]:
    async with Chat.running(tokenizer, llama, settings) as chat:
        yield chat


async def test_a_prompt_that_outgrows_the_context_is_refused_instead_of_shortened(
    tiny: Chat, conversations: Conversations, settings: Settings
) -> None:
    long = ["x" * 60] * 5  # each of which would have room
    async with Responses.running(tiny, conversations, settings, Metrics()) as responses:
        shortened = Response(
            "ann", ResponseCreate(None, said(*long), "none"), None, False, Options(max_output_tokens=1)
        )
        responses.create(shortened, Reader())
        await asyncio.wait([shortened.ending])
        assert shortened.left_out > 0
        for told in (Completion.whole, Completion.begun):
            with pytest.raises(ContextLengthExceeded, match="256") as raised:
                await told(asked(responses, tiny, *long, max_output_tokens=1))
            assert raised.value.param == "messages"


async def test_messages_that_the_template_refuses_are_refused_by_the_name_they_came_by(
    tiny: Chat, conversations: Conversations, settings: Settings
) -> None:
    async with Responses.running(tiny, conversations, settings, Metrics()) as responses:
        request = CompletionRequest([{"role": "assistant", "content": "Hi"}], {}, False, False, None)
        reply = Completion("ann", request, tiny)
        responses.create(reply.response, reply)
        with pytest.raises(MessagesRefused, match="it cannot begin") as raised:
            await reply.whole()
    assert raised.value.param == "messages"


def test_an_error_has_the_four_fields_of_openais() -> None:
    assert completion.error(InvalidValue("seed must be a number", "seed")) == {
        "message": "seed must be a number",
        "type": "invalid_request_error",
        "param": "seed",
        "code": "invalid_value",
    }


def test_a_model_is_listed_with_its_context(scripted: ScriptedChat) -> None:
    assert completion.model(scripted, 7) == {  # type: ignore[arg-type]
        "id": "scripted",
        "object": "model",
        "created": 7,
        "owned_by": "parley",
        "max_model_len": 4096,
    }


# Nobody hears


async def test_a_cancel_ends_the_reply(responses: Responses, scripted: ScriptedChat) -> None:
    reply = asked(responses, scripted, "wait here")
    await reply.begun()
    reply.cancel()
    await asyncio.wait([reply.response.ending])
    assert (reply.response.status, reply.response.reason) == ("cancelled", "client_disconnected")
    assert (scripted.running, dict(scripted.admission.in_flight)) == (0, {})


async def test_a_cancel_before_the_reply_has_begun_ends_it_all_the_same(
    responses: Responses, scripted: ScriptedChat
) -> None:
    reply = asked(responses, scripted, "wait here")
    reply.cancel()
    await asyncio.wait([reply.response.ending])
    assert reply.response.status == "cancelled"
    assert (scripted.running, dict(scripted.admission.in_flight)) == (0, {})


async def test_a_cancel_while_it_waits_ends_it(responses: Responses, scripted: ScriptedChat) -> None:
    reply = asked(responses, scripted, "hold here")
    await reply.begun()
    reply.cancel()
    await asyncio.wait([reply.response.ending])
    assert (reply.response.status, scripted.running) == ("cancelled", 0)


async def test_a_cancel_after_the_end_changes_nothing(responses: Responses, scripted: ScriptedChat) -> None:
    reply = asked(responses, scripted, "say all of it")
    whole = await reply.whole()
    reply.cancel()
    assert await reply.whole() == whole
    assert reply.response.status == "completed"


# Nothing stays


@pytest.mark.parametrize("order", ["say", "wait", "break"])
async def test_nothing_of_a_completion_is_held_or_stored(
    responses: Responses,
    conversations: Conversations,
    scripted: ScriptedChat,
    order: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reply, reader = asked(responses, scripted, f"{order} something"), Reader()
    await reply.begun()
    if order == "wait":
        reply.cancel()
    await asyncio.wait([reply.response.ending])
    with pytest.raises(ResponseNotFound):
        await responses.follow("ann", reply.response.id, 0, reader)
    assert not reader.heard
    assert await conversations.reply("ann", reply.response.id) is None
    assert await conversations.latest("ann", Listing(9, None, "")) == ([], False)


async def test_a_completion_takes_none_of_the_room_in_which_replies_are_held(
    scripted: ScriptedChat, conversations: Conversations, settings: Settings
) -> None:
    async with running(scripted, conversations, settings, replay_bytes=5_000) as responses:
        held, reader = Response("ann", ResponseCreate(None, said("say held")), None, False, Options()), Reader()
        responses.create(held, reader)
        await asyncio.wait([held.ending])
        await asked(responses, scripted, "say " + "x" * 9_000).whole()
        await responses.follow("ann", held.id, 0, reader)
    assert reader.heard[-1]["response"]["output_text"] == "held"
