"""Replies to a request as one object or in chunks: what Chat Completions and the older Completions share."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.chat_request import ChatRequest
from models.errors import (
    APIError,
    ContextLengthExceededError,
    FormatFailedError,
    MessagesRejectedError,
    QueueFullError,
    ResponseNotFoundError,
    ServerError,
    ServerStoppingError,
    TooManyResponsesError,
    WrongCredentialsError,
)
from models.generation.admission import Admission
from models.generation.events import Finished, OutputDelta, OutputItemAdded, Queued, Rejected, ResponseEvent
from models.generation.interface import Listener, ResponseRequest, ResponseService, Stateless, Unstored
from models.generation.manager import ResponseManager
from models.language.engine_chat import EngineChat
from models.messages import FinishReason, Message, Usage
from models.ops.metrics import Metrics
from models.options import Options
from models.output_item import OutputItem
from models.protocols.chat_completions import ChatChoice
from models.protocols.completion import Choice, Completion
from models.protocols.completion_request import CompletionRequest
from models.protocols.error_object import render_error
from models.protocols.text_completions import TextChoice
from models.settings import Settings
from models.store.conversations import Conversations, Listing
from models.store.item import Item, Status
from models.validation import Json
from tests.support.fake_client import FakeListener
from tests.support.scripted import ScriptedChat, running
from tests.support.stores import silent_feed

pytestmark = pytest.mark.anyio

USAGE = {"input_tokens": 3, "cached_tokens": 1, "output_tokens": 2, "reasoning_tokens": 1, "total_tokens": 5}
BOTH = pytest.mark.parametrize("choice", [ChatChoice, TextChoice], ids=["chat", "text"])


def user_messages(*contents: str) -> list[Message]:
    return [{"role": "user", "content": content} for content in contents]


def request_of(*contents: str, options: Options | None = None, stream: bool = False, **more: Any) -> CompletionRequest:
    chat = ChatRequest("ann", user_messages(*contents), options or Options())
    return CompletionRequest(chat, "scripted", stream=stream, **more)


def complete(responses: ResponseService, *contents: str, choice: type[Choice] = ChatChoice, **more: Any) -> Completion:
    """A running completion that is returned as one object."""
    return Completion(responses, request_of(*contents, **more), choice)


def stream(responses: ResponseService, *contents: str, **more: Any) -> Completion:
    """A running completion that is sent in chunks."""
    return complete(responses, *contents, stream=True, **more)


async def frames_of(completion: Completion) -> list[str]:
    """All frames of a stream."""
    await completion.wait_started()
    return [frame async for frame in completion.frames()]


def data_of(frame: str) -> Json:
    return dict(json.loads(frame.removeprefix("data: ")))


async def chunks_of(completion: Completion) -> list[Json]:
    """The data of all frames but the last."""
    *frames, end = await frames_of(completion)
    assert end == "data: [DONE]\n\n"
    return [data_of(frame) for frame in frames if not frame.startswith(":")]


def content(chunks: list[Json], index: int = 0) -> str:
    """The text of a choice."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def finished(status: Status, reason: str, text: str = "Hello", **usage: int) -> Finished:
    reply = Item("resp_1", "assistant", text, 7.0, status=status, reason=reason, usage=USAGE | usage)
    return Finished(None, replace(reply, output=[OutputItem("message", [text])]))


class FakeResponses:
    """A service that only keeps the requests, and the ids of those that are abandoned: tests send the events."""

    def __init__(self) -> None:
        self.requests: list[ResponseRequest] = []
        self.listeners: list[Listener] = []
        self.abandoned: list[str] = []

    def create(self, request: ResponseRequest, listener: Listener) -> str:
        self.requests.append(request)
        self.listeners.append(listener)
        return request.id

    def abandon(self, user: str, id: str) -> None:
        assert user == "ann"
        self.abandoned.append(id)

    @property
    def service(self) -> ResponseService:
        return cast(ResponseService, self)

    def tell(self, *events: ResponseEvent, index: int = 0) -> None:
        """Send events of a response."""
        for event in events:
            self.listeners[index].on_event(event)

    def accept(self, index: int = 0) -> None:
        """Send the first event of a response that is not rejected."""
        self.tell(Queued(f"resp_{index + 1}", 1), index=index)


# One object


@BOTH
async def test_a_completion_has_the_reply_and_its_usage(choice: type[Choice]) -> None:
    fake = FakeResponses()
    completion = complete(fake.service, "Hi", choice=choice)
    fake.accept()
    fake.tell(finished(Status.COMPLETED, "stop"))
    result = await completion.result()
    assert list(result) == ["id", "object", "created", "model", "choices", "usage"]
    assert result["id"].startswith(f"{choice.id_prefix}-")
    assert isinstance(result["created"], int)
    assert (result["object"], result["model"]) == (choice.object, "scripted")
    assert result["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }


async def test_each_completion_has_its_own_id(responses: ResponseManager) -> None:
    assert len({(await complete(responses, "say yes").result())["id"] for _ in range(3)}) == 3


async def test_a_completion_has_the_name_that_the_client_uses() -> None:
    fake = FakeResponses()
    completion = Completion(fake.service, CompletionRequest(request_of("Hi").chat, "gpt-4o"), ChatChoice)
    fake.tell(finished(Status.COMPLETED, "stop"))
    assert (await completion.result())["model"] == "gpt-4o"


# Several choices


async def test_the_choices_of_one_object_are_in_order_and_their_tokens_are_added(responses: ResponseManager) -> None:
    fake = FakeResponses()
    completion = complete(fake.service, "Hi", choices=3)
    for index in (2, 0, 1):
        fake.tell(finished(Status.COMPLETED, "stop", f"reply {index}", output_tokens=index + 1), index=index)
    result = await completion.result()
    told = [(choice["index"], choice["message"]["content"]) for choice in result["choices"]]
    assert told == [(0, "reply 0"), (1, "reply 1"), (2, "reply 2")]
    assert result["usage"]["prompt_tokens"] == 3
    assert result["usage"]["completion_tokens"] == 6
    assert result["usage"]["total_tokens"] == 9
    assert result["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
    both = (await complete(responses, "say yes", choices=2).result())["choices"]
    assert [choice["message"]["content"] for choice in both] == ["yes", "yes"]


async def test_the_chunks_of_several_choices_come_as_they_are_made() -> None:
    fake = FakeResponses()
    completion = stream(fake.service, "Hi", choices=2, include_usage=True)
    fake.accept(0)
    fake.tell(OutputItemAdded("resp_1", 0, OutputItem("message")), OutputDelta("resp_1", 0, "a"))
    fake.accept(1)
    fake.tell(OutputItemAdded("resp_2", 0, OutputItem("message")), OutputDelta("resp_2", 0, "b"), index=1)
    fake.tell(OutputDelta("resp_1", 0, "c"), finished(Status.COMPLETED, "stop"))
    fake.tell(OutputDelta("resp_2", 0, "d"), finished(Status.INCOMPLETE, "max_output_tokens"), index=1)
    *chunks, last = await chunks_of(completion)
    told = [(chunk["choices"][0]["index"], chunk["choices"][0]["delta"].get("content")) for chunk in chunks]
    assert told == [(0, ""), (1, ""), (0, "a"), (1, "b"), (0, "c"), (0, None), (1, "d"), (1, None)]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert [reason for reason in reasons if reason] == ["stop", "length"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)


@pytest.mark.parametrize("is_stream", [False, True], ids=["one object", "stream"])
async def test_if_one_choice_is_refused_the_others_end(is_stream: bool) -> None:
    fake = FakeResponses()
    completion = complete(fake.service, "Hi", choices=3, stream=is_stream)
    fake.accept(0)
    fake.tell(Rejected("resp_2", QueueFullError("the queue is full")), index=1)
    with pytest.raises(QueueFullError):
        await (completion.wait_started() if is_stream else completion.result())
    assert fake.abandoned == [request.id for request in fake.requests]


@pytest.mark.parametrize("is_stream", [False, True], ids=["one object", "stream"])
async def test_if_one_choice_fails_the_others_end(is_stream: bool) -> None:
    fake = FakeResponses()
    completion = complete(fake.service, "Hi", choices=2, stream=is_stream)
    fake.accept(0)
    fake.accept(1)
    fake.tell(finished(Status.FAILED, "server_error"), index=1)
    if is_stream:
        assert (await chunks_of(completion))[-1] == {"error": render_error(ServerError())}
    else:
        with pytest.raises(ServerError):
            await completion.result()
    assert fake.abandoned == [request.id for request in fake.requests]


async def test_each_choice_counts_as_a_request(responses: ResponseManager, scripted: ScriptedChat) -> None:
    completion = stream(responses, "wait here", choices=3)
    await completion.wait_started()
    assert dict(scripted.admission.in_flight) == {"ann": 3}
    scripted.admission.slots, scripted.admission.free = 4, 1
    with pytest.raises(QueueFullError):
        await stream(responses, "say yes", choices=2).wait_started()
    completion.cancel()
    await scripted.idle.wait()
    assert dict(scripted.admission.in_flight) == {}


# Chunks


@BOTH
async def test_usage_is_in_the_last_chunk_and_null_before(responses: ResponseManager, choice: type[Choice]) -> None:
    *before, last = await chunks_of(stream(responses, "say all of it", choice=choice, include_usage=True))
    assert {chunk["usage"] for chunk in before} == {None}
    assert before[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == []
    assert last["usage"] == (await complete(responses, "say all of it").result())["usage"]
    assert all("usage" not in chunk for chunk in await chunks_of(stream(responses, "say yes", choice=choice)))


async def test_usage_can_be_in_each_chunk() -> None:
    fake = FakeResponses()
    completion = stream(fake.service, "Hi", include_usage=True, continuous_usage=True)
    fake.accept()
    fake.tell(
        OutputItemAdded("resp_1", 0, OutputItem("message")),
        OutputDelta("resp_1", 0, "a", usage=Usage(3, 1, 1)),
        OutputDelta("resp_1", 0, "b", usage=Usage(3, 1, 2, 1)),
        finished(Status.COMPLETED, "stop"),
    )
    chunks = await chunks_of(completion)
    usages = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert usages == [None, 1, 2, None, 2]


async def test_a_queue_position_is_a_comment(responses: ResponseManager) -> None:
    _, *frames = await frames_of(stream(responses, "queue here"))
    assert frames[:2] == [": position 2 in the wait queue\n\n", ": position 1 in the wait queue\n\n"]


async def test_a_waiting_stream_sends_its_first_chunk_at_once(
    responses: ResponseManager, scripted: ScriptedChat
) -> None:
    completion = stream(responses, "hold here")
    await completion.wait_started()
    assert '"role":"assistant"' in await anext(completion.frames())
    assert scripted.running == 1


@pytest.mark.parametrize(
    "text",
    ["a\nb\r\n\r\nc\rd", "data: [DONE]\n\n", "\u2028\u2029\x85\x0b\x0c\x1c", "你好 😀", '"\\'],
    ids=["newlines", "end of stream", "other line ends", "not ASCII", "quotes"],
)
async def test_each_chunk_is_one_line_with_the_exact_text(responses: ResponseManager, text: str) -> None:
    frames = await frames_of(stream(responses, f"say {text}"))
    for frame in frames:
        assert frame.endswith("\n\n")
        assert len(frame.splitlines()) == 2, "one line with the data, and an empty one"
    assert content([data_of(frame) for frame in frames[:-1]]) == text


@BOTH
@pytest.mark.parametrize(
    ("reason", "finish_reason"), [("stop", "stop"), ("max_output_tokens", "length"), ("context_length", "length")]
)
async def test_a_finish_reason_has_the_name_of_openais_api(
    choice: type[Choice], reason: FinishReason, finish_reason: str
) -> None:
    fake = FakeResponses()
    streamed, whole = (complete(fake.service, "Hi", choice=choice, stream=is_stream) for is_stream in (True, False))
    for index in (0, 1):
        fake.accept(index)
        fake.tell(finished(Status.COMPLETED if reason == "stop" else Status.INCOMPLETE, reason), index=index)
    assert (await chunks_of(streamed))[-1]["choices"][0]["finish_reason"] == finish_reason
    assert (await whole.result())["choices"][0]["finish_reason"] == finish_reason


# Errors


async def test_a_refused_request_fails_before_the_first_chunk(
    responses: ResponseManager, scripted: ScriptedChat
) -> None:
    scripted.admission.per_user = 0
    with pytest.raises(TooManyResponsesError):
        await complete(responses, "say yes").result()
    with pytest.raises(TooManyResponsesError):
        await stream(responses, "say yes").wait_started()
    assert not scripted.heard


async def test_a_failed_reply_is_no_completion(responses: ResponseManager, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ServerError):
        await complete(responses, "break here").result()
    assert "the script says so" in caplog.text


async def test_a_failed_reply_ends_its_chunks_with_the_error(
    responses: ResponseManager, caplog: pytest.LogCaptureFixture
) -> None:
    *before, last = await chunks_of(stream(responses, "break here", include_usage=True))
    assert content(before) == "here"
    assert last == {"error": render_error(ServerError())}


def without_param(error: APIError) -> APIError:
    error.param = None
    return error


class NotesThread(ChatChoice):
    """Tells in its text whether the event loop waits for it."""

    def whole(self, reply: Item) -> Json:
        return super().whole(reply) | {"in_loop": threading.current_thread() is threading.main_thread()}


async def test_a_whole_completion_is_made_beside_the_event_loop(responses: ResponseManager) -> None:
    whole = await complete(responses, "say it", choice=NotesThread).result()
    assert [choice["in_loop"] for choice in whole["choices"]] == [False]


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("server_error", ServerError()),
        ("server_shutdown", ServerStoppingError()),
        ("revoked", WrongCredentialsError()),
        ("format_failed", FormatFailedError()),
    ],
    ids=["server error", "shutdown", "revoked", "format"],
)
async def test_a_reason_to_fail_has_its_own_error(reason: str, error: APIError) -> None:
    fake = FakeResponses()
    streamed, whole = (complete(fake.service, "Hi", stream=is_stream) for is_stream in (True, False))
    for index in (0, 1):
        fake.accept(index)
        fake.tell(finished(Status.FAILED, reason), index=index)
    assert (await chunks_of(streamed))[-1] == {"error": render_error(error)}
    with pytest.raises(type(error)):
        await whole.result()


async def test_a_server_that_stops_ends_completions_with_an_error(
    scripted: ScriptedChat, conversations: Conversations, settings: Settings
) -> None:
    async with running(scripted, conversations, settings) as responses:
        whole, streamed = complete(responses, "wait here"), stream(responses, "wait here")
        await streamed.wait_started()
    with pytest.raises(ServerStoppingError):
        await whole.result()
    frames = [frame async for frame in streamed.frames()]
    assert data_of(frames[-2]) == {"error": render_error(ServerStoppingError())}


@BOTH
@pytest.mark.parametrize("error", [ContextLengthExceededError("too long"), MessagesRejectedError("not so")], ids=repr)
async def test_an_error_about_the_input_names_it_as_the_api_does(choice: type[Choice], error: APIError) -> None:
    fake = FakeResponses()
    streamed, whole = (complete(fake.service, "Hi", choice=choice, stream=is_stream) for is_stream in (True, False))
    fake.tell(Rejected("resp_1", error))
    fake.tell(Rejected("resp_2", error), index=1)
    for wait in (streamed.wait_started(), whole.result()):
        with pytest.raises(type(error)) as raised:
            await wait
        assert render_error(raised.value)["param"] == {ChatChoice: "messages", TextChoice: "prompt"}[choice]


# A real model


@pytest.fixture
async def tiny_responses(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel, conversations: Conversations, settings: Settings
) -> AsyncIterator[ResponseManager]:
    """Replies of a tiny model, with a context of 256 tokens."""
    async with EngineChat.opened(tokenizer, llama, settings) as chat:
        admission = Admission.of(settings)
        feed = silent_feed(conversations)
        async with ResponseManager.opened(chat, admission, conversations, feed, settings, Metrics()) as responses:
            yield responses


async def test_a_prompt_longer_than_the_context_is_refused_not_shortened(tiny_responses: ResponseManager) -> None:
    request = request_of(*["x" * 60] * 5, options=Options(max_output_tokens=1))  # each of them alone has room
    for wait in (
        Completion(tiny_responses, request, ChatChoice).result(),
        stream(tiny_responses, *["x" * 60] * 5).wait_started(),
    ):
        with pytest.raises(ContextLengthExceededError, match=r"^This model's maximum context length is 256 tokens\. "):
            await wait


async def test_messages_that_the_chat_template_rejects_are_refused(tiny_responses: ResponseManager) -> None:
    chat = ChatRequest("ann", [{"role": "assistant", "content": "Hi"}], Options())
    with pytest.raises(MessagesRejectedError, match="it cannot begin"):
        await Completion(tiny_responses, CompletionRequest(chat, "tiny"), ChatChoice).result()


# The client has gone


async def end_of(responses: ResponseManager, completion: Completion) -> asyncio.Task[Any]:
    """A task that waits for the end of a completion that is running."""
    listener = FakeListener()
    await responses.follow("ann", completion.response_ids[0], listener)
    return asyncio.create_task(listener.until(Finished))


async def test_a_cancel_ends_the_reply(responses: ResponseManager, scripted: ScriptedChat) -> None:
    completion = stream(responses, "wait here")
    await completion.wait_started()
    end = await end_of(responses, completion)
    completion.cancel()
    reply = (await end)[-1].reply
    assert (reply.status, reply.reason) == ("cancelled", "client_disconnected")
    assert (scripted.running, dict(scripted.admission.in_flight)) == (0, {})


async def test_a_cancel_before_the_reply_starts_ends_it_too(responses: ResponseManager, scripted: ScriptedChat) -> None:
    completion = stream(responses, "wait here")
    end = await end_of(responses, completion)
    completion.cancel()
    assert (await end)[-1].reply.status == "cancelled"
    assert (scripted.running, dict(scripted.admission.in_flight)) == (0, {})


async def test_a_cancel_while_the_reply_waits_ends_it(responses: ResponseManager, scripted: ScriptedChat) -> None:
    completion = stream(responses, "hold here")
    await completion.wait_started()
    end = await end_of(responses, completion)
    completion.cancel()
    assert (await end)[-1].reply.status == "cancelled"
    assert scripted.running == 0


async def test_a_cancel_after_the_end_changes_nothing(responses: ResponseManager, scripted: ScriptedChat) -> None:
    completion = complete(responses, "say all of it")
    result = await completion.result()
    completion.cancel()
    assert result["choices"][0]["finish_reason"] == "stop"
    assert scripted.running == 0


async def test_a_reply_ends_well_when_nobody_waits_for_its_result(
    responses: ResponseManager, scripted: ScriptedChat, caplog: pytest.LogCaptureFixture
) -> None:
    completion = complete(responses, "wait here")
    end = await end_of(responses, completion)
    waiting = asyncio.create_task(completion.result())
    await asyncio.sleep(0)  # so that it waits
    waiting.cancel()  # as a web server does when it stops
    completion.cancel()
    async with asyncio.timeout(10):  # else a reply that does not end would be awaited for ever
        assert (await end)[-1].reply.status == "cancelled"
    assert waiting.cancelled()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with pytest.raises(ResponseNotFoundError):
        await responses.cancel("ann", completion.response_ids[0])


# Nothing is kept


@pytest.mark.parametrize("order", ["say", "wait", "break"])
async def test_a_completion_is_neither_buffered_nor_stored(
    responses: ResponseManager, conversations: Conversations, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    completion, listener = stream(responses, f"{order} something"), FakeListener()
    await completion.wait_started()
    end = await end_of(responses, completion)
    if order == "wait":
        completion.cancel()
    await end
    with pytest.raises(ResponseNotFoundError):
        await responses.follow("ann", completion.response_ids[0], listener)
    assert listener.heard.empty()
    with pytest.raises(ResponseNotFoundError):
        await conversations.find_response("ann", completion.response_ids[0])
    assert await conversations.list_page("ann", Listing(9, None, "")) == ([], False)


async def test_a_completion_takes_no_room_of_the_buffered_replies(
    scripted: ScriptedChat, conversations: Conversations, settings: Settings
) -> None:
    async with running(scripted, conversations, settings, replay_bytes=5_000) as responses:
        listener, follower = FakeListener(), FakeListener()
        request = ResponseRequest(ChatRequest("ann", user_messages("say kept"), Options()), Unstored())
        kept = responses.create(request, listener)
        await listener.until(Finished)
        await complete(responses, "say " + "x" * 9_000).result()
        await responses.follow("ann", kept, follower)
        end = (await follower.until(Finished))[-1]
    assert isinstance(end, Finished)
    assert end.reply.content == "kept"


async def test_a_completion_is_a_stateless_request() -> None:
    fake = FakeResponses()
    completion = complete(fake.service, "Hi", options=Options(seed=7), choices=2)
    assert completion.response_ids == [request.id for request in fake.requests]
    assert fake.requests == [
        ResponseRequest(ChatRequest("ann", user_messages("Hi"), Options(seed=seed)), Stateless()) for seed in (7, 8)
    ]
