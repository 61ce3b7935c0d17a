"""OpenAI's own package, unmodified, with a real server."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import httpx2
import openai
import pydantic
import pytest
from openai import AsyncOpenAI, OpenAI, Stream
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.applications import Starlette

from models.engine.scheduler import PrefillLimits
from models.language.engine_chat import EngineChat
from models.options import Options
from models.settings import Settings
from models.validation import Json
from models.web.session_socket import FRAME_BYTES
from server import create_app
from tests.support.client import ANN, BOB
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served, serve
from tests.support.sockets import (
    all_tasks,
    call,
    chat_v2,
    events_until,
    events_until_done,
    server_tracebacks,
    wait_for_other_tasks,
)
from tests.support.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.anyio

T = TypeVar("T")

streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["object", "stream"])


@cache
def certificates() -> ssl.SSLContext:
    """One SSL context for all clients, since each of them takes 40 ms."""
    return ssl.create_default_context()


def client_of(served: Served, secret: str = ANN, **options: Any) -> OpenAI:
    """The package at a server."""
    defaults: Json = {"base_url": f"{served.url}/v1", "api_key": secret, "max_retries": 0}
    if "http_client" not in options:
        options["http_client"] = openai.DefaultHttpxClient(verify=certificates())
    return OpenAI(**defaults | options)


@pytest.fixture
def client(scripted_server: Served) -> Iterator[OpenAI]:
    """The package, as ann, at a server with a scripted model."""
    with client_of(scripted_server) as client:
        yield client


def user(content: str) -> Any:
    """A message of the user."""
    return {"role": "user", "content": content}


def ask(client: OpenAI, content: str, stream: bool = False, **options: Any) -> Any:
    """Ask for a completion. Returns it, or the list of its chunks."""
    defaults: Json = {"model": "scripted", "messages": [user(content)], "stream": stream}
    completion = client.chat.completions.create(**defaults | options)
    return list(completion) if stream else completion


def text(answer: ChatCompletion | list[ChatCompletionChunk]) -> str:
    """The text of a completion or of chunks."""
    if isinstance(answer, ChatCompletion):
        return answer.choices[0].message.content or ""
    return "".join(choice.delta.content or "" for chunk in answer for choice in chunk.choices)


def finish_reason(answer: ChatCompletion | list[ChatCompletionChunk]) -> str | None:
    """The finish reason of a completion or of chunks."""
    if isinstance(answer, ChatCompletion):
        return answer.choices[0].finish_reason
    return [choice.finish_reason for chunk in answer for choice in chunk.choices][-1]


def usage(answer: ChatCompletion | list[ChatCompletionChunk]) -> tuple[int, int, int]:
    """The prompt tokens, the completion tokens and their sum."""
    usage = answer.usage if isinstance(answer, ChatCompletion) else answer[-1].usage
    assert usage
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


@contextmanager
def waiting_reply(client: OpenAI, **options: Any) -> Iterator[Stream[ChatCompletionChunk]]:
    """The stream of a reply that has said "here" and goes on."""
    create = client.chat.completions.create
    with create(model="scripted", messages=[user("wait here")], stream=True, **options) as stream:
        assert text([next(stream), next(stream)]) == "here"
        yield stream


async def condition(met: Callable[[], object]) -> None:
    """Wait, in the server's loop, until a condition is met."""
    while not met():  # noqa: ASYNC110  # there are no events for all of these conditions
        await asyncio.sleep(0)


async def called(function: Callable[[], T]) -> T:
    """A function as a coroutine."""
    return function()


# Completions


def test_a_message_is_answered(client: OpenAI) -> None:
    completion = ask(client, "say all of it")
    assert (text(completion), finish_reason(completion), usage(completion)) == ("all of it", "stop", (1, 3, 4))
    assert completion.choices[0].message.role == "assistant"
    assert (completion.object, completion.model, len(completion.choices)) == ("chat.completion", "scripted", 1)
    assert completion.id.startswith("chatcmpl-")


@streamed_or_not
def test_messages_of_all_roles_reach_the_model(client: OpenAI, scripted: ScriptedChat, stream: bool) -> None:
    parts = [{"type": "text", "text": "say it in"}, {"type": "text", "text": "parts"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": parts},
    ]
    assert text(ask(client, "", stream, messages=messages)) == "it in\nparts"
    ((heard, _),) = scripted.heard
    assert [(message["role"], message["content"]) for message in heard] == [
        ("system", "Be brief."),
        ("user", "你好"),
        ("assistant", "Hi"),
        ("user", "say it in\nparts"),
    ]


def test_the_packages_own_reply_can_be_sent_back(client: OpenAI, scripted: ScriptedChat) -> None:
    reply = ask(client, "say yes").choices[0].message
    for sent in (reply, reply.model_dump()):
        ask(client, "", messages=[user("say yes"), sent, user("say no")])
        assert [message["content"] for message in scripted.heard[-1][0]] == ["say yes", "yes", "say no"]


@streamed_or_not
def test_every_supported_parameter_reaches_the_model(client: OpenAI, scripted: ScriptedChat, stream: bool) -> None:
    supported: Json = {
        "temperature": 1.5,
        "top_p": 0.5,
        "max_completion_tokens": 9,
        "stop": ["END", "\n\n"],
        "seed": 7,
        "frequency_penalty": -0.5,
        "presence_penalty": 1.5,
        "extra_body": {"top_k": 40, "repetition_penalty": 1.3},
    }
    ask(client, "say yes", stream, **supported)
    ask(client, "say yes", stream, max_tokens=5, stop="END")
    ask(client, "say yes", stream)
    expected = Options(None, 1.5, 0.5, 40, 0.0, 1.3, -0.5, 1.5, 9, ("END", "\n\n"), 7)
    limited = Options(max_output_tokens=5, stop=("END",))
    assert [options for _, options in scripted.heard] == [expected, limited, Options()]


def test_the_end_user_of_a_completion_is_logged(client: OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    ask(client, "say yes", user="customer-5")
    assert "end_user=customer-5" in caplog.text


@streamed_or_not
def test_unsupported_parameters_with_neutral_values_are_accepted(client: OpenAI, stream: bool) -> None:
    neutral: Json = {"n": 1, "tools": [], "logprobs": False, "response_format": {"type": "text"}, "store": False}
    assert text(ask(client, "say yes", stream, **neutral)) == "yes"


@streamed_or_not
def test_parameters_that_cannot_change_the_reply_are_accepted(client: OpenAI, stream: bool) -> None:
    ignored: Json = {
        "metadata": {"topic": "x"},
        "store": True,
        "service_tier": "flex",
        "prediction": {"type": "content", "content": "yes"},
        "verbosity": "low",
        "parallel_tool_calls": True,
        "seed": -1,
        "tools": [WEATHER],
        "tool_choice": "none",
        "extra_body": {"top_k": -1, "ignore_eos": True, "chat_template_kwargs": {"enable_thinking": False}},
    }
    messages = [{"role": "user", "content": "say yes", "name": "ann"}]
    assert text(ask(client, "", stream, messages=messages, **ignored)) == "yes"


@streamed_or_not
def test_several_choices_have_an_index_each(client: OpenAI, scripted: ScriptedChat, stream: bool) -> None:
    answer = ask(client, "say yes", stream, n=3, seed=7)
    assert sorted(options.seed or 0 for _, options in scripted.heard) == [7, 8, 9]
    if stream:
        said = ["", "", ""]
        for chunk in answer:
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
        assert said == ["yes"] * 3
    else:
        assert [(choice.index, choice.message.content) for choice in answer.choices] == [
            (0, "yes"),
            (1, "yes"),
            (2, "yes"),
        ]


def test_twelve_requests_at_once_are_all_answered(settings: Settings) -> None:
    with tiny(settings) as (_, client):
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: ask(client, "Hello", **GREEDY), range(12)))
    assert len({text(answer) for answer in answers}) == 1


def test_a_completion_creates_no_conversation(client: OpenAI) -> None:
    ask(client, "say yes")
    listing = client.get("/conversations", cast_to=httpx2.Response).json()
    assert (listing["data"], listing["has_more"]) == ([], False)


# Streams


def test_a_stream_has_the_role_then_the_text_then_the_finish_reason(client: OpenAI) -> None:
    first, *middle, last = ask(client, "say all of it", stream=True)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in middle] == ["all ", "of i", "t"]
    assert [chunk.choices[0].finish_reason for chunk in (first, *middle, last)] == [None] * 4 + ["stop"]
    assert last.choices[0].delta.content is None
    for chunk in (first, *middle, last):
        assert (chunk.id, chunk.created) == (first.id, first.created)
        assert (chunk.object, chunk.model) == ("chat.completion.chunk", "scripted")
        assert "usage" not in chunk.model_fields_set


def test_a_stream_ends_with_its_usage_if_that_is_requested(client: OpenAI) -> None:
    *before, last = ask(client, "say all of it", stream=True, stream_options={"include_usage": True})
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in before)
    assert finish_reason(before) == "stop"
    assert last.choices == []
    assert last.usage == ask(client, "say all of it").usage


@pytest.mark.own_replies
def test_a_stream_ends_with_done_and_proxies_do_not_buffer_it(client: OpenAI) -> None:
    create = client.chat.completions.with_streaming_response.create
    with create(model="scripted", messages=[user("queue here")], stream=True) as response:
        lines = list(response.iter_lines())
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-store", "no")
    assert [line for line in lines if line][-1] == "data: [DONE]"
    comments = [line for line in lines if line.startswith(":")]
    assert comments == [": position 2 in the wait queue", ": position 1 in the wait queue"]


def test_text_is_streamed_while_the_reply_goes_on(
    client: OpenAI, scripted_server: Served, scripted: ScriptedChat
) -> None:
    with waiting_reply(client) as stream:
        assert scripted.running == 1
        scripted_server.in_loop(scripted.release)
        assert finish_reason(list(stream)) == "stop"


@pytest.mark.own_replies
def test_a_stream_begins_before_the_reply_has_a_slot(
    client: OpenAI, scripted_server: Served, scripted: ScriptedChat
) -> None:
    with client.chat.completions.create(model="scripted", messages=[user("hold on")], stream=True) as stream:
        assert next(stream).choices[0].delta.role == "assistant"
        scripted_server.in_loop(scripted.release)
        assert text([next(stream)]) == "on"


def test_the_packages_stream_helper_returns_the_whole_reply(client: OpenAI) -> None:
    with client.chat.completions.stream(model="scripted", messages=[user("say all of it")]) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        completion = stream.get_final_completion()
    assert "".join(deltas) == "all of it"
    assert (text(completion), finish_reason(completion)) == ("all of it", "stop")


@streamed_or_not
def test_special_characters_arrive_unchanged(client: OpenAI, stream: bool) -> None:
    for reply in ("one\n\ntwo\r\n", "data: [DONE]", "\u2028\x85\x0c", "你好 😀"):
        assert text(ask(client, f"say {reply}", stream)) == reply


# Reasoning and tools


@streamed_or_not
def test_reasoning_is_apart_from_the_text(client: OpenAI, stream: bool) -> None:
    answer = ask(client, "perform think Hmm. Yes. | say It is so.", stream)
    assert text(answer) == "It is so."
    if stream:
        pieces = [getattr(choice.delta, "reasoning_content", "") for chunk in answer for choice in chunk.choices]
        assert "".join(pieces) == "Hmm. Yes."
    else:
        assert answer.choices[0].message.reasoning_content == "Hmm. Yes."


WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALLS = 'perform say Let me see. | call weather {"city": "Paris"} | call weather {"city": "Rome"}'


def test_calls_of_tools_can_be_answered(client: OpenAI, scripted: ScriptedChat) -> None:
    answer = ask(client, CALLS, tools=[WEATHER], tool_choice="required")
    message = answer.choices[0].message
    assert (message.content, finish_reason(answer)) == ("Let me see.", "tool_calls")
    assert [call.function.arguments for call in message.tool_calls] == ['{"city": "Paris"}', '{"city": "Rome"}']
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"{call.id} is warm"} for call in message.tool_calls
    ]
    for sent in (message, message.model_dump(), message.model_dump(exclude_none=True)):
        ask(client, "", messages=[user(CALLS), sent, *results, user("say warm")], tools=[WEATHER])
        asked, called, first, *_ = scripted.requests[-1].messages
        assert (asked["role"], called["content"]) == ("user", "Let me see.")
        assert [call["id"] for call in called["tool_calls"]] == [call.id for call in message.tool_calls]
        assert first == {"role": "tool", "content": results[0]["content"], "tool_call_id": results[0]["tool_call_id"]}
    assert scripted.requests[0].tools.choice == "required"
    assert scripted.requests[0].tools.tools[0].strict


def test_the_packages_stream_helper_returns_the_calls(client: OpenAI) -> None:
    messages = [user(CALLS)]
    with client.chat.completions.stream(model="scripted", messages=messages, tools=[WEATHER]) as stream:  # type: ignore[list-item]
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        completion = stream.get_final_completion()
    assert [(event.index, event.name, event.parsed_arguments) for event in done] == [
        (0, "weather", {"city": "Paris"}),
        (1, "weather", {"city": "Rome"}),
    ]
    message = completion.choices[0].message
    assert message.tool_calls
    assert len({call.id for call in message.tool_calls}) == 2
    assert (message.content, completion.choices[0].finish_reason) == ("Let me see.", "tool_calls")


class City(pydantic.BaseModel):
    name: str
    people: int


def test_the_packages_parse_helper_returns_an_object(client: OpenAI, scripted: ScriptedChat) -> None:
    said = 'say {"name": "Paris", "people": 2100000}'
    completion = client.chat.completions.parse(model="scripted", messages=[user(said)], response_format=City)
    assert completion.choices[0].message.parsed == City(name="Paris", people=2_100_000)
    format = scripted.requests[0].format
    assert (format.type, format.param) == ("json_schema", "response_format.json_schema.schema")
    assert isinstance(format.value, dict)
    assert format.value["required"] == ["name", "people"]


# Texts without a chat template


def test_a_text_is_continued(client: OpenAI, scripted: ScriptedChat) -> None:
    whole = client.completions.create(model="scripted", prompt="say and so on", max_tokens=99)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("and so on", "stop")
    streamed = list(client.completions.create(model="scripted", prompt="say and so on", stream=True))
    assert "".join(choice.text for chunk in streamed for choice in chunk.choices) == "and so on"
    assert [request.options.max_output_tokens for request in scripted.requests] == [99, 16]


def test_a_text_goes_to_a_real_model_as_it_is(tiny_client: OpenAI) -> None:
    create = tiny_client.completions.create
    whole = create(model=GREEDY["model"], prompt="Once upon", temperature=0, max_tokens=3)
    assert whole.usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len("Once upon"), 3)
    assert whole.choices[0].text
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens") as raised:
        create(model=GREEDY["model"], prompt="x" * 300)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "prompt")


# Models


def test_the_model_is_listed_and_can_be_retrieved(client: OpenAI, scripted_server: Served) -> None:
    (listed,) = client.models.list()
    assert (listed.id, listed.object, listed.owned_by) == ("scripted", "model", "parley")
    assert listed.created == scripted_server.app.state.started
    assert client.models.retrieve("scripted") == listed


def test_the_name_of_a_model_may_contain_a_slash(settings: Settings, scripted: ScriptedChat) -> None:
    scripted.model_name = "org/name-1.0"
    with serve(create_app(settings, scripted.opened)) as served, client_of(served) as client:
        assert client.models.retrieve("org/name-1.0").id == "org/name-1.0"
        assert ask(client, "say yes", model="org/name-1.0").model == "org/name-1.0"


# A real model


class Gate:
    """Stops an engine after some steps, until it is opened; `reached` is set when the engine has stopped or may not."""

    def __init__(self, steps: int | None = None) -> None:
        self.steps = 0
        self.reached = threading.Event()
        self._last = steps
        self._opened = threading.Event()

    def on_step(self, seconds: float) -> None:
        self.steps += 1
        if self.steps == self._last:
            self.reached.set()
            self._opened.wait()

    def open(self) -> None:
        self._opened.set()
        self.reached.set()

    @asynccontextmanager
    async def opens_tiny(self, app: Starlette) -> AsyncIterator[EngineChat]:
        """What `create_app` takes to run on the tiny Llama, which reads sixteen tokens of a prompt in a step."""
        async with EngineChat.opened(tiny_tokenizer(), tiny_llama(), app.state.settings, on_step=self.on_step) as chat:
            chat._engine.scheduler.prefill = PrefillLimits(beside=16, alone=16)
            yield chat


@contextmanager
def tiny(settings: Settings, gate: Gate | None = None, **changes: Any) -> Iterator[tuple[Served, OpenAI]]:
    """A server of the tiny Llama, and the package at it."""
    gate = gate or Gate()
    with serve(create_app(replace(settings, **changes), gate.opens_tiny)) as served:
        try:
            with client_of(served) as client:
                yield served, client
        finally:
            gate.open()


@pytest.fixture(scope="module")
def tiny_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """The package at one server of the tiny Llama, for tests that leave nothing behind there."""
    settings = Settings(context=256, slots=4, compile=False, data=tmp_path_factory.mktemp("data"), users={"ann": ANN})
    with tiny(settings) as (_, client):
        yield client


GREEDY: Json = {"model": Settings().model_name, "temperature": 0, "max_tokens": 12}
RANDOM: Json = GREEDY | {"temperature": 1.2, "max_tokens": 30}


@streamed_or_not
def test_the_same_seed_gives_the_same_reply(tiny_client: OpenAI, stream: bool) -> None:
    first = text(ask(tiny_client, "Hello", **RANDOM, seed=5))
    assert text(ask(tiny_client, "Hello", stream, **RANDOM, seed=5)) == first
    assert text(ask(tiny_client, "Hello", stream, **RANDOM, seed=6)) != first


def test_usage_is_the_same_for_a_stream_and_an_object(tiny_client: OpenAI) -> None:
    whole = ask(tiny_client, "Hello", **RANDOM, seed=5)
    streamed = ask(tiny_client, "Hello", True, **RANDOM, seed=5, stream_options={"include_usage": True})
    assert usage(whole) == usage(streamed)
    prompt, completion, total = usage(whole)
    assert (prompt, prompt + completion) == (len("|user\nHello|\n|assistant\n"), total)
    assert streamed[-1].usage.prompt_tokens_details.cached_tokens == prompt - 1


@streamed_or_not
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_reply_ends_at_its_maximum_length(tiny_client: OpenAI, name: str, stream: bool) -> None:
    more: Json = {"stream_options": {"include_usage": True}} if stream else {}
    answer = ask(tiny_client, "Hello", stream, model=GREEDY["model"], temperature=0, **{name: 3}, **more)
    assert (finish_reason(answer), usage(answer)[1]) == ("length", 3)


def test_a_reply_ends_where_the_context_is_full(settings: Settings) -> None:
    with tiny(settings, context=64) as (_, client):
        answer = ask(client, "Hello", model=GREEDY["model"], temperature=0)
        assert (finish_reason(answer), usage(answer)[2]) == ("length", 64)


@streamed_or_not
def test_a_stop_string_ends_a_reply_and_is_not_in_it(tiny_client: OpenAI, stream: bool) -> None:
    whole = text(ask(tiny_client, "Hello", **GREEDY))
    stop = whole[4:6]
    answer = ask(tiny_client, "Hello", stream, **GREEDY, stop=stop)
    assert (text(answer), finish_reason(answer)) == (whole.partition(stop)[0], "stop")


@streamed_or_not
def test_messages_that_exceed_the_context_are_refused(tiny_client: OpenAI, stream: bool) -> None:
    messages = [user("x" * 60)] * 5  # each of them fits alone
    with pytest.raises(openai.BadRequestError) as raised:
        ask(tiny_client, "", stream, **GREEDY | {"messages": messages})
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")
    assert "256" in raised.value.message
    assert text(ask(tiny_client, "Hello", stream, **GREEDY))


@streamed_or_not
def test_messages_that_the_chat_template_rejects_are_refused(tiny_client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="it cannot begin") as raised:
        ask(tiny_client, "", stream, **GREEDY | {"messages": [{"role": "assistant", "content": "Hi"}]})
    assert (raised.value.code, raised.value.param) == ("invalid_value", "messages")


# Errors


def sent_error(error: openai.APIStatusError) -> Json:
    """The error as it was sent, which must have the four fields of OpenAI's API and no other."""
    sent = error.response.json()
    assert sent.keys() == {"error"}
    assert sent["error"].keys() == {"message", "type", "param", "code"}
    assert sent["error"]["message"]
    assert (error.code, error.param, error.type) == tuple(sent["error"][name] for name in ("code", "param", "type"))
    assert error.response.headers["content-type"] == "application/json"
    return dict(sent["error"])


def test_a_wrong_key_is_an_authentication_error(scripted_server: Served) -> None:
    with client_of(scripted_server, "wrong") as client:
        calls: list[Callable[[], Any]] = [
            lambda: ask(client, "say yes"),
            lambda: ask(client, "say yes", stream=True),
            lambda: client.models.list(),
            lambda: client.models.retrieve("scripted"),
        ]
        for do in calls:
            with pytest.raises(openai.AuthenticationError) as raised:
                do()
            error = sent_error(raised.value)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_credentials")
            assert raised.value.response.headers["www-authenticate"] == "Bearer"


def test_too_many_wrong_keys_are_a_rate_limit_error(scripted_server: Served) -> None:
    with client_of(scripted_server, "wrong") as client:
        for _ in range(10):
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with pytest.raises(openai.RateLimitError) as raised:
            client.models.list()
    assert sent_error(raised.value)["code"] == "too_many_failures"
    assert raised.value.response.headers["retry-after"] == "60"


def test_the_session_cookie_is_a_key_for_our_own_page_only(scripted_server: Served) -> None:
    body = {"model": "scripted", "messages": [user("say yes")]}
    with httpx2.Client(base_url=scripted_server.url, verify=certificates()) as browser:
        assert browser.post("/v1/chat/completions", json=body).status_code == 401
        browser.post("/login", data={"secret": ANN})
        assert browser.get("/v1/models").status_code == 200
        own = browser.post("/v1/chat/completions", json=body, headers={"Origin": scripted_server.url})
        assert own.json()["choices"][0]["message"]["content"] == "yes"
        for headers in ({"Origin": "https://evil.example"}, {}):
            other = browser.post("/v1/chat/completions", json=body, headers=headers)
            assert (other.status_code, other.json()["error"]["code"]) == (403, "origin_not_allowed")


@streamed_or_not
def test_a_completion_of_another_model_is_not_found(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        ask(client, "say yes", stream, model="gpt-5")
    error = sent_error(raised.value)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "scripted" in error["message"]


def test_another_model_cannot_be_retrieved(client: OpenAI) -> None:
    for name in ("gpt-5", "org/name"):
        with pytest.raises(openai.NotFoundError) as raised:
            client.models.retrieve(name)
        assert sent_error(raised.value)["code"] == "model_not_found"


def test_other_endpoints_of_openai_are_not_found(client: OpenAI) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: client.embeddings.create(model="scripted", input="Hi"),
        lambda: client.moderations.create(input="Hi"),
        lambda: client.files.list(),
    ]
    for do in calls:
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions") as raised:
            do()
        assert sent_error(raised.value)["code"] == "unknown_url"


def test_completions_cannot_be_listed(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.list()
    assert (raised.value.status_code, sent_error(raised.value)["type"]) == (405, "invalid_request_error")
    assert raised.value.response.headers["allow"] == "POST"


@streamed_or_not
def test_an_unsupported_parameter_is_a_bad_request_that_names_it(
    client: OpenAI, scripted: ScriptedChat, stream: bool
) -> None:
    unsupported: Json = {
        "functions": [{"name": "weather", "parameters": {}}],
        "function_call": {"name": "weather"},
        "modalities": ["text", "audio"],
        "audio": {"voice": "ash", "format": "wav"},
        "web_search_options": {},
    }
    for name, value in unsupported.items():
        with pytest.raises(openai.BadRequestError, match=name) as raised:
            ask(client, "say yes", stream, **{name: value})
        error = sent_error(raised.value)
        assert (error["code"], error["param"], error["type"]) == (
            "unsupported_parameter",
            name,
            "invalid_request_error",
        )
    assert not scripted.heard


@streamed_or_not
def test_an_unknown_parameter_is_a_bad_request_that_names_it(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, "say yes", stream, extra_body={"frobnicate": 1})
    error = sent_error(raised.value)
    assert (error["code"], error["param"]) == ("unknown_parameter", "frobnicate")


def test_a_bad_value_is_a_bad_request_that_names_the_parameter(client: OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    bad: list[tuple[str, Json]] = [
        ("temperature", {"temperature": 3}),
        ("top_p", {"top_p": 0}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("stop", {"stop": ""}),
        ("seed", {"seed": -2}),
        ("n", {"n": 9}),
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "two words"}}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
        ("user", {"extra_body": {"user": 5}}),
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"role": "function", "content": "Hi", "name": "x"}]}),
        ("messages[1].content[0]", {"messages": [user("Hi"), {"role": "user", "content": [image]}]}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
    ]
    for param, options in bad:
        with pytest.raises(openai.BadRequestError) as raised:
            ask(client, "say yes", **options)
        assert sent_error(raised.value)["param"] == param


def test_a_body_that_is_not_a_json_object_is_a_bad_request(client: OpenAI) -> None:
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        with pytest.raises(openai.BadRequestError) as raised:
            client.post("/chat/completions", content=body, cast_to=httpx2.Response)
        assert sent_error(raised.value)["code"] == "invalid_json"


@pytest.mark.parametrize("length", [FRAME_BYTES, 4 * FRAME_BYTES])
def test_a_body_over_the_limit_is_too_large(client: OpenAI, scripted: ScriptedChat, length: int) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        ask(client, "x" * length)
    assert (raised.value.status_code, sent_error(raised.value)["code"]) == (413, "body_too_large")
    assert text(ask(client, "say still here")) == "still here"
    assert len(scripted.heard) == 1


def test_a_body_of_exactly_the_limit_is_accepted(client: OpenAI) -> None:
    body = json.dumps({"model": "scripted", "messages": [user("say yes")]}).encode()
    response = client.post("/chat/completions", content=body.ljust(FRAME_BYTES), cast_to=httpx2.Response)
    assert response.json()["choices"][0]["message"]["content"] == "yes"


@pytest.mark.own_replies
@streamed_or_not
def test_more_waiting_replies_than_a_user_may_have_are_a_rate_limit_error(
    client: OpenAI, scripted: ScriptedChat, stream: bool
) -> None:
    scripted.admission.per_user = 1
    with waiting_reply(client):
        with pytest.raises(openai.RateLimitError) as raised:
            ask(client, "say yes", stream)
    error = sent_error(raised.value)
    assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_responses")
    assert raised.value.response.headers["retry-after"] == "5"


@pytest.mark.parametrize("limit", [{"rate": "2/hour"}, {"token_rate": "4/day"}], ids=["requests", "tokens"])
@streamed_or_not
def test_a_user_over_a_rate_limit_is_told_when_to_try_again(settings: Settings, limit: Json, stream: bool) -> None:
    with tiny(settings, **limit) as (served, client):
        ask(client, "Hello", stream, **GREEDY)
        if "rate" in limit:
            ask(client, "Hello", stream, **GREEDY)
        with pytest.raises(openai.RateLimitError) as raised:
            ask(client, "Hello", stream, **GREEDY)
        error = sent_error(raised.value)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert 1 <= int(raised.value.response.headers["retry-after"]) <= 86_400
        with client_of(served, BOB) as other:
            assert text(ask(other, "Hello", stream, **GREEDY))


@pytest.mark.own_replies
@streamed_or_not
def test_a_full_wait_queue_is_a_server_error_with_a_time_to_try_again(
    client: OpenAI, scripted: ScriptedChat, stream: bool
) -> None:
    scripted.admission.shrink(1)
    with waiting_reply(client):
        with pytest.raises(openai.InternalServerError) as raised:
            ask(client, "say yes", stream)
    assert (raised.value.status_code, sent_error(raised.value)["code"]) == (503, "queue_full")
    assert raised.value.response.headers["retry-after"] == "5"


@streamed_or_not
def test_a_stopping_server_refuses_with_a_time_to_try_again(
    client: OpenAI, scripted_server: Served, stream: bool
) -> None:
    call(scripted_server, called(scripted_server.app.state.admission.close))
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client, "say yes", stream)
    assert (raised.value.status_code, sent_error(raised.value)["code"]) == (503, "server_shutdown")
    assert raised.value.response.headers["retry-after"] == "5"


@pytest.mark.own_replies
def test_a_reply_that_fails_is_a_server_error(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client, "break here")
    error = sent_error(raised.value)
    assert (raised.value.status_code, error["type"], error["code"]) == (500, "server_error", "server_error")
    assert "script" not in error["message"], "the reason is only for the log"


@pytest.mark.own_replies
def test_a_stream_that_fails_ends_with_an_error_after_its_text(client: OpenAI) -> None:
    chunks: list[ChatCompletionChunk] = []
    with client.chat.completions.create(model="scripted", messages=[user("break here")], stream=True) as stream:
        with pytest.raises(openai.APIError) as raised:
            chunks.extend(stream)  # a list keeps the chunks before the error
    assert text(chunks) == "here"
    assert not isinstance(raised.value, openai.APIStatusError)
    assert (raised.value.code, raised.value.type) == ("server_error", "server_error")


def test_a_stream_ends_with_an_error_when_the_server_stops(client: OpenAI, scripted_server: Served) -> None:
    with waiting_reply(client) as stream:
        call(scripted_server, scripted_server.app.state.responses.drain(0))
        with pytest.raises(openai.APIError, match="stopping") as raised:
            next(stream)
    assert raised.value.code == "server_shutdown"


@pytest.mark.own_replies
@streamed_or_not
def test_the_package_tries_again_when_the_server_says_so(
    scripted_server: Served, scripted: ScriptedChat, stream: bool
) -> None:
    async def enter_and_leave() -> None:
        scripted.admission.leave(await scripted.admission.enter("bob"))

    scripted.admission.per_user = 1
    for _ in range(16):  # then a reply is known to end soon
        call(scripted_server, enter_and_leave())
    refused: list[str] = []

    def end_the_other_reply(response: httpx2.Response) -> None:
        if response.status_code == 429:
            refused.append(response.headers["retry-after"])
            scripted_server.in_loop(scripted.release)
            call(scripted_server, condition(lambda: not scripted.admission.in_flight))

    with httpx2.Client(event_hooks={"response": [end_the_other_reply]}, verify=certificates()) as http:
        client = client_of(scripted_server, max_retries=1, http_client=http)
        with waiting_reply(client):
            assert text(ask(client, "say at last", stream)) == "at last"
    assert refused == ["1"]


# Clients that hang up


class Watched:
    """An app that notes which of its HTTP requests have ended."""

    def __init__(self, app: Starlette) -> None:
        self.app = app
        self.state = app.state
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                self.ended.put(scope["path"])


async def in_server(served: Served, coroutine: Coroutine[Any, Any, T]) -> T:
    """Wait for a coroutine in the server's loop."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, served.loop))


async def ask_and_hang_up(served: Served, stream: bool, when: Awaitable[object], **request: Any) -> None:
    """Ask with the package, hang up at some moment, and wait until the server has no task left of it."""
    tasks = await in_server(served, all_tasks())
    url, http = f"{served.url}/v1", openai.DefaultAsyncHttpxClient(verify=certificates())

    async def asking() -> None:
        async with AsyncOpenAI(base_url=url, api_key=ANN, max_retries=0, http_client=http) as client:
            answer: Any = await client.chat.completions.create(stream=stream, **request)
            async for _ in answer:
                pass
        raise AssertionError("nobody hung up")

    task = asyncio.create_task(asking())
    await asyncio.wait([task, asyncio.ensure_future(when)], return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await in_server(served, wait_for_other_tasks(tasks))


@streamed_or_not
async def test_a_client_that_hangs_up_in_the_wait_queue_leaves_it(
    settings: Settings, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    with tiny(settings, slots=1) as (served, client):
        admission = served.app.state.admission
        ticket = await in_server(served, admission.enter("bob"))  # takes the only slot
        waits = in_server(served, condition(lambda: admission.waiting))
        await ask_and_hang_up(served, stream, waits, messages=[user("Hello")], **GREEDY)
        assert (admission.waiting, dict(admission.in_flight)) == ([], {"bob": 1})
        await in_server(served, called(lambda: admission.leave(ticket)))
        assert admission.free == 1
        assert text(await asyncio.to_thread(ask, client, "Hello", stream=False, **GREEDY))
    assert not server_tracebacks(caplog)


@streamed_or_not
@pytest.mark.parametrize(
    ("length", "steps"),
    [(200, 1), (200, 7), (5, 3), (5, 8)],
    ids=["first prefill step", "prefill", "first decode step", "decode"],
)
async def test_a_client_that_hangs_up_has_no_slot_in_the_next_step(
    settings: Settings, caplog: pytest.LogCaptureFixture, length: int, steps: int, stream: bool
) -> None:
    gate = Gate(steps)
    with tiny(settings, gate) as (served, client):
        state = served.app.state
        reached = asyncio.to_thread(gate.reached.wait)
        request = {"messages": [user("x" * length)], "model": GREEDY["model"], "temperature": 0}
        await ask_and_hang_up(served, stream, reached, **request)
        assert (state.admission.free, dict(state.admission.in_flight)) == (settings.slots, {})
        gate.open()
        scheduler = state.chat._engine.scheduler
        await in_server(served, condition(lambda: scheduler.free_slots == settings.slots))
        assert gate.steps == steps
        assert text(await asyncio.to_thread(ask, client, "Hello", stream=False, **GREEDY))
    assert not server_tracebacks(caplog)


@streamed_or_not
@pytest.mark.parametrize("message", ["wait hello", "wait ", "hold on"])
async def test_a_client_that_hangs_up_ends_its_reply(
    scripted_server: Served, scripted: ScriptedChat, caplog: pytest.LogCaptureFixture, message: str, stream: bool
) -> None:
    running = in_server(scripted_server, condition(lambda: scripted.running))
    await ask_and_hang_up(scripted_server, stream, running, model="scripted", messages=[user(message)])
    await in_server(scripted_server, condition(lambda: not scripted.running and not scripted.admission.in_flight))
    assert "status=cancelled reason=client_disconnected" in caplog.text
    assert not server_tracebacks(caplog)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_client_that_closes_a_stream_ends_its_reply(
    scripted_server: Served, scripted: ScriptedChat, chunks: int
) -> None:
    tasks = call(scripted_server, all_tasks())
    with client_of(scripted_server) as client:
        create = client.chat.completions.create
        with create(model="scripted", messages=[user("wait some more")], stream=True) as stream:
            for _ in range(chunks):
                next(stream)
        call(scripted_server, wait_for_other_tasks(tasks))
        call(scripted_server, condition(lambda: not scripted.running and not scripted.admission.in_flight))
        assert text(ask(client, "say still here")) == "still here"


def test_a_client_that_hangs_up_disturbs_no_other_reply(scripted_server: Served, scripted: ScriptedChat) -> None:
    with client_of(scripted_server) as ann, client_of(scripted_server, BOB) as bob:
        with waiting_reply(bob) as others, chat_v2(scripted_server) as connection:
            connection.send('{"type": "response.create", "input": "wait here"}')
            events_until(connection, "response.output_text.delta")
            with waiting_reply(ann):
                assert scripted.running == 3
            call(scripted_server, condition(lambda: scripted.running == 2))
            scripted_server.in_loop(scripted.release)
            assert finish_reason(list(others)) == "stop"
            assert events_until_done(connection)[-1]["response"]["status"] == "completed"


def raw_request(stream: bool, content: str) -> bytes:
    """A request as it is sent to the server."""
    body = json.dumps({"model": "scripted", "messages": [user(content)], "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: parley\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {ANN}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@streamed_or_not
@pytest.mark.parametrize("content", ["wait here", "say yes", "hold on", "queue up", "break it"])
def test_a_client_that_hangs_up_before_the_first_chunk_leaves_nothing(
    settings: Settings, scripted: ScriptedChat, content: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(create_app(settings, scripted.opened))
    with serve(watched) as served:  # type: ignore[arg-type]
        tasks = call(served, all_tasks())
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.sendall(raw_request(stream, content))
            assert watched.ended.get() == "/v1/chat/completions"
        call(served, wait_for_other_tasks(tasks))
        assert (scripted.running, dict(scripted.admission.in_flight)) == (0, {})
    assert all("the script says so" in str(record.exc_info) for record in server_tracebacks(caplog))


async def response_of(app: Starlette, request: bytes, next_message: Callable[[], Awaitable[Json]]) -> bytes:
    """The body of an app's response to a request; `next_message` is what the web server says after the request."""
    head, _, body = request.partition(b"\r\n\r\n")
    lines = [line.partition(b": ") for line in head.split(b"\r\n")[1:]]
    headers = [(name.lower(), value) for name, _, value in lines]
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    response = bytearray()

    async def receive() -> Json:
        return messages.pop() if messages else await next_message()

    async def send(message: Any) -> None:
        response.extend(message.get("body", b""))

    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "app": app}
    await app(scope, receive, send)
    return bytes(response)


async def disconnect() -> Json:
    return {"type": "http.disconnect"}


async def never() -> Json:
    await asyncio.Event().wait()
    raise AssertionError


@streamed_or_not
async def test_a_client_that_is_gone_when_its_request_is_read_ends_its_reply(
    settings: Settings, scripted: ScriptedChat, stream: bool
) -> None:
    app = create_app(settings, scripted.opened)
    async with app.router.lifespan_context(app):
        tasks = asyncio.all_tasks()
        await response_of(app, raw_request(stream, "wait here"), disconnect)
        await wait_for_other_tasks(tasks)
        assert (len(scripted.heard), scripted.running, dict(scripted.admission.in_flight)) == (1, 0, {})


@streamed_or_not
async def test_nothing_waits_for_the_client_after_the_response(
    settings: Settings, scripted: ScriptedChat, stream: bool
) -> None:
    app = create_app(settings, scripted.opened)
    async with app.router.lifespan_context(app):
        tasks = asyncio.all_tasks()
        assert b"yes" in await response_of(app, raw_request(stream, "say yes"), never)
        await wait_for_other_tasks(tasks)


@pytest.mark.parametrize("missing", [1, 30], ids=["last byte", "last 30 bytes"])
def test_a_client_that_hangs_up_in_its_request_leaves_nothing(
    settings: Settings, scripted: ScriptedChat, missing: int, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(create_app(settings, scripted.opened))
    with serve(watched) as served:  # type: ignore[arg-type]
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(raw_request(False, "say yes")[:-missing])
        watched.ended.get()
    assert not scripted.heard
    assert not server_tracebacks(caplog), "a client that goes is not a bug"


def test_a_client_that_does_not_read_holds_no_slot(scripted_server: Served, scripted: ScriptedChat) -> None:
    content = "say " + "x" * 400_000
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", scripted_server.port))
        slow.sendall(raw_request(True, content))
        call(scripted_server, condition(lambda: scripted.heard and not scripted.running))
        call(scripted_server, condition(lambda: not scripted.admission.in_flight))
