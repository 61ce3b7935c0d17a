from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies
from openai.resources.chat.completions import Completions
from openai.types.chat import ChatCompletionMessage

from models.errors import APIError, ModelNotFoundError
from models.messages import MAX_MESSAGES
from models.protocols.chat_completions import render_error
from models.protocols.chat_completions_request import (
    OPTION_BY_PARAMETER,
    UNSUPPORTED,
    ChatCompletionRequest,
)
from models.validation import Json

END_USER = ("user", "safety_identifier", "prompt_cache_key")  # fields that name the end user, the first one counts
HI = [{"role": "user", "content": "Hi"}]
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
MANY = [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)


def short_id(value: Any) -> str:
    return ascii(value)[:50]


def parse(body: Any = None, **values: Any) -> ChatCompletionRequest:
    """The request in a body, or in a body with the message Hi and these values."""
    body = {"model": "scripted", "messages": HI, **values} if body is None else body
    return ChatCompletionRequest.parse(body if isinstance(body, bytes) else json.dumps(body).encode(), "scripted")


def refusal(body: Any = None, **values: Any) -> APIError:
    """The error of a bad body, or of a body with the message Hi and these values."""
    with pytest.raises(APIError) as raised:
        parse(body, **values)
    return raised.value


# Options, end user, stream


def test_a_request_without_options_has_none() -> None:
    assert parse() == ChatCompletionRequest([{"role": "user", "content": "Hi"}], {}, False, False, None)


@pytest.mark.parametrize(
    ("name", "value", "ours", "held"),
    [
        ("temperature", 0, "temperature", 0.0),
        ("temperature", 2, "temperature", 2.0),
        ("top_p", 0.5, "top_p", 0.5),
        ("top_k", 40, "top_k", 40),
        ("max_tokens", 7, "max_output_tokens", 7),
        ("max_completion_tokens", 7, "max_output_tokens", 7),
        ("stop", "END", "stop", ("END",)),
        ("stop", ["END", "\n"], "stop", ("END", "\n")),
        ("stop", [], "stop", ()),
        ("seed", 0, "seed", 0),
        ("seed", 2**63 - 1, "seed", 2**63 - 1),
        ("repetition_penalty", 1.2, "repetition_penalty", 1.2),
        ("frequency_penalty", -2, "frequency_penalty", -2.0),
        ("presence_penalty", 2, "presence_penalty", 2.0),
    ],
    ids=short_id,
)
def test_an_option_has_another_name_here(name: str, value: Any, ours: str, held: Any) -> None:
    assert parse(**{name: value}).options == {ours: held}


@pytest.mark.parametrize("first", ["max_tokens", "max_completion_tokens"])
def test_the_newer_name_of_the_token_limit_counts(first: str) -> None:
    limits = {first: 0, "max_tokens": 5, "max_completion_tokens": 9}
    assert parse(**limits).options == {"max_output_tokens": 9}


@pytest.mark.parametrize("name", END_USER)
def test_the_end_user_has_256_characters_at_most(name: str) -> None:
    assert parse(**{name: "x" * 300}) == dataclasses.replace(parse(), end_user="x" * 256)


def test_the_first_field_with_an_end_user_counts() -> None:
    assert parse(prompt_cache_key="c", safety_identifier="b", user="a").end_user == "a"
    assert parse(prompt_cache_key="c", safety_identifier="b", user=None).end_user == "b"


@pytest.mark.parametrize(
    ("values", "stream", "include_usage"),
    [
        ({"stream": True}, True, False),
        ({"stream": False}, False, False),
        ({"stream": True, "stream_options": {}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": True}}, True, True),
        ({"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False}}, True, False),
        ({"stream_options": {}}, False, False),
    ],
    ids=short_id,
)
def test_a_stream_can_include_the_usage(values: Json, stream: bool, include_usage: bool) -> None:
    asked = parse(**values)
    assert (asked.stream, asked.include_usage) == (stream, include_usage)


NEUTRAL = [(name, value) for name, values in UNSUPPORTED.items() for value in values]
NULLABLE = [*UNSUPPORTED, *OPTION_BY_PARAMETER, *END_USER, "stream", "stream_options"]


@pytest.mark.parametrize(("name", "value"), [*NEUTRAL, *((name, None) for name in NULLABLE)], ids=short_id)
def test_a_value_that_asks_for_nothing_changes_nothing(name: str, value: Any) -> None:
    assert parse(**{name: value}) == parse()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1),
        ("tools", []),
        ("logprobs", False),
        ("response_format", {"type": "text"}),
        ("logit_bias", {}),
        ("min_p", 0.0),
        ("parallel_tool_calls", True),
        ("service_tier", "auto"),
        ("store", False),
    ],
    ids=short_id,
)
def test_an_explicit_default_value_is_accepted(name: str, value: Any) -> None:
    assert parse(**{name: value}) == parse()


# Messages


@pytest.mark.parametrize(
    ("message", "parsed"),
    [
        ({"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({"role": "user", "content": " 你好 \n"}, {"role": "user", "content": " 你好 \n"}),
        ({"role": "user", "content": ""}, {"role": "user", "content": ""}),
        ({"role": "user", "content": [{"type": "text", "text": "one"}]}, {"role": "user", "content": "one"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "user", "content": "one\ntwo"},
        ),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "one"}]},
            {"role": "assistant", "content": "one"},
        ),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        ({"role": "assistant", "content": "x", "tool_calls": []}, {"role": "assistant", "content": "x"}),
        ({"role": "user", "content": "x", "name": None}, {"role": "user", "content": "x"}),
    ],
    ids=short_id,
)
def test_a_message_becomes_a_role_and_text(message: Json, parsed: Json) -> None:
    assert parse(messages=[*HI, message]).messages == [*HI, parsed]


def test_a_message_of_the_openai_package_can_be_sent_back() -> None:
    reply = ChatCompletionMessage(role="assistant", content="Hello")
    for message in (reply.model_dump(), reply.model_dump(exclude_none=True), json.loads(reply.model_dump_json())):
        assert parse(messages=[*HI, message, *HI]).messages == [*HI, {"role": "assistant", "content": "Hello"}, *HI]


def test_a_thousand_messages_are_accepted() -> None:
    assert len(parse(messages=MANY[:-1]).messages) == 1000


# Refusals


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b"\xff", "invalid_json", None),
        (b'\xef\xbb\xbf{"model": "scripted"}', "invalid_json", None),
        (b"[]", "invalid_json", None),
        (b"null", "invalid_json", None),
        (b'{"temperature": NaN}', "invalid_json", None),
        (b"[" * 100_000, "invalid_json", None),
        (b'{"a":' * 100_000, "invalid_json", None),
        (b'{"seed": ' + b"9" * 5_000 + b"}", "invalid_json", None),
        (b"{}", "invalid_value", "model"),
        ({"messages": HI}, "invalid_value", "model"),
        ({"model": None, "messages": HI}, "invalid_value", "model"),
        ({"model": "scripted"}, "invalid_value", "messages"),
        ({"model": "scripted", "messages": None}, "invalid_value", "messages"),
        ({"model": "gpt-5", "messages": HI}, "model_not_found", "model"),
        ({"model": ["scripted"], "messages": HI}, "model_not_found", "model"),
        ({"model": "", "messages": HI}, "model_not_found", "model"),
    ],
    ids=short_id,
)
def test_a_body_that_is_no_request_for_the_model_is_refused(body: Any, code: str, param: str | None) -> None:
    refused = refusal(body)
    assert (refused.code, refused.param, refused.type) == (code, param, "invalid_request_error")


def test_the_error_for_another_model_names_the_loaded_one() -> None:
    with pytest.raises(ModelNotFoundError, match="scripted"):
        parse(model="gpt-5")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", []),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("max_tokens", "10"),
        ("max_completion_tokens", -1),
        ("max_completion_tokens", 2**40),
        ("stop", ""),
        ("stop", ["x"] * 9),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("stop", "x" * 257),
        ("stop", "\ud800"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.0),
        ("repetition_penalty", 0),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -3),
        ("user", 5),
        ("user", {"id": 5}),
        ("user", "\udfff"),
        ("safety_identifier", []),
        ("stream", 1),
        ("stream", "true"),
        ("stream_options", {"include_usage": True}),  # without a stream
        ("stream_options", True),
        ("stream_options", {"usage": True}),
    ],
    ids=short_id,
)
def test_a_bad_value_is_refused_with_its_name(name: str, value: Any) -> None:
    refused = refusal(**{name: value})
    assert (refused.code, refused.param) == ("invalid_value", name)
    assert name in str(refused)


def test_an_infinite_number_is_refused_with_its_name() -> None:
    body = b'{"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}'
    assert refusal(body).param == "temperature"


@pytest.mark.parametrize("value", [1, "yes", [], {}], ids=short_id)
def test_include_usage_must_be_true_or_false(value: Any) -> None:
    refused = refusal(stream=True, stream_options={"include_usage": value})
    assert (refused.code, refused.param) == ("invalid_value", "stream_options.include_usage")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio", {"voice": "ash", "format": "wav"}),
        ("best_of", 2),
        ("function_call", {"name": "weather"}),
        ("functions", [FUNCTION]),
        ("logit_bias", {"50256": -100}),
        ("logprobs", True),
        ("metadata", {"topic": "weather"}),
        ("min_p", 0.1),
        ("modalities", ["text", "audio"]),
        ("moderation", {"model": "omni-moderation-latest"}),
        ("n", 2),
        ("n", 0),
        ("prediction", {"type": "content", "content": "Hi"}),
        ("prompt_cache_options", {"mode": "explicit"}),
        ("prompt_cache_retention", "24h"),
        ("reasoning_effort", "high"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("service_tier", "flex"),
        ("store", True),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "weather"}}),
        ("tools", [{"type": "function", "function": FUNCTION}]),
        ("top_logprobs", 5),
        ("verbosity", "low"),
        ("web_search_options", {}),
    ],
    ids=short_id,
)
def test_an_unsupported_parameter_is_refused_with_its_name(name: str, value: Any) -> None:
    refused = refusal(**{name: value})
    assert (refused.code, refused.param) == ("unsupported_parameter", name)
    assert name in str(refused)


@pytest.mark.parametrize("values", [{"n": True}, {"logprobs": 0}, {"store": 0}, {"best_of": True}], ids=str)
def test_a_default_value_of_another_type_is_refused(values: Json) -> None:
    assert refusal(**values).param == next(iter(values))


@pytest.mark.parametrize("value", [True, 1, "yes", {"a": 1}], ids=str)
def test_obfuscation_is_refused_with_its_name(value: Any) -> None:
    refused = refusal(stream=True, stream_options={"include_obfuscation": value})
    assert (refused.code, refused.param) == ("unsupported_parameter", "stream_options.include_obfuscation")


@pytest.mark.parametrize(
    "name",
    ["frobnicate", "max_output_tokens", "instructions", "input", "", "Temperature", " - at `$.x`", "x - at `$.model"],
)
def test_an_unknown_parameter_is_refused_with_its_name(name: str) -> None:
    refused = refusal(**{name: 1})
    assert (refused.code, refused.param) == ("unknown_parameter", name)


@pytest.mark.parametrize("name", ["x" * 100, "\ud800" * 100], ids=["long", "surrogates"])
def test_a_strange_name_is_refused_in_a_short_plain_text(name: str) -> None:
    start = name.replace("\ud800", "?")[:100]
    unknown, unsupported = refusal(**{name: 1}), refusal(messages=[{**HI[0], name: 1}])
    assert (unknown.code, unknown.param) == ("unknown_parameter", start[:64])
    assert (unsupported.code, unsupported.param) == ("unsupported_parameter", f"messages[0].{start}"[:64])
    for refused in (unknown, unsupported):
        json.dumps(render_error(refused), ensure_ascii=False).encode()
        assert len(str(refused)) < 200


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"stream_options": "\ud800", "stream": True}, "stream_options"),
        ({"stream": "\ud800"}, "stream"),
        ({"temperature": "\ud800"}, "temperature"),
        ({"messages": [{"role": "\ud800", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": " - at `$.x`", "content": "Hi"}]}, "messages[0].role"),
    ],
    ids=ascii,
)
def test_a_strange_text_in_a_wrong_place_is_refused_with_its_name(values: Json, param: str) -> None:
    refused = refusal(**values)
    assert (refused.code, refused.param) == ("invalid_value", param)


def test_messages_are_checked_before_options() -> None:
    assert refusal(messages=[], seed=-1).param == "messages"


def test_every_parameter_of_the_openai_package_is_known() -> None:
    own = ("self", "extra_headers", "extra_query", "extra_body", "timeout")
    names = [name for name in inspect.signature(Completions.create).parameters if name not in own]
    assert "temperature" in names
    known = (*UNSUPPORTED, *OPTION_BY_PARAMETER, *END_USER, "model", "messages", "stream", "stream_options")
    assert not set(names) - set(known)


@pytest.mark.parametrize(
    ("messages", "code", "param"),
    [
        ([], "invalid_value", "messages"),
        ("Hi", "invalid_value", "messages"),
        ({}, "invalid_value", "messages"),
        (MANY, "invalid_value", "messages"),
        ([{"role": "user", "content": " \n"}], "invalid_value", "messages"),
        ([{"role": "assistant", "content": None}], "invalid_value", "messages"),
        (["Hi"], "invalid_value", "messages[0]"),
        ([*HI, None], "invalid_value", "messages[1]"),
        ([{"content": "Hi"}], "invalid_value", "messages[0].role"),
        ([{"role": "tool", "content": "Hi", "tool_call_id": "x"}], "invalid_value", "messages[0].role"),
        ([{"role": "function", "content": "Hi"}], "invalid_value", "messages[0].role"),
        ([{"role": ["user"], "content": "Hi"}], "invalid_value", "messages[0].role"),
        ([{"role": None, "content": "Hi"}], "invalid_value", "messages[0].role"),
        ([{"role": "user"}], "invalid_value", "messages[0].content"),
        ([{"role": "user", "content": None}], "invalid_value", "messages[0].content"),
        ([{"role": "system", "content": None}], "invalid_value", "messages[0].content"),
        ([{"role": "user", "content": 5}], "invalid_value", "messages[0].content"),
        ([{"role": "user", "content": {"type": "text", "text": "Hi"}}], "invalid_value", "messages[0].content"),
        ([{"role": "user", "content": "\ud800"}], "invalid_value", "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "invalid_value", "messages[0].content[0].text"),
        ([{"role": "user", "content": ["Hi"]}], "unsupported_parameter", "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "unsupported_parameter", "messages[0].content[0]"),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            "unsupported_parameter",
            "messages[0].content[0]",
        ),
        (
            [
                *HI,
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this?"},
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                    ],
                },
            ],
            "unsupported_parameter",
            "messages[1].content[1]",
        ),
        (
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}],
            "unsupported_parameter",
            "messages[0].content[0]",
        ),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
            "unsupported_parameter",
            "messages[0].content[0]",
        ),
        ([{"role": "user", "content": "Hi", "name": "ann"}], "unsupported_parameter", "messages[0].name"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "x", "type": "function"}]}],
            "unsupported_parameter",
            "messages[0].tool_calls",
        ),
        ([{"role": "assistant", "content": "", "refusal": "No."}], "unsupported_parameter", "messages[0].refusal"),
    ],
    ids=short_id,
)
def test_a_bad_message_is_refused_with_its_place(messages: Any, code: str, param: str) -> None:
    refused = refusal(messages=messages)
    assert (refused.code, refused.param) == (code, param)
    assert "messages" in str(refused)


# Any body

names = strategies.sampled_from(sorted({*UNSUPPORTED, *OPTION_BY_PARAMETER, *END_USER, "stream", "stream_options"}))
characters = strategies.text(strategies.characters(exclude_categories=[]), max_size=20)
keys = strategies.sampled_from(
    ["role", "content", "type", "text", "name", "include_usage", "include_obfuscation", "tool_calls", "refusal"]
)
words = strategies.sampled_from(["user", "assistant", "system", "developer", "tool", "text", "image_url", "none"])
leaves = (
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.integers(0, 2)
    | strategies.floats()
    | characters
    | words
)
values = strategies.recursive(
    leaves,
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(keys | characters, inner, max_size=4),
    max_leaves=10,
)
parts = strategies.fixed_dictionaries({"type": words}, optional={"text": values, "image_url": values})
turns = strategies.fixed_dictionaries(
    {"role": words | values, "content": characters | strategies.lists(parts | values, max_size=3) | values},
    optional={"name": values, "tool_calls": values},
)
shaped = strategies.builds(
    lambda model, messages, more: {"model": model, "messages": messages, **more},
    strategies.just("scripted") | values,
    strategies.lists(turns | values, max_size=3) | values,
    strategies.dictionaries(names | characters, values, max_size=3),
)
bodies = strategies.binary() | characters | values.map(json.dumps) | shaped.map(json.dumps)


def answer_to(body: bytes) -> ChatCompletionRequest | APIError:
    """The request in a body, or the error."""
    try:
        return parse(body)
    except APIError as error:
        return error


@settings(max_examples=1000, deadline=None)
@given(bodies)
def test_any_body_is_a_request_or_an_error_that_can_be_sent(body: str | bytes) -> None:
    answer = answer_to(body if isinstance(body, bytes) else body.encode(errors="surrogatepass"))
    if isinstance(answer, APIError):
        assert 0 < len(str(answer)) < 400
        assert answer.type == "invalid_request_error"
        sent = render_error(answer)
    else:
        assert 0 < len(answer.messages) <= MAX_MESSAGES
        assert set(answer.options) <= set(OPTION_BY_PARAMETER.values())
        sent = dataclasses.asdict(answer)
    json.dumps(sent, ensure_ascii=False, allow_nan=False).encode()
