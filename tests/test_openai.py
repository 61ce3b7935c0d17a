"""OpenAI's API as its own package sees it, unmodified, over a real server."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI, Stream
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.applications import Starlette

from models.admission import Admission
from models.chat import Chat
from models.options import Options
from models.settings import Settings
from server import FRAME_BYTES, create_app
from tests.conftest import ANN, BOB
from tests.scripted import ScriptedChat
from tests.serving import Served, serve
from tests.test_uvicorn import all_tasks, call, chat_v1, settled, tracebacks, until
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.anyio

Json = dict[str, Any]

streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["at once", "streamed"])


def client_of(served: Served, secret: str = ANN, **options: Any) -> OpenAI:
    return OpenAI(**{"base_url": f"{served.url}/v1", "api_key": secret, "max_retries": 0} | options)


@pytest.fixture
def client(scripted_server: Served) -> Iterator[OpenAI]:
    """The package, for ann, at a server whose model says what the test wants."""
    with client_of(scripted_server) as client:
        yield client


def user(content: str) -> Any:
    return {"role": "user", "content": content}


def ask(client: OpenAI, content: str, stream: bool = False, **options: Any) -> Any:
    """A completion, or the whole stream of one."""
    options = {"model": "scripted", "messages": [user(content)], "stream": stream} | options
    answer = client.chat.completions.create(**options)
    return list(answer) if stream else answer


def said(answer: ChatCompletion | list[ChatCompletionChunk]) -> str:
    """What a completion says, or its chunks."""
    if isinstance(answer, ChatCompletion):
        return answer.choices[0].message.content or ""
    return "".join(choice.delta.content or "" for chunk in answer for choice in chunk.choices)


def finish(answer: ChatCompletion | list[ChatCompletionChunk]) -> str | None:
    if isinstance(answer, ChatCompletion):
        return answer.choices[0].finish_reason
    return [choice.finish_reason for chunk in answer for choice in chunk.choices][-1]


def usage(answer: ChatCompletion | list[ChatCompletionChunk]) -> tuple[int, int, int]:
    told = answer.usage if isinstance(answer, ChatCompletion) else answer[-1].usage
    assert told
    return told.prompt_tokens, told.completion_tokens, told.total_tokens


@contextmanager
def waiting(client: OpenAI, **options: Any) -> Iterator[Stream[ChatCompletionChunk]]:
    """A reply that has said "here" and goes on."""
    create = client.chat.completions.create
    with create(model="scripted", messages=[user("wait here")], stream=True, **options) as stream:
        assert said([next(stream), next(stream)]) == "here"
        yield stream


async def condition(met: Callable[[], object]) -> None:
    """Wait, in the server's loop, until something is so."""
    while not met():  # noqa: ASYNC110  # nothing has an event for all that is waited for here
        await asyncio.sleep(0)


# Completions


def test_a_chat_is_answered(client: OpenAI) -> None:
    completion = ask(client, "say all of it")
    assert (said(completion), finish(completion), usage(completion)) == ("all of it", "stop", (1, 3, 4))
    assert completion.choices[0].message.role == "assistant"
    assert (completion.object, completion.model, len(completion.choices)) == ("chat.completion", "scripted", 1)
    assert completion.id.startswith("chatcmpl-")


@streamed_or_not
def test_all_kinds_of_messages_reach_the_model(client: OpenAI, scripted: ScriptedChat, stream: bool) -> None:
    parts = [{"type": "text", "text": "say it in"}, {"type": "text", "text": "parts"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": parts},
    ]
    assert said(ask(client, "", stream, messages=messages)) == "it in\nparts"
    ((heard, _),) = scripted.heard
    assert [(message["role"], message["content"]) for message in heard] == [
        ("system", "Be brief."),
        ("user", "你好"),
        ("assistant", "Hi"),
        ("user", "say it in\nparts"),
    ]


def test_a_reply_is_sent_back_as_the_package_gave_it(client: OpenAI, scripted: ScriptedChat) -> None:
    reply = ask(client, "say yes").choices[0].message
    for back in (reply, reply.model_dump()):
        ask(client, "", messages=[user("say yes"), back, user("say no")])
        assert [message["content"] for message in scripted.heard[-1][0]] == ["say yes", "yes", "say no"]


@streamed_or_not
def test_every_parameter_that_is_honoured_reaches_the_model(
    client: OpenAI, scripted: ScriptedChat, stream: bool
) -> None:
    honoured = {
        "temperature": 1.5,
        "top_p": 0.5,
        "max_completion_tokens": 9,
        "stop": ["END", "\n\n"],
        "seed": 7,
        "frequency_penalty": -0.5,
        "presence_penalty": 1.5,
        "extra_body": {"top_k": 40, "repetition_penalty": 1.3},
    }
    ask(client, "say yes", stream, **honoured)
    ask(client, "say yes", stream, max_tokens=5, stop="END")
    ask(client, "say yes", stream)
    wanted = Options(None, 1.5, 0.5, 40, 1.3, -0.5, 1.5, 9, ("END", "\n\n"), 7)
    limited = Options(max_output_tokens=5, stop=("END",))
    assert [options for _, options in scripted.heard] == [wanted, limited, Options()]


def test_whom_a_completion_is_for_is_logged(client: OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    ask(client, "say yes", user="customer-5")
    assert "end_user=customer-5" in caplog.text


@streamed_or_not
def test_parameters_that_ask_for_nothing_are_taken(client: OpenAI, stream: bool) -> None:
    nothing: Json = {"n": 1, "tools": [], "logprobs": False, "response_format": {"type": "text"}, "store": False}
    assert said(ask(client, "say yes", stream, **nothing)) == "yes"


def test_a_completion_makes_no_conversation(client: OpenAI, scripted_server: Served) -> None:
    ask(client, "say yes")
    listed = client.get("/conversations", cast_to=httpx2.Response).json()
    assert listed == {"data": [], "has_more": False}


# Streams


def test_chunks_say_who_speaks_then_what_then_how_it_ended(client: OpenAI) -> None:
    first, *middle, last = ask(client, "say all of it", stream=True)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in middle] == ["all ", "of i", "t"]
    assert [chunk.choices[0].finish_reason for chunk in (first, *middle, last)] == [None] * 4 + ["stop"]
    assert last.choices[0].delta.content is None
    for chunk in (first, *middle, last):
        assert (chunk.id, chunk.created) == (first.id, first.created)
        assert (chunk.object, chunk.model) == ("chat.completion.chunk", "scripted")
        assert "usage" not in chunk.model_fields_set


def test_usage_comes_last_where_it_is_asked_for_and_is_that_of_the_reply_at_once(client: OpenAI) -> None:
    *before, last = ask(client, "say all of it", stream=True, stream_options={"include_usage": True})
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in before)
    assert finish(before) == "stop"
    assert last.choices == []
    assert last.usage == ask(client, "say all of it").usage


def test_a_stream_ends_with_done_and_is_kept_by_no_proxy(client: OpenAI) -> None:
    create = client.chat.completions.with_streaming_response.create
    with create(model="scripted", messages=[user("queue here")], stream=True) as answer:
        lines = list(answer.iter_lines())
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert [line for line in lines if line.startswith(":")] == [": waits, 2 in the queue", ": waits, 1 in the queue"]


def test_what_is_said_comes_while_the_reply_goes_on(
    client: OpenAI, scripted_server: Served, scripted: ScriptedChat
) -> None:
    with waiting(client) as stream:
        assert scripted.running == 1
        scripted_server.in_loop(scripted.release)
        assert finish(list(stream)) == "stop"


def test_a_stream_begins_before_the_reply_has_a_slot(
    client: OpenAI, scripted_server: Served, scripted: ScriptedChat
) -> None:
    with client.chat.completions.create(model="scripted", messages=[user("hold on")], stream=True) as stream:
        assert next(stream).choices[0].delta.role == "assistant"
        scripted_server.in_loop(scripted.release)
        assert said([next(stream)]) == "on"


def test_the_packages_own_helper_for_streams_gathers_the_whole(client: OpenAI) -> None:
    with client.chat.completions.stream(model="scripted", messages=[user("say all of it")]) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        whole = stream.get_final_completion()
    assert "".join(deltas) == "all of it"
    assert (said(whole), finish(whole)) == ("all of it", "stop")


@streamed_or_not
def test_whatever_a_reply_says_arrives_as_it_is(client: OpenAI, stream: bool) -> None:
    for text in ("one\n\ntwo\r\n", "data: [DONE]", "\u2028\x85\x0c", "你好 😀"):
        assert said(ask(client, f"say {text}", stream)) == text


# Models


def test_the_model_is_listed_and_found_by_its_name(
    client: OpenAI, scripted_server: Served, scripted: ScriptedChat
) -> None:
    (listed,) = client.models.list()
    assert (listed.id, listed.object, listed.owned_by) == ("scripted", "model", "parley")
    assert listed.created == scripted_server.app.state.started
    assert client.models.retrieve("scripted") == listed


def test_a_model_of_the_hub_is_found_by_its_name_with_a_slash(client: OpenAI, scripted: ScriptedChat) -> None:
    scripted.model_name = "org/name-1.0"
    assert client.models.retrieve("org/name-1.0").id == "org/name-1.0"
    assert ask(client, "say yes", model="org/name-1.0").model == "org/name-1.0"


# A real model


class Gate:
    """Lets an engine take so many steps, and then none until it is opened; `at` is set when it stands there."""

    def __init__(self, steps: int | None = None) -> None:
        self.steps = 0
        self.at = threading.Event()
        self._last = steps
        self._opened = threading.Event()

    def pass_by(self, seconds: float) -> None:
        self.steps += 1
        if self.steps == self._last:
            self.at.set()
            self._opened.wait()

    def open(self) -> None:
        self._opened.set()
        self.at.set()

    @asynccontextmanager
    async def opens_tiny(self, app: Starlette) -> AsyncIterator[Chat]:
        """What `create_app` takes to run on the tiny Llama, which reads sixteen tokens of a prompt in a step."""
        async with Chat.running(tiny_tokenizer(), tiny_llama(), app.state.settings, self.pass_by) as chat:
            chat._engine.prefill_chunk = 1
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


GREEDY = {"model": Settings().model_name, "temperature": 0, "max_tokens": 12}
RANDOM = GREEDY | {"temperature": 1.2, "max_tokens": 30}


@streamed_or_not
def test_a_seed_gives_the_same_reply(settings: Settings, stream: bool) -> None:
    with tiny(settings) as (_, client):
        first = said(ask(client, "Hello", **RANDOM, seed=5))
        assert said(ask(client, "Hello", stream, **RANDOM, seed=5)) == first
        assert said(ask(client, "Hello", stream, **RANDOM, seed=6)) != first


def test_usage_is_the_same_streamed_and_not(settings: Settings) -> None:
    with tiny(settings) as (_, client):
        at_once = ask(client, "Hello", **RANDOM, seed=5)
        streamed = ask(client, "Hello", True, **RANDOM, seed=5, stream_options={"include_usage": True})
        assert usage(at_once) == usage(streamed)
        prompt, completion, total = usage(at_once)
        assert (prompt, prompt + completion) == (len("|user\nHello|\n|assistant\n"), total)
        assert streamed[-1].usage.prompt_tokens_details.cached_tokens == prompt - 1


@streamed_or_not
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_reply_that_is_as_long_as_it_may_be_ends_for_its_length(settings: Settings, name: str, stream: bool) -> None:
    more: Json = {"stream_options": {"include_usage": True}} if stream else {}
    with tiny(settings) as (_, client):
        answer = ask(client, "Hello", stream, model=GREEDY["model"], temperature=0, **{name: 3}, **more)
        assert (finish(answer), usage(answer)[1]) == ("length", 3)


def test_a_reply_that_fills_the_context_ends_for_its_length(settings: Settings) -> None:
    with tiny(settings, context=64) as (_, client):
        answer = ask(client, "Hello", model=GREEDY["model"], temperature=0)
        assert (finish(answer), usage(answer)[2]) == ("length", 64)


@streamed_or_not
def test_a_stop_string_ends_a_reply_and_is_not_said(settings: Settings, stream: bool) -> None:
    with tiny(settings) as (_, client):
        whole = said(ask(client, "Hello", **GREEDY))
        stop = whole[4:6]
        answer = ask(client, "Hello", stream, **GREEDY, stop=stop)
        assert (said(answer), finish(answer)) == (whole.partition(stop)[0], "stop")


@streamed_or_not
def test_a_prompt_that_outgrows_the_context_is_refused(settings: Settings, stream: bool) -> None:
    messages = [user("x" * 60)] * 5  # no single one of which is too long
    with tiny(settings) as (_, client):
        with pytest.raises(openai.BadRequestError) as raised:
            ask(client, "", stream, **GREEDY | {"messages": messages})
        assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")
        assert "256" in raised.value.message
        assert said(ask(client, "Hello", stream, **GREEDY))


@streamed_or_not
def test_messages_that_the_models_template_refuses_are_refused(settings: Settings, stream: bool) -> None:
    with tiny(settings) as (_, client):
        with pytest.raises(openai.BadRequestError, match="it cannot begin") as raised:
            ask(client, "", stream, **GREEDY | {"messages": [{"role": "assistant", "content": "Hi"}]})
        assert (raised.value.code, raised.value.param) == ("invalid_value", "messages")


# Errors


def shape(error: openai.APIStatusError) -> Json:
    """The error as it was sent, which has the four fields of OpenAI's and no other."""
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
            error = shape(raised.value)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_credentials")
            assert raised.value.response.headers["www-authenticate"] == "Bearer"


def test_too_many_wrong_keys_are_a_rate_limit_error(scripted_server: Served) -> None:
    with client_of(scripted_server, "wrong") as client:
        for _ in range(10):
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with pytest.raises(openai.RateLimitError) as raised:
            client.models.list()
    assert shape(raised.value)["code"] == "too_many_failures"
    assert raised.value.response.headers["retry-after"] == "60"


def test_the_cookie_of_the_page_is_as_good_as_a_key_from_our_own_page_only(scripted_server: Served) -> None:
    body = {"model": "scripted", "messages": [user("say yes")]}
    with httpx2.Client(base_url=scripted_server.url) as browser:
        assert browser.post("/v1/chat/completions", json=body).status_code == 401
        browser.post("/login", data={"secret": ANN})
        assert browser.get("/v1/models").status_code == 200
        own = browser.post("/v1/chat/completions", json=body, headers={"Origin": scripted_server.url})
        assert own.json()["choices"][0]["message"]["content"] == "yes"
        for headers in ({"Origin": "https://evil.example"}, {}):
            other = browser.post("/v1/chat/completions", json=body, headers=headers)
            assert (other.status_code, other.json()["error"]["code"]) == (403, "origin_not_allowed")


@streamed_or_not
def test_another_model_is_not_found(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        ask(client, "say yes", stream, model="gpt-5")
    error = shape(raised.value)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "scripted" in error["message"]


def test_another_model_is_not_found_by_its_name(client: OpenAI) -> None:
    for name in ("gpt-5", "org/name"):
        with pytest.raises(openai.NotFoundError) as raised:
            client.models.retrieve(name)
        assert shape(raised.value)["code"] == "model_not_found"


def test_what_else_openai_has_is_not_found(client: OpenAI) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: client.embeddings.create(model="scripted", input="Hi"),
        lambda: client.responses.create(model="scripted", input="Hi"),
        lambda: client.completions.create(model="scripted", prompt="Hi"),
    ]
    for do in calls:
        with pytest.raises(openai.NotFoundError) as raised:
            do()
        assert shape(raised.value)["type"] == "invalid_request_error"


def test_completions_that_were_are_not_listed(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.list()
    assert (raised.value.status_code, shape(raised.value)["type"]) == (405, "invalid_request_error")
    assert raised.value.response.headers["allow"] == "POST"


@streamed_or_not
def test_what_is_not_supported_is_a_bad_request_that_names_it(
    client: OpenAI, scripted: ScriptedChat, stream: bool
) -> None:
    unsupported: Json = {
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        "tool_choice": "required",
        "logprobs": True,
        "top_logprobs": 2,
        "n": 2,
        "response_format": {"type": "json_object"},
        "logit_bias": {"1": 5},
        "reasoning_effort": "low",
    }
    for name, value in unsupported.items():
        with pytest.raises(openai.BadRequestError, match=name) as raised:
            ask(client, "say yes", stream, **{name: value})
        error = shape(raised.value)
        assert (error["code"], error["param"], error["type"]) == (
            "unsupported_parameter",
            name,
            "invalid_request_error",
        )
    assert not scripted.heard


@streamed_or_not
def test_what_is_not_known_is_a_bad_request_that_names_it(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, "say yes", stream, extra_body={"frobnicate": 1})
    error = shape(raised.value)
    assert (error["code"], error["param"]) == ("unknown_parameter", "frobnicate")


def test_a_bad_value_is_a_bad_request_that_names_it(client: OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    bad: list[tuple[str, Json]] = [
        ("temperature", {"temperature": 3}),
        ("top_p", {"top_p": 0}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("stop", {"stop": ""}),
        ("seed", {"seed": -1}),
        ("user", {"extra_body": {"user": 5}}),
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"role": "tool", "content": "Hi", "tool_call_id": "x"}]}),
        ("messages[1].content[0]", {"messages": [user("Hi"), {"role": "user", "content": [image]}]}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
    ]
    for param, options in bad:
        with pytest.raises(openai.BadRequestError) as raised:
            ask(client, "say yes", **options)
        assert shape(raised.value)["param"] == param


def test_a_body_that_is_no_json_object_is_a_bad_request(client: OpenAI) -> None:
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        with pytest.raises(openai.BadRequestError) as raised:
            client.post("/chat/completions", content=body, cast_to=httpx2.Response)
        assert shape(raised.value)["code"] == "invalid_json"


@pytest.mark.parametrize("length", [FRAME_BYTES, 4 * FRAME_BYTES])
def test_a_body_over_the_limit_is_refused_as_too_large(client: OpenAI, scripted: ScriptedChat, length: int) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        ask(client, "x" * length)
    assert (raised.value.status_code, shape(raised.value)["code"]) == (413, "body_too_large")
    assert said(ask(client, "say still here")) == "still here"
    assert len(scripted.heard) == 1


def test_a_body_of_just_the_limit_is_taken(client: OpenAI, scripted: ScriptedChat) -> None:
    body = json.dumps({"model": "scripted", "messages": [user("say yes")]}).encode()
    answer = client.post("/chat/completions", content=body.ljust(FRAME_BYTES), cast_to=httpx2.Response)
    assert answer.json()["choices"][0]["message"]["content"] == "yes"


@streamed_or_not
def test_too_many_replies_at_once_are_a_rate_limit_error(client: OpenAI, scripted: ScriptedChat, stream: bool) -> None:
    scripted.admission.per_user = 1
    with waiting(client):
        with pytest.raises(openai.RateLimitError) as raised:
            ask(client, "say yes", stream)
    error = shape(raised.value)
    assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_responses")
    assert raised.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize("limit", [{"rate": "2/hour"}, {"token_rate": "4/day"}], ids=["requests", "tokens"])
@streamed_or_not
def test_who_has_had_what_the_settings_allow_is_refused_with_a_time_to_come_back(
    settings: Settings, limit: Json, stream: bool
) -> None:
    with tiny(settings, **limit) as (served, client):
        ask(client, "Hello", stream, **GREEDY)
        if "rate" in limit:
            ask(client, "Hello", stream, **GREEDY)
        with pytest.raises(openai.RateLimitError) as raised:
            ask(client, "Hello", stream, **GREEDY)
        error = shape(raised.value)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert 1 <= int(raised.value.response.headers["retry-after"]) <= 86_400
        with client_of(served, BOB) as other:
            assert said(ask(other, "Hello", stream, **GREEDY))


@streamed_or_not
def test_a_full_queue_is_a_server_error_with_a_time_to_come_back(
    client: OpenAI, scripted: ScriptedChat, stream: bool
) -> None:
    scripted.admission = Admission(slots=1, queue=0, per_user=9)
    with waiting(client):
        with pytest.raises(openai.InternalServerError) as raised:
            ask(client, "say yes", stream)
    assert (raised.value.status_code, shape(raised.value)["code"]) == (503, "queue_full")
    assert raised.value.response.headers["retry-after"] == "5"


async def called(do: Callable[[], Any]) -> Any:
    return do()


@streamed_or_not
def test_a_server_that_stops_refuses_with_a_time_to_come_back(
    client: OpenAI, scripted_server: Served, stream: bool
) -> None:
    call(scripted_server, called(scripted_server.app.state.chat.admission.close))
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client, "say yes", stream)
    assert (raised.value.status_code, shape(raised.value)["code"]) == (503, "server_shutdown")
    assert raised.value.response.headers["retry-after"] == "5"


def test_a_reply_that_breaks_is_a_server_error(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client, "break here")
    error = shape(raised.value)
    assert (raised.value.status_code, error["type"], error["code"]) == (500, "server_error", "server_error")
    assert "script" not in error["message"], "what went wrong is for the log"


def test_a_reply_that_breaks_in_its_stream_is_an_error_after_what_was_said(client: OpenAI) -> None:
    chunks: list[ChatCompletionChunk] = []
    with client.chat.completions.create(model="scripted", messages=[user("break here")], stream=True) as stream:
        with pytest.raises(openai.APIError) as raised:
            chunks.extend(stream)  # a list keeps what came before the error
    assert said(chunks) == "here"
    assert not isinstance(raised.value, openai.APIStatusError)
    assert (raised.value.code, raised.value.type) == ("server_error", "server_error")


def test_a_server_that_stops_in_a_stream_says_so(client: OpenAI, scripted_server: Served) -> None:
    with waiting(client) as stream:
        call(scripted_server, scripted_server.app.state.responses.drain(0))
        with pytest.raises(openai.APIError, match="stopping") as raised:
            next(stream)
    assert raised.value.code == "server_shutdown"


@streamed_or_not
def test_the_package_tries_again_when_it_is_told_to_and_is_answered(
    scripted_server: Served, scripted: ScriptedChat, stream: bool
) -> None:
    scripted.admission = admission = Admission(slots=9, queue=0, per_user=1)
    refused: list[str] = []

    def end_the_other(answer: httpx2.Response) -> None:
        if answer.status_code == 429:
            refused.append(answer.headers["retry-after"])
            scripted_server.in_loop(scripted.release)
            call(scripted_server, condition(lambda: not admission.in_flight))

    with httpx2.Client(event_hooks={"response": [end_the_other]}) as http:
        client = client_of(scripted_server, max_retries=1, http_client=http)
        with waiting(client):
            assert said(ask(client, "say at last", stream)) == "at last"
    assert refused == ["1"]


# Hanging up


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


async def within(served: Served, coroutine: Any) -> Any:
    """Wait for a coroutine in the server's loop."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, served.loop))


async def hung_up(served: Served, stream: bool, when: Awaitable[object], **request: Any) -> None:
    """Ask with the package, hang up at some time, and wait until the server has no task left of it."""
    tasks = await within(served, all_tasks())
    url = f"{served.url}/v1"

    async def asking() -> None:
        async with AsyncOpenAI(base_url=url, api_key=ANN, max_retries=0) as client:
            answer = await client.chat.completions.create(stream=stream, **request)
            async for _ in answer:
                pass
        raise AssertionError("nobody hung up")

    task = asyncio.create_task(asking())
    await asyncio.wait([task, asyncio.ensure_future(when)], return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await within(served, settled(tasks))


@streamed_or_not
async def test_who_hangs_up_in_the_queue_leaves_it(
    settings: Settings, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    with tiny(settings, slots=1) as (served, client):
        admission = served.app.state.chat.admission
        ticket = await within(served, called(lambda: admission.enter("bob")))  # has the only slot
        waits = within(served, condition(lambda: admission.waiting))
        await hung_up(served, stream, waits, messages=[user("Hello")], **GREEDY)
        assert (admission.waiting, dict(admission.in_flight)) == ([], {"bob": 1})
        await within(served, called(lambda: admission.leave(ticket)))
        assert admission.free == 1
        assert said(await asyncio.to_thread(ask, client, "Hello", **GREEDY))
    assert not tracebacks(caplog)


@streamed_or_not
@pytest.mark.parametrize(("length", "steps"), [(200, 1), (200, 7), (5, 3), (5, 8)])
async def test_who_hangs_up_while_a_prompt_is_read_or_answered_has_no_slot_in_the_next_step(
    settings: Settings, caplog: pytest.LogCaptureFixture, length: int, steps: int, stream: bool
) -> None:
    gate = Gate(steps)
    with tiny(settings, gate) as (served, client):
        chat = served.app.state.chat
        at = asyncio.to_thread(gate.at.wait)
        await hung_up(served, stream, at, messages=[user("x" * length)], model=GREEDY["model"], temperature=0)
        assert (chat.admission.free, dict(chat.admission.in_flight)) == (settings.slots, {})
        gate.open()
        await within(served, condition(lambda: chat.free_slots == settings.slots))
        assert gate.steps == steps
        assert said(await asyncio.to_thread(ask, client, "Hello", **GREEDY))
    assert not tracebacks(caplog)


@streamed_or_not
@pytest.mark.parametrize("said_first", ["wait hello", "wait ", "hold on"])
async def test_who_hangs_up_ends_the_reply(
    scripted_server: Served, scripted: ScriptedChat, caplog: pytest.LogCaptureFixture, said_first: str, stream: bool
) -> None:
    def begun() -> object:
        return scripted.heard and all(live.announced for live in scripted_server.app.state.responses._live.values())

    running = within(scripted_server, condition(begun))
    await hung_up(scripted_server, stream, running, model="scripted", messages=[user(said_first)])
    assert (scripted.running, dict(scripted.admission.in_flight)) == (0, {})
    assert "status=cancelled reason=client_disconnected" in caplog.text
    assert not tracebacks(caplog)


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_who_closes_a_stream_after_some_chunks_ends_the_reply(
    scripted_server: Served, scripted: ScriptedChat, taken: int
) -> None:
    tasks = call(scripted_server, all_tasks())
    with client_of(scripted_server) as client:
        create = client.chat.completions.create
        with create(model="scripted", messages=[user("wait some more")], stream=True) as stream:
            for _ in range(taken):
                next(stream)
        call(scripted_server, settled(tasks))
        assert (scripted.running, dict(scripted.admission.in_flight)) == (0, {})
        assert said(ask(client, "say still here")) == "still here"


def test_who_hangs_up_disturbs_nobody_else(scripted_server: Served, scripted: ScriptedChat) -> None:
    with client_of(scripted_server) as ann, client_of(scripted_server, BOB) as bob:
        with waiting(bob) as others, chat_v1(scripted_server) as connection:
            connection.send('{"type": "response.create", "response": {"input": "wait here"}}')
            until(connection, "response.output_text.delta")
            with waiting(ann):
                assert scripted.running == 3
            call(scripted_server, condition(lambda: scripted.running == 2))
            scripted_server.in_loop(scripted.release)
            assert finish(list(others)) == "stop"
            assert until(connection, "response.done")[-1]["response"]["status"] == "completed"


def request_of(stream: bool, content: str) -> bytes:
    """A request as it goes over the wire."""
    body = json.dumps({"model": "scripted", "messages": [user(content)], "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: parley\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {ANN}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@streamed_or_not
@pytest.mark.parametrize("content", ["wait here", "say yes", "hold on", "queue up", "break it"])
def test_who_hangs_up_before_the_first_chunk_leaves_nothing(
    settings: Settings, scripted: ScriptedChat, content: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(create_app(settings, scripted.opened))
    with serve(watched) as served:  # type: ignore[arg-type]
        tasks = call(served, all_tasks())
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.sendall(request_of(stream, content))
            assert watched.ended.get() == "/v1/chat/completions"
        call(served, settled(tasks))
        assert (scripted.running, dict(scripted.admission.in_flight)) == (0, {})
    assert all("the script says so" in str(record.exc_info) for record in tracebacks(caplog))


async def asked_of(app: Starlette, request: bytes, afterwards: Callable[[], Awaitable[Json]]) -> bytes:
    """What a started app answers to a request, while a web server says this after it."""
    head, _, body = request.partition(b"\r\n\r\n")
    lines = [line.partition(b": ") for line in head.split(b"\r\n")[1:]]
    headers = [(name.lower(), value) for name, _, value in lines]
    coming = [{"type": "http.request", "body": body, "more_body": False}]
    answer = bytearray()

    async def receive() -> Json:
        return coming.pop() if coming else await afterwards()

    async def send(message: Json) -> None:
        answer.extend(message.get("body", b""))

    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "app": app}
    await app(scope, receive, send)  # type: ignore[arg-type]
    return bytes(answer)


async def gone() -> Json:
    return {"type": "http.disconnect"}


async def never() -> Json:
    await asyncio.Event().wait()
    raise AssertionError


@streamed_or_not
async def test_who_was_gone_when_the_request_was_read_is_not_waited_for(
    settings: Settings, scripted: ScriptedChat, stream: bool
) -> None:
    app = create_app(settings, scripted.opened)
    async with app.router.lifespan_context(app):
        tasks = asyncio.all_tasks()
        await asked_of(app, request_of(stream, "wait here"), gone)
        await settled(tasks)
        assert (len(scripted.heard), scripted.running, dict(scripted.admission.in_flight)) == (1, 0, {})


@streamed_or_not
async def test_nothing_listens_to_the_client_after_the_answer(
    settings: Settings, scripted: ScriptedChat, stream: bool
) -> None:
    app = create_app(settings, scripted.opened)
    async with app.router.lifespan_context(app):
        tasks = asyncio.all_tasks()
        assert b"yes" in await asked_of(app, request_of(stream, "say yes"), never)
        await settled(tasks)


@pytest.mark.parametrize("left", [1, 30])
def test_who_hangs_up_in_the_middle_of_a_request_leaves_nothing(
    settings: Settings, scripted: ScriptedChat, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(create_app(settings, scripted.opened))
    with serve(watched) as served:  # type: ignore[arg-type]
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(request_of(False, "say yes")[:-left])
        watched.ended.get()
    assert not scripted.heard
    assert not tracebacks(caplog), "that a client goes is no bug of ours"


def test_a_client_that_stays_and_does_not_read_holds_no_slot(scripted_server: Served, scripted: ScriptedChat) -> None:
    content = "say " + "x" * 400_000
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", scripted_server.port))
        slow.sendall(request_of(True, content))
        call(scripted_server, condition(lambda: scripted.heard and not scripted.running))
        call(scripted_server, condition(lambda: not scripted.admission.in_flight))
