"""The replies of upstreams, also of those that fail."""

from __future__ import annotations

import asyncio
import gzip
from contextlib import suppress
from itertools import count
from typing import Any

import pytest

from models.errors import (
    APIError,
    ContextLengthExceededError,
    UpstreamBusyError,
    UpstreamFailedError,
    UpstreamRefusedError,
    UpstreamUnavailableError,
)
from models.language.events import ArgumentsDelta, Done, Event, ReasoningDelta, TextDelta, ToolCallStarted
from models.messages import Message
from models.output_item import TokenLogprob
from models.upstream.endpoint import Endpoint, new_client
from tests.support.fake_upstream import Answer, Exchange, FakeUpstream, Json, chunk, endless
from tests.support.upstreams import chat_over, reply_of, request_of, user

pytestmark = pytest.mark.anyio

HELLO = [TextDelta("Hel"), TextDelta("lo"), Done("stop")]


def streaming(*chunks: Any, reason: str | None = "stop") -> Answer:
    """An answer with some chunks."""

    async def answer(exchange: Exchange) -> None:
        await exchange.begin()
        for one in chunks:
            await exchange.send_event(one)
        if reason:
            await exchange.finish(reason)
        else:
            await exchange.send_raw(b"0\r\n\r\n")

    return answer


def status(code: int, value: Any = None, **headers: str) -> Answer:
    """An answer with an HTTP status."""

    async def answer(exchange: Exchange) -> None:
        await exchange.send_json({"error": {"message": "no"}} if value is None else value, code, **headers)

    return answer


async def html(exchange: Exchange) -> None:
    await exchange.send_body(b"<html>Bad gateway</html>", "text/html")


async def html_error(exchange: Exchange) -> None:
    await exchange.send_body(b"<html>Bad gateway</html>", "text/html", 502)


async def vanish(exchange: Exchange) -> None:
    exchange.vanish()


async def half_a_chunk(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.send_raw(b'40\r\ndata: {"choices": [{"del')
    exchange.vanish()


async def half_a_reply(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.say("Hel")
    exchange.vanish()


# What a reply says


async def test_text_comes_in_the_pieces_of_the_upstream(upstream: FakeUpstream) -> None:
    async with chat_over(upstream) as chat:
        reply = await chat.prepare(request_of(chat))
        assert [event async for event in reply.events()] == HELLO
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (7, 2)
    assert upstream.asked[0].body["messages"] == user("Hi")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_reasoning_is_apart_from_the_text(upstream: FakeUpstream, name: str) -> None:
    upstream.will(streaming(chunk({name: "Hm"}), chunk({"content": "Yes"})))
    async with chat_over(upstream) as chat:
        reply = await chat.prepare(request_of(chat))
        assert [event async for event in reply.events()] == [ReasoningDelta("Hm"), TextDelta("Yes"), Done("stop")]
    assert (reply.usage.output_tokens, reply.usage.reasoning_tokens) == (2, 1)


def call(index: int | None, name: str | None, arguments: str | None, id: str | None = "call_1") -> Json:
    function = {"name": name, "arguments": arguments}
    return chunk({"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]})


async def test_calls_of_tools_come_one_after_the_other(upstream: FakeUpstream) -> None:
    pieces = call(0, "f", ""), call(0, None, '{"a"'), call(0, None, ": 1}"), call(1, "g", "{}")
    upstream.will(streaming(*pieces, reason="tool_calls"))
    async with chat_over(upstream) as chat:
        assert await reply_of(chat) == [
            ToolCallStarted("f"),
            ArgumentsDelta('{"a"'),
            ArgumentsDelta(": 1}"),
            ToolCallStarted("g"),
            ArgumentsDelta("{}"),
            Done("stop"),
        ]


@pytest.mark.parametrize("index", [None, 0])
async def test_calls_without_an_index_of_their_own_are_told_by_their_ids(
    upstream: FakeUpstream, index: int | None
) -> None:
    pieces = call(index, "f", "{", "call_1"), call(index, "f", "}", "call_1"), call(index, "g", "{}", "call_2")
    upstream.will(streaming(*pieces, reason="tool_calls"))
    async with chat_over(upstream) as chat:
        assert await reply_of(chat) == [
            ToolCallStarted("f"),
            ArgumentsDelta("{"),
            ArgumentsDelta("}"),
            ToolCallStarted("g"),
            ArgumentsDelta("{}"),
            Done("stop"),
        ]


async def test_an_upstream_that_mixes_the_pieces_of_calls_fails(upstream: FakeUpstream) -> None:
    upstream.will(streaming(call(0, "f", "{}"), call(1, "g", "{"), call(0, None, "}")))
    async with chat_over(upstream) as chat:
        with pytest.raises(UpstreamFailedError):
            await reply_of(chat)


@pytest.mark.parametrize(
    ("reason", "allowed", "told"),
    [
        ("stop", None, "stop"),
        ("tool_calls", None, "stop"),
        ("length", 2, "max_output_tokens"),
        ("length", 9, "context_length"),
        ("length", None, "context_length"),
        ("content_filter", None, "content_filter"),
    ],
)
async def test_a_reply_tells_why_it_has_ended(
    upstream: FakeUpstream, reason: str, allowed: int | None, told: Any
) -> None:
    upstream.will(streaming(chunk({"content": "a"}), chunk({"content": "b"}), reason=reason))
    async with chat_over(upstream) as chat:
        assert (await reply_of(chat, max_output_tokens=allowed))[-1] == Done(told)


async def test_tokens_have_their_probabilities(upstream: FakeUpstream) -> None:
    top = [{"token": "a", "logprob": -0.5, "bytes": [97]}, {"token": "b", "logprob": -1e30}]
    told = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": top}]}
    upstream.will(streaming(chunk({"content": "a"}, logprobs=told)))
    async with chat_over(upstream) as chat:
        first = (await reply_of(chat, top_logprobs=2))[0]
    assert first == TextDelta("a", [TokenLogprob(b"a", -0.5, [(b"a", -0.5), (b"b", -9999.0)])])
    assert (upstream.asked[0].body["logprobs"], upstream.asked[0].body["top_logprobs"]) == (True, 2)


async def test_a_prompt_goes_to_completions(upstream: FakeUpstream) -> None:
    told = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]}
    upstream.will(streaming({"choices": [{"index": 0, "text": "a", "logprobs": told}]}))
    async with chat_over(upstream) as chat:
        events = await reply_of(chat, [], prompt="Once", top_logprobs=1)
    assert events == [TextDelta("a", [TokenLogprob(b"a", -0.5, [(b"a", -0.5)])]), Done("stop")]
    (asked,) = upstream.asked
    assert (asked.path, asked.body["prompt"], asked.body["logprobs"]) == ("/v1/completions", "Once", 1)


async def test_a_reply_without_counts_has_those_that_are_likely() -> None:
    async with FakeUpstream.running(owner="unknown") as upstream, chat_over(upstream) as chat:
        upstream.will(half_a_reply)
        reply = await chat.prepare(request_of(chat, user("a" * 300)))
        with pytest.raises(UpstreamFailedError):
            _ = [event async for event in reply.events()]
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (100, 1)


async def test_a_prompt_that_an_upstream_reads_counts_before_the_first_piece(upstream: FakeUpstream) -> None:
    async def wait(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.ended.wait()

    upstream.will(wait, status(500))
    async with chat_over(upstream) as chat:
        reply = await chat.prepare(request_of(chat, user("a" * 300)))
        waiting = asyncio.create_task(anext(reply.events()))
        await upstream.next()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert reply.usage.input_tokens == 100
        failing = await chat.prepare(request_of(chat, user("a" * 300)))
        with pytest.raises(UpstreamFailedError):
            await anext(failing.events())
    assert failing.usage.input_tokens == 0


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 5}, (9, 0, 5, 0)),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 8},
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
            (9, 8, 5, 3),
        ),
        ({"prompt_tokens": -5, "completion_tokens": 10**400}, (0, 0, 2**31 - 1, 0)),
        (
            {"prompt_tokens": 9, "completion_tokens": None, "prompt_tokens_details": {"cached_tokens": None}},
            (9, 0, 1, 0),
        ),
    ],
)
async def test_the_counts_of_the_upstream_are_taken_over(
    upstream: FakeUpstream, usage: Json, counts: tuple[int, ...]
) -> None:
    upstream.will(streaming(chunk({"content": "a"}) | {"usage": usage}))
    async with chat_over(upstream) as chat:
        reply = await chat.prepare(request_of(chat))
        assert [event async for event in reply.events()][-1] == Done("stop")
    told = reply.usage
    assert (told.input_tokens, told.cached_tokens, told.output_tokens, told.reasoning_tokens) == counts


async def test_the_counts_of_llama_cpp_are_taken_over() -> None:
    async with FakeUpstream.running(owner="llamacpp") as upstream:
        upstream.will(streaming(chunk({"content": "a"}) | {"timings": {"cache_n": 3, "prompt_n": 4, "predicted_n": 6}}))
        async with chat_over(upstream) as chat:
            reply = await chat.prepare(request_of(chat))
            assert [event async for event in reply.events()][-1] == Done("stop")
    assert (reply.usage.input_tokens, reply.usage.cached_tokens, reply.usage.output_tokens) == (7, 3, 6)


# What servers do differently


@pytest.mark.parametrize(
    "event",
    [": ping", "retry: 3000", "event: ping", "data:", 'data: {"choices": null}', 'data: {"error": false}'],
)
async def test_events_that_say_nothing_are_no_pieces(upstream: FakeUpstream, event: str) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.say("Hel")
        await exchange.send_raw(f"{len(event) + 2:x}\r\n{event}\n\n\r\n".encode())
        await exchange.say("lo")
        await exchange.finish()

    upstream.will(answer)
    async with chat_over(upstream) as chat:
        assert await reply_of(chat) == HELLO


async def test_a_reply_ends_although_its_stream_does_not(upstream: FakeUpstream) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.say("Hel", "lo")
        await exchange.send_event(chunk({}, "stop"))
        await exchange.ended.wait()

    upstream.will(answer)
    async with chat_over(upstream) as chat:
        assert await reply_of(chat) == HELLO


@pytest.mark.parametrize("last", [None, "nonsense", {"error": {"message": "late"}}])
async def test_what_breaks_after_the_end_of_a_reply_does_no_harm(upstream: FakeUpstream, last: Any) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.say("Hel", "lo")
        await exchange.send_event(chunk({}, "stop"))
        if last:
            await exchange.send_event(last)
        exchange.vanish()

    upstream.will(answer)
    async with chat_over(upstream) as chat:
        assert await reply_of(chat) == HELLO


async def test_only_the_first_of_several_choices_is_read(upstream: FakeUpstream) -> None:
    both = [{"index": index, "delta": {"content": text}} for index, text in enumerate(("a", "b"))]
    upstream.will(streaming({"choices": both}))
    async with chat_over(upstream) as chat:
        assert await reply_of(chat) == [TextDelta("a"), Done("stop")]


@pytest.mark.parametrize("charset", ["", "; charset=iso-8859-1", "; charset=base64"])
async def test_streams_are_utf_8_whatever_they_say(upstream: FakeUpstream, charset: str) -> None:
    body = b'\xef\xbb\xbfdata: {"choices": [{"delta": {"content": "gr\xc3\xbcn"}, "finish_reason": "stop"}]}\n\n'

    async def answer(exchange: Exchange) -> None:
        await exchange.send_body(body, f"text/event-stream{charset}")

    upstream.will(answer)
    async with chat_over(upstream) as chat:
        assert await reply_of(chat) == [TextDelta("grün"), Done("stop")]


async def test_white_space_between_the_pieces_of_a_call_is_left_out(upstream: FakeUpstream) -> None:
    upstream.will(streaming(call(0, "f", "{"), chunk({"content": "\n"}), call(0, None, "}"), reason="tool_calls"))
    async with chat_over(upstream) as chat:
        assert await reply_of(chat) == [
            ToolCallStarted("f"),
            ArgumentsDelta("{"),
            ArgumentsDelta("}"),
            Done("stop"),
        ]


@pytest.mark.parametrize(
    "pieces", [[call(0, "f", "{"), chunk({"content": "a"}), call(0, None, "}")], [call(-1, None, "}")]]
)
async def test_pieces_of_a_call_that_has_not_begun_or_has_ended_are_a_failure(
    upstream: FakeUpstream, pieces: list[Json]
) -> None:
    upstream.will(streaming(*pieces))
    async with chat_over(upstream) as chat:
        with pytest.raises(UpstreamFailedError):
            await reply_of(chat)


async def test_a_reply_without_an_end_fails_at_a_limit(upstream: FakeUpstream) -> None:
    async def flood(exchange: Exchange) -> None:
        await exchange.begin()
        with suppress(ConnectionError):
            while True:
                await exchange.say("a" * 500_000)

    upstream.will(flood)
    async with chat_over(upstream) as chat:
        events = (await chat.prepare(request_of(chat))).events()
        for _ in range(8):
            assert await anext(events) == TextDelta("a" * 500_000)
        with pytest.raises(UpstreamFailedError):
            await anext(events)


async def test_no_compressed_stream_is_read(upstream: FakeUpstream) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.send_body(gzip.compress(b"data: {}\n\n" * 1000), "text/event-stream", content_encoding="gzip")

    upstream.will(answer)
    async with chat_over(upstream) as chat:
        with pytest.raises(UpstreamFailedError):
            await reply_of(chat)
    assert upstream.asked[0].headers["accept-encoding"] == "identity"


async def test_cookies_of_an_upstream_are_not_kept(upstream: FakeUpstream) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.send_body(b"", "text/event-stream", set_cookie="user=ann; Path=/")

    upstream.will(answer)
    async with chat_over(upstream) as chat:
        with pytest.raises(UpstreamFailedError):
            await reply_of(chat)
        await reply_of(chat)
    assert "cookie" not in upstream.asked[1].headers


# Failures

BEFORE = {
    "500": status(500),
    "404": status(404),
    "401": status(401),
    "302": status(302),
    "429": status(429),
    "503": status(503),
    "HTML": html,
    "HTML and 502": html_error,
    "JSON in place of a stream": status(200, {"choices": []}),
    "half a chunk": half_a_chunk,
    "no chunk": streaming("nonsense"),
    "an error in the stream": streaming({"error": {"message": "dead", "code": 500}}),
    "an error in words": streaming({"error": "dead"}),
    "an empty stream": streaming(reason=None),
    "an abort": streaming(reason="abort"),
}


@pytest.mark.parametrize("failure", BEFORE.values(), ids=BEFORE)
async def test_another_upstream_takes_over_before_the_first_piece(
    upstream: FakeUpstream, other: FakeUpstream, failure: Answer
) -> None:
    upstream.will(failure)
    other.will(failure)
    async with chat_over(upstream, other) as chat:
        with pytest.raises(APIError):
            await reply_of(chat)
        assert (len(upstream.asked), len(other.asked)) == (1, 1)
        upstream.will(failure)
        events: list[Event] = []
        while len(upstream.asked) < 2:
            events = await reply_of(chat, user(f"Hi {len(other.asked)}"))
        assert events == HELLO


@pytest.mark.parametrize("failure", BEFORE.values(), ids=BEFORE)
async def test_a_single_upstream_that_fails_is_asked_again_next_time(upstream: FakeUpstream, failure: Answer) -> None:
    upstream.will(failure)
    async with chat_over(upstream) as chat:
        with pytest.raises((UpstreamFailedError, UpstreamBusyError)):
            await reply_of(chat)
        assert await reply_of(chat) == HELLO
    await upstream.wait_unused()


async def test_a_request_whose_connection_was_just_closed_is_sent_again_once(upstream: FakeUpstream) -> None:
    upstream.will(vanish)
    async with chat_over(upstream) as chat:
        assert await reply_of(chat) == HELLO
        upstream.will(vanish, vanish)
        with pytest.raises(UpstreamFailedError):
            await reply_of(chat)
    assert len(upstream.asked) == 4


async def test_a_request_that_has_run_for_a_while_is_not_sent_again(upstream: FakeUpstream) -> None:
    upstream.will(vanish)
    seconds = count()
    async with new_client(None) as client:
        endpoint = Endpoint(upstream.url, client, clock=lambda: float(next(seconds)))
        with pytest.raises(UpstreamFailedError):
            async with endpoint.stream("/chat/completions", {}):
                pass
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("code", [401, 403])
async def test_a_key_that_an_upstream_repeats_is_told_to_nobody(
    upstream: FakeUpstream, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    told = {"error": {"message": "wrong key: the-key"}}
    upstream.will(status(code, told))
    async with chat_over(upstream) as chat:
        with pytest.raises(UpstreamFailedError) as caught:
            await reply_of(chat)
    assert f"status {code}" in caplog.text
    assert "the-key" not in caplog.text + str(caught.value)


async def test_replies_one_after_the_other_share_a_connection(upstream: FakeUpstream) -> None:
    async with chat_over(upstream) as chat:
        for _ in range(3):
            assert await reply_of(chat) == HELLO
    assert len({id(asked.writer) for asked in upstream.asked}) == 1


async def test_a_failure_after_the_first_piece_ends_the_reply(upstream: FakeUpstream, other: FakeUpstream) -> None:
    upstream.will(half_a_reply)
    other.will(half_a_reply)
    async with chat_over(upstream, other) as chat:
        reply = await chat.prepare(request_of(chat))
        events = reply.events()
        assert await anext(events) == TextDelta("Hel")
        with pytest.raises(UpstreamFailedError) as caught:
            await anext(events)
    assert upstream.url not in str(caught.value)
    assert len(upstream.asked) + len(other.asked) == 1


async def test_a_refused_request_is_not_sent_to_others(upstream: FakeUpstream, other: FakeUpstream) -> None:
    refused = status(400, {"error": {"message": "no pictures", "param": "messages", "code": 400}})
    upstream.will(refused)
    other.will(refused)
    async with chat_over(upstream, other) as chat:
        with pytest.raises(UpstreamRefusedError, match="no pictures"):
            await reply_of(chat)
    assert len(upstream.asked) + len(other.asked) == 1


async def test_the_pause_that_an_upstream_asks_for_is_passed_on(upstream: FakeUpstream) -> None:
    upstream.will(status(429, retry_after="17"))
    async with chat_over(upstream) as chat:
        with pytest.raises(UpstreamBusyError) as caught:
            await reply_of(chat)
    assert caught.value.retry_after == 17


async def test_without_an_upstream_that_answers_there_is_no_reply(upstream: FakeUpstream) -> None:
    async with chat_over(upstream) as chat:
        await upstream.stop()
        await chat.look()
        with pytest.raises(UpstreamUnavailableError):
            await chat.prepare(request_of(chat))
        await upstream.start()
        await chat.look()
        assert await reply_of(chat) == HELLO


async def test_a_reply_whose_upstream_hangs_fails(upstream: FakeUpstream) -> None:
    async def hang(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.say("Hel")
        upstream.is_silent = True

    upstream.will(hang)
    async with chat_over(upstream, patience=0.05) as chat:
        replying = asyncio.create_task(reply_of(chat))
        asked = await upstream.next()
        while chat.trouble is None:
            await chat.look()
        with pytest.raises(UpstreamFailedError):
            await replying
        await asked.ended.wait()


async def test_a_reply_that_goes_on_survives_an_upstream_that_takes_no_more(upstream: FakeUpstream) -> None:
    may_end = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.say("Hel")
        await may_end.wait()
        await exchange.say("lo")
        await exchange.finish()

    upstream.will(slow)
    async with chat_over(upstream) as chat:
        replying = asyncio.create_task(reply_of(chat))
        await upstream.next()
        upstream.pages["/v1/models"] = 503
        while not chat.trouble:
            await chat.look()
        may_end.set()
        assert await replying == HELLO


async def test_a_cancelled_reply_closes_its_connection(upstream: FakeUpstream) -> None:
    upstream.will(endless)
    async with chat_over(upstream) as chat:
        replying = asyncio.create_task(reply_of(chat))
        asked = await upstream.next()
        replying.cancel()
        await asked.ended.wait()


async def test_a_cancelled_reply_that_has_not_begun_closes_its_connection(upstream: FakeUpstream) -> None:
    async def wait(exchange: Exchange) -> None:
        await exchange.ended.wait()

    upstream.will(wait)
    async with chat_over(upstream) as chat:
        replying = asyncio.create_task(reply_of(chat))
        asked = await upstream.next()
        replying.cancel()
        await asked.ended.wait()


# The context

TOO_LONG = {
    "error": {
        "message": "This model's maximum context length is 100 tokens. However, your request has 400 input tokens.",
        "code": 400,
    }
}
LONG: list[Message] = [*user("a" * 300), {"role": "assistant", "content": "b"}, *user("c" * 30)]


async def test_a_prompt_that_is_too_long_is_an_error(upstream: FakeUpstream) -> None:
    upstream.will(status(400, TOO_LONG))
    async with chat_over(upstream) as chat:
        with pytest.raises(ContextLengthExceededError) as caught:
            await reply_of(chat, LONG)
    assert caught.value.tokens == 400
    assert len(upstream.asked) == 1


async def test_more_is_left_out_when_the_upstream_finds_the_prompt_too_long() -> None:
    async with FakeUpstream.running(owner="unknown", context=None) as upstream:
        upstream.will(status(400, TOO_LONG))
        async with chat_over(upstream) as chat:
            reply = await chat.prepare(request_of(chat, LONG, truncate=True))
            assert reply.left_out == 0
            assert [event async for event in reply.events()] == HELLO
            assert reply.left_out == 2
    assert [asked.body["messages"] for asked in upstream.asked] == [LONG, LONG[2:]]


async def test_a_prompt_that_stays_too_long_is_an_error() -> None:
    async with FakeUpstream.running(owner="unknown", context=None) as upstream:
        upstream.will(status(400, TOO_LONG), status(400, TOO_LONG))
        async with chat_over(upstream) as chat:
            with pytest.raises(ContextLengthExceededError):
                await reply_of(chat, LONG, truncate=True)
    assert len(upstream.asked) == 2


async def test_more_tokens_than_there_is_room_for_are_as_many_as_there_is_room_for() -> None:
    told = (
        "'max_tokens' is too large: 90. This model's maximum context length is 100 tokens and your request has 14 "
        "input tokens"
    )
    async with FakeUpstream.running(context=100) as upstream:
        upstream.will(status(400, {"error": {"message": told}}))
        async with chat_over(upstream) as chat:
            assert await reply_of(chat, max_output_tokens=90) == HELLO
    assert [asked.body["max_tokens"] for asked in upstream.asked] == [90, 86]


async def test_as_many_tokens_as_the_context_has_need_not_be_asked_for() -> None:
    async with FakeUpstream.running(context=100) as upstream, chat_over(upstream) as chat:
        assert await reply_of(chat, max_output_tokens=100) == HELLO
    assert "max_tokens" not in upstream.asked[0].body


async def test_the_oldest_turns_are_left_out_by_the_count_of_the_upstream() -> None:
    async with FakeUpstream.running(context=120) as upstream, chat_over(upstream) as chat:
        upstream.pages["/tokenize"] = {"count": 110, "max_model_len": 120}
        reply = await chat.prepare(request_of(chat, LONG, truncate=True))
        assert reply.left_out == 2
        upstream.pages["/tokenize"] = {"count": 50, "max_model_len": 120}
        assert (await chat.prepare(request_of(chat, LONG, truncate=True))).left_out == 0


async def test_the_oldest_turns_are_left_out_by_what_earlier_prompts_had() -> None:
    async with FakeUpstream.running(owner="sglang", context=120) as upstream, chat_over(upstream) as chat:
        upstream.will(streaming(chunk({"content": "a"}) | {"usage": {"prompt_tokens": 30, "completion_tokens": 1}}))
        assert (await chat.prepare(request_of(chat, LONG, truncate=True))).left_out == 2
        await reply_of(chat, user("a" * 300))  # ten bytes a token
        assert (await chat.prepare(request_of(chat, LONG, truncate=True))).left_out == 0


@pytest.mark.parametrize("answer", [500, 503, 400])
async def test_a_reply_does_not_need_the_count_of_the_upstream(answer: int) -> None:
    async with FakeUpstream.running(context=120) as upstream, chat_over(upstream) as chat:
        upstream.pages["/tokenize"] = answer
        assert await reply_of(chat, LONG, truncate=True) == HELLO
