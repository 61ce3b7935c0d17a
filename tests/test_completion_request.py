from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies
from openai.resources.chat.completions import Completions
from openai.types.chat import ChatCompletionMessage

from models import completion
from models.completion_request import LABELS, OPTIONS, UNSUPPORTED, CompletionRequest, ModelNotFound
from models.events import MESSAGES
from models.refused import Refused

Json = dict[str, Any]

HI = [{"role": "user", "content": "Hi"}]
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
MANY = [{"role": "user", "content": "x"}] * (MESSAGES + 1)


def parse(body: Any = None, **values: Any) -> CompletionRequest:
    """The request in a body, or in one that says Hi and has these values besides."""
    body = {"model": "scripted", "messages": HI, **values} if body is None else body
    return CompletionRequest.parse(body if isinstance(body, bytes) else json.dumps(body).encode(), "scripted")


def refusal(body: Any = None, **values: Any) -> Refused:
    with pytest.raises(Refused) as raised:
        parse(body, **values)
    return raised.value


# What is asked for


def test_a_request_that_names_no_option_leaves_all_to_the_server() -> None:
    assert parse() == CompletionRequest([{"role": "user", "content": "Hi"}], {}, False, False, None)


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
)
def test_an_option_is_one_of_ours_by_another_name(name: str, value: Any, ours: str, held: Any) -> None:
    assert parse(**{name: value}).options == {ours: held}


@pytest.mark.parametrize("first", ["max_tokens", "max_completion_tokens"])
def test_of_two_limits_the_newer_name_counts_wherever_it_stands(first: str) -> None:
    limits = {first: 0, "max_tokens": 5, "max_completion_tokens": 9}
    assert parse(**limits).options == {"max_output_tokens": 9}


@pytest.mark.parametrize("label", LABELS)
def test_whom_a_completion_is_for_asks_for_nothing_and_is_kept_short(label: str) -> None:
    assert parse(**{label: "x" * 300}) == dataclasses.replace(parse(), end_user="x" * 256)


def test_of_two_that_a_completion_is_for_the_user_counts() -> None:
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
)
def test_a_stream_is_asked_for_with_or_without_usage(values: Json, stream: bool, include_usage: bool) -> None:
    asked = parse(**values)
    assert (asked.stream, asked.include_usage) == (stream, include_usage)


NEUTRAL = [(name, value) for name, values in UNSUPPORTED.items() for value in values]
NULLABLE = [*UNSUPPORTED, *OPTIONS, *LABELS, "stream", "stream_options"]


@pytest.mark.parametrize(("name", "value"), [*NEUTRAL, *((name, None) for name in NULLABLE)])
def test_what_asks_for_nothing_changes_nothing(name: str, value: Any) -> None:
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
)
def test_a_client_that_spells_out_the_defaults_is_answered(name: str, value: Any) -> None:
    assert parse(**{name: value}) == parse()


# Messages


@pytest.mark.parametrize(
    ("said", "heard"),
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
)
def test_a_message_is_text_of_a_role(said: Json, heard: Json) -> None:
    assert parse(messages=[*HI, said]).messages == [*HI, heard]


def test_a_reply_can_be_sent_back_as_the_openai_package_holds_it() -> None:
    reply = ChatCompletionMessage(role="assistant", content="Hello")
    for said in (reply.model_dump(), reply.model_dump(exclude_none=True), json.loads(reply.model_dump_json())):
        assert parse(messages=[*HI, said, *HI]).messages == [*HI, {"role": "assistant", "content": "Hello"}, *HI]


def test_as_many_messages_as_may_be_are_taken() -> None:
    assert len(parse(messages=MANY[:-1]).messages) == MESSAGES


# What is refused


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
    ids=lambda value: repr(value)[:40],
)
def test_a_body_that_is_no_request_for_our_model_is_refused(body: Any, code: str, param: str | None) -> None:
    refused = refusal(body)
    assert (refused.code, refused.param, refused.type) == (code, param, "invalid_request_error")


def test_who_asks_for_another_model_hears_which_one_there_is() -> None:
    with pytest.raises(ModelNotFound, match="scripted"):
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
        ("stream_options", {"include_usage": True}),  # of no stream
        ("stream_options", True),
        ("stream_options", {"usage": True}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_value_that_is_not_allowed_is_refused_by_name(name: str, value: Any) -> None:
    refused = refusal(**{name: value})
    assert (refused.code, refused.param) == ("invalid_value", name)
    assert name in str(refused)


def test_an_infinite_number_is_refused_by_name() -> None:
    body = b'{"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}'
    assert refusal(body).param == "temperature"


@pytest.mark.parametrize("value", [1, "yes", [], {}])
def test_whether_usage_is_included_is_true_or_false(value: Any) -> None:
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
    ids=lambda value: str(value)[:40],
)
def test_what_is_known_and_not_supported_is_refused_by_name(name: str, value: Any) -> None:
    refused = refusal(**{name: value})
    assert (refused.code, refused.param) == ("unsupported_parameter", name)
    assert name in str(refused)


@pytest.mark.parametrize("values", [{"n": True}, {"logprobs": 0}, {"store": 0}, {"best_of": True}])
def test_a_value_of_another_type_is_no_neutral_one(values: Json) -> None:
    assert refusal(**values).param == next(iter(values))


def test_obfuscation_is_refused_by_name() -> None:
    refused = refusal(stream=True, stream_options={"include_obfuscation": True})
    assert (refused.code, refused.param) == ("unsupported_parameter", "stream_options.include_obfuscation")


@pytest.mark.parametrize("name", ["frobnicate", "max_output_tokens", "instructions", "input", "", "Temperature"])
def test_what_is_not_known_is_refused_by_name(name: str) -> None:
    refused = refusal(**{name: 1})
    assert (refused.code, refused.param) == ("unknown_parameter", name)


def test_a_name_that_cannot_be_sent_back_is_told_in_words_that_can() -> None:
    for refused in (refusal(**{"\ud800" * 100: 1}), refusal(messages=[{**HI[0], "\ud800": 1}])):
        json.dumps(completion.error(refused), ensure_ascii=False).encode()
        assert len(str(refused)) < 200


def test_every_parameter_of_the_openai_package_is_known() -> None:
    own = ("self", "extra_headers", "extra_query", "extra_body", "timeout")
    names = [name for name in inspect.signature(Completions.create).parameters if name not in own]
    assert "temperature" in names
    known = (*UNSUPPORTED, *OPTIONS, *LABELS, "model", "messages", "stream", "stream_options")
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
    ids=lambda value: str(value)[:60],
)
def test_a_message_that_is_not_understood_is_refused_by_its_place(messages: Any, code: str, param: str) -> None:
    refused = refusal(messages=messages)
    assert (refused.code, refused.param) == (code, param)
    assert "messages" in str(refused)


# Whatever comes

names = strategies.sampled_from(sorted({*UNSUPPORTED, *OPTIONS, *LABELS, "stream", "stream_options"}))
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


def answered(body: bytes) -> CompletionRequest | Refused:
    """The request in a body, or why it is refused."""
    try:
        return parse(body)
    except Refused as refused:
        return refused


@settings(max_examples=1000, deadline=None)
@given(bodies)
def test_whatever_a_body_holds_it_is_a_request_or_refused_in_sendable_words(body: str | bytes) -> None:
    answer = answered(body if isinstance(body, bytes) else body.encode(errors="surrogatepass"))
    if isinstance(answer, Refused):
        assert 0 < len(str(answer)) < 400
        assert answer.type == "invalid_request_error"
        told = completion.error(answer)
    else:
        assert 0 < len(answer.messages) <= MESSAGES
        assert set(answer.options) <= set(OPTIONS.values())
        told = dataclasses.asdict(answer)
    json.dumps(told, ensure_ascii=False, allow_nan=False).encode()
