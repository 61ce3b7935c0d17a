from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.errors import (
    APIError,
    ContextLengthExceededError,
    InvalidValueError,
    ItemNotFoundError,
    MessagesRejectedError,
    ResponseNotFoundError,
    ServerError,
    ServerStoppingError,
    TooManyResponsesError,
    UnsupportedParameterError,
    WrongCredentialsError,
)
from models.generation.admission import Admission
from models.generation.events import Created, Finished, Rejected
from models.generation.interface import Listener, ModelInfo, ResponseRequest, ResponseService, Stateless, Unstored
from models.generation.manager import ResponseManager
from models.language.engine_chat import EngineChat
from models.messages import FinishReason, Message
from models.ops.metrics import Metrics
from models.options import Options
from models.protocols.chat_completions import (
    BaseChatCompletion,
    ChatCompletion,
    ChatCompletionChunks,
    render_error,
    render_model,
)
from models.protocols.chat_completions_request import ChatCompletionRequest
from models.settings import Settings
from models.store.conversations import Conversations, Listing
from models.store.item import Item, Status
from models.validation import Json
from tests.support.fake_client import FakeListener
from tests.support.scripted import ScriptedChat, running

pytestmark = pytest.mark.anyio

MODEL = ModelInfo("scripted", 4096, Options())
USAGE = {"input_tokens": 3, "cached_tokens": 1, "output_tokens": 2, "total_tokens": 5}


def user_messages(*contents: str) -> list[Message]:
    return [{"role": "user", "content": content} for content in contents]


def request_of(*contents: str, usage: bool = False, **options: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(user_messages(*contents), options, True, usage, None)


def complete(responses: ResponseService, *contents: str, **options: Any) -> ChatCompletion:
    """A running completion that is returned as one object."""
    return ChatCompletion(responses, MODEL, "ann", request_of(*contents, **options))


def stream(responses: ResponseService, *contents: str, usage: bool = False, **options: Any) -> ChatCompletionChunks:
    """A running completion that is sent in chunks."""
    return ChatCompletionChunks(responses, MODEL, "ann", request_of(*contents, usage=usage, **options))


async def frames_of(completion: ChatCompletionChunks) -> list[str]:
    """All frames of a stream."""
    await completion.wait_started()
    return [frame async for frame in completion.frames()]


async def chunks_of(completion: ChatCompletionChunks) -> list[Json]:
    """The data of all frames but the last."""
    *frames, end = await frames_of(completion)
    assert end == "data: [DONE]\n\n"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames if not frame.startswith(":")]


def content(chunks: list[Json]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def finished(status: Status, reason: str) -> Finished:
    return Finished(None, Item("resp_1", "assistant", "Hello", 7.0, status, reason, USAGE, {}, 0, "5", 0.5))


class FakeResponses:
    """A service that only keeps the requests: tests send the events."""

    def __init__(self) -> None:
        self.requests: list[ResponseRequest] = []

    def create(self, request: ResponseRequest, listener: Listener) -> str:
        self.requests.append(request)
        return "resp_1"


def no_responses() -> ResponseService:
    return cast(ResponseService, FakeResponses())


# One object


async def test_a_completion_has_the_reply_and_its_usage(responses: ResponseManager) -> None:
    result = await complete(responses, "Hi", "say all of it").result()
    assert list(result) == ["id", "object", "created", "model", "choices", "usage"]
    assert result.pop("id").startswith("chatcmpl-")
    assert isinstance(result.pop("created"), int)
    assert json.dumps(result) == json.dumps(
        {
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
    )


async def test_each_completion_has_its_own_id(responses: ResponseManager) -> None:
    assert len({(await complete(responses, "say yes").result())["id"] for _ in range(3)}) == 3


async def test_options_that_a_request_leaves_out_are_the_default_ones(
    responses: ResponseManager, scripted: ScriptedChat
) -> None:
    model = ModelInfo("scripted", 4096, Options(instructions="Be brief.", temperature=1.5, seed=3))
    request = request_of("say yes", temperature=0.0, stop=("END",))
    await ChatCompletion(responses, model, "ann", request).result()
    assert scripted.heard == [(user_messages("say yes"), Options("Be brief.", temperature=0.0, seed=3, stop=("END",)))]


# Chunks


async def test_chunks_are_the_role_then_text_then_the_finish_reason(responses: ResponseManager) -> None:
    first, *middle, last = await chunks_of(stream(responses, "say all of it"))
    assert [choice["delta"] for choice in first["choices"]] == [{"role": "assistant", "content": ""}]
    assert [chunk["choices"][0]["delta"] for chunk in middle] == [
        {"content": "all "},
        {"content": "of i"},
        {"content": "t"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in (first, *middle)] == [None] * 4
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    for chunk in (first, *middle, last):
        assert list(chunk) == ["id", "object", "created", "model", "choices"]
        assert (chunk["id"], chunk["created"]) == (first["id"], first["created"])
        assert (chunk["object"], chunk["model"]) == ("chat.completion.chunk", "scripted")


async def test_usage_is_in_the_last_chunk_and_null_before(responses: ResponseManager) -> None:
    *before, last = await chunks_of(stream(responses, "say all of it", usage=True))
    assert [chunk["usage"] for chunk in before] == [None] * 5
    assert before[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == []
    assert last["usage"] == (await complete(responses, "say all of it").result())["usage"]


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
    assert content([json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]) == text


@pytest.mark.parametrize(
    ("reason", "finish_reason"), [("stop", "stop"), ("max_output_tokens", "length"), ("context_length", "length")]
)
async def test_a_finish_reason_has_the_name_of_openais_api(reason: FinishReason, finish_reason: str) -> None:
    streamed, whole = stream(no_responses(), "Hi"), complete(no_responses(), "Hi")
    end = finished(Status.COMPLETED if reason == "stop" else Status.INCOMPLETE, reason)
    for completion in (streamed, whole):
        completion.on_event(Created("resp_1", None, 0))
        completion.on_event(end)
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
    *before, last = await chunks_of(stream(responses, "break here", usage=True))
    assert content(before) == "here"
    assert last == {"error": render_error(ServerError())}


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("server_error", ServerError()),
        ("server_shutdown", ServerStoppingError()),
        ("revoked", WrongCredentialsError()),
    ],
    ids=["server error", "shutdown", "revoked"],
)
async def test_a_reason_to_fail_has_its_own_error(reason: str, error: APIError) -> None:
    streamed, whole = stream(no_responses(), "Hi"), complete(no_responses(), "Hi")
    for completion in (streamed, whole):
        completion.on_event(Created("resp_1", None, 0))
        completion.on_event(finished(Status.FAILED, reason))
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
    assert json.loads(frames[-2].removeprefix("data: ")) == {"error": render_error(ServerStoppingError())}


@pytest.fixture
async def tiny_responses(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel, conversations: Conversations, settings: Settings
) -> AsyncIterator[ResponseManager]:
    """Replies of a tiny model, with a context of 256 tokens."""
    async with EngineChat.opened(tokenizer, llama, settings) as chat:
        admission = Admission.of(settings)
        async with ResponseManager.opened(chat, admission, conversations, settings, Metrics()) as responses:
            yield responses


async def test_a_prompt_longer_than_the_context_is_refused_not_shortened(tiny_responses: ResponseManager) -> None:
    messages = user_messages(*["x" * 60] * 5)  # each of them alone has room
    options = Options(max_output_tokens=1)
    listener = FakeListener()
    tiny_responses.create(ResponseRequest("ann", messages, options, Unstored()), listener)
    created = await listener.heard.get()
    assert isinstance(created, Created)
    assert created.left_out > 0  # without a completion it is shortened
    await listener.until(Finished)
    request = ChatCompletionRequest(messages, {"max_output_tokens": 1}, True, False, None)
    for wait in (
        ChatCompletion(tiny_responses, MODEL, "ann", request).result(),
        ChatCompletionChunks(tiny_responses, MODEL, "ann", request).wait_started(),
    ):
        with pytest.raises(ContextLengthExceededError, match="256") as raised:
            await wait
        assert render_error(raised.value)["param"] == "messages"


async def test_messages_that_the_chat_template_rejects_are_refused(tiny_responses: ResponseManager) -> None:
    request = ChatCompletionRequest([{"role": "assistant", "content": "Hi"}], {}, False, False, None)
    with pytest.raises(MessagesRejectedError, match="it cannot begin") as raised:
        await ChatCompletion(tiny_responses, MODEL, "ann", request).result()
    assert render_error(raised.value)["param"] == "messages"


def test_an_error_has_the_four_fields_of_openais_api() -> None:
    rendered = render_error(InvalidValueError("seed must be a number", "seed"))
    assert list(rendered.items()) == [
        ("message", "seed must be a number"),
        ("type", "invalid_request_error"),
        ("param", "seed"),
        ("code", "invalid_value"),
    ]
    assert render_error(ItemNotFoundError())["param"] == "after"
    assert render_error(ServerError())["param"] is None


def test_a_parameter_that_a_client_calls_input_keeps_its_name() -> None:
    with pytest.raises(UnsupportedParameterError) as raised:
        ChatCompletionRequest.parse(
            b'{"model": "scripted", "messages": [{"role": "user", "content": "x"}], "input": 1}', "scripted"
        )
    assert render_error(raised.value)["param"] == "input"


def test_a_model_is_listed_with_its_context() -> None:
    assert list(render_model(MODEL, 7).items()) == [
        ("id", "scripted"),
        ("object", "model"),
        ("created", 7),
        ("owned_by", "parley"),
        ("max_model_len", 4096),
    ]


# The client has gone


async def end_of(responses: ResponseManager, completion: BaseChatCompletion) -> asyncio.Task[Any]:
    """A task that waits for the end of a completion that is running."""
    listener = FakeListener()
    await responses.follow("ann", completion.response_id, 0, listener)
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


async def test_a_cancel_after_the_end_changes_nothing(responses: ResponseManager) -> None:
    completion = complete(responses, "say all of it")
    result = await completion.result()
    completion.cancel()
    assert await completion.result() == result
    assert result["choices"][0]["finish_reason"] == "stop"


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
    assert not caplog.records
    with pytest.raises(ResponseNotFoundError):
        responses.cancel("ann", completion.response_id)


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
        await responses.follow("ann", completion.response_id, 0, listener)
    assert listener.heard.empty()
    assert await conversations.find_reply("ann", completion.response_id) is None
    assert await conversations.list_page("ann", Listing(9, None, "")) == ([], False)


async def test_a_completion_takes_no_room_of_the_buffered_replies(
    scripted: ScriptedChat, conversations: Conversations, settings: Settings
) -> None:
    async with running(scripted, conversations, settings, replay_bytes=5_000) as responses:
        listener, follower = FakeListener(), FakeListener()
        request = ResponseRequest("ann", user_messages("say kept"), Options(), Unstored())
        kept = responses.create(request, listener)
        await listener.until(Finished)
        await complete(responses, "say " + "x" * 9_000).result()
        await responses.follow("ann", kept, 0, follower)
        end = (await follower.until(Finished))[-1]
    assert isinstance(end, Finished)
    assert end.reply.content == "kept"


async def test_a_completion_is_a_stateless_request(responses: ResponseManager) -> None:
    service = FakeResponses()
    completion = complete(cast(ResponseService, service), "Hi")
    completion.on_event(Rejected("resp_1", ServerError()))
    assert completion.response_id == "resp_1"
    assert service.requests == [ResponseRequest("ann", user_messages("Hi"), Options(), Stateless())]
    with pytest.raises(ServerError):
        await completion.result()
