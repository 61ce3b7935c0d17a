from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies
from openai.resources.chat.completions import Completions
from openai.types.chat import ChatCompletionMessage

from models.chat_request import ChatRequest
from models.errors import APIError, ModelNotFoundError
from models.messages import MAX_MESSAGES, Message
from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.output_format import OutputFormat
from models.protocols.chat_completions_messages import MAX_CALLS
from models.protocols.chat_completions_request import ChatBody, parse_chat_completion
from models.protocols.completion_request import IGNORED, OPTION_BY_PARAMETER, UNSUPPORTED, CompletionRequest
from models.protocols.error_object import render_error
from models.protocols.function_tools import MAX_TOOLS, SCHEMA_BYTES
from models.tools import Tool, Tools
from models.validation import Json

MODEL = ModelList([ModelInfo("scripted", 4096, Options())])
END_USER = ("user", "safety_identifier", "prompt_cache_key")  # fields that name the end user, the first one counts
HI = [{"role": "user", "content": "Hi"}]
FUNCTION: Json = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
WEATHER = Tool("weather", None, FUNCTION["parameters"])
SCHEMA: Json = {"type": "object", "properties": {"city": {"type": "string"}}}
CALL: Json = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
MANY = [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)


def short_id(value: Any) -> str:
    return ascii(value)[:50]


def parse(body: Any = None, model: ModelList = MODEL, **values: Any) -> CompletionRequest:
    """The request in a body, or in a body with the message Hi and these values."""
    body = {"model": "scripted", "messages": HI, **values} if body is None else body
    return parse_chat_completion(body if isinstance(body, bytes) else json.dumps(body).encode(), model, "ann")


def chat(**values: Any) -> ChatRequest:
    """What the model is asked by a body with the message Hi and these values."""
    return parse(**values).chat


def messages_of(*messages: Any) -> list[Message]:
    return list(chat(messages=list(messages)).messages)


def refusal(body: Any = None, **values: Any) -> APIError:
    """The error of a bad body, or of a body with the message Hi and these values."""
    with pytest.raises(APIError) as raised:
        parse(body, **values)
    return raised.value


# Options, end user, stream


def test_a_request_without_options_has_none() -> None:
    chat = ChatRequest("ann", [{"role": "user", "content": "Hi"}], Options(), model="scripted")
    assert parse() == CompletionRequest(chat, "scripted")


def test_options_that_a_request_leaves_out_are_the_models_own() -> None:
    model = ModelList([ModelInfo("scripted", 4096, Options(instructions="Be brief.", temperature=1.5, seed=3))])
    options = parse(model=model, temperature=0, stop="END").chat.options
    assert options == Options("Be brief.", temperature=0, seed=3, stop=("END",))


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
        ("min_p", 0.1, "min_p", 0.1),
        ("logit_bias", {"50256": -100}, "logit_bias", {"50256": -100.0}),
        ("reasoning_effort", "high", "reasoning_effort", "high"),
        ("reasoning_effort", "none", "reasoning_effort", "none"),
        ("reasoning", {"effort": "low", "summary": "auto"}, "reasoning_effort", "low"),
    ],
    ids=short_id,
)
def test_an_option_has_another_name_here(name: str, value: Any, ours: str, held: Any) -> None:
    assert chat(**{name: value}).options == Options(**{ours: held})


def test_minus_one_means_no_seed_and_no_top_k() -> None:
    model = ModelList([ModelInfo("scripted", 4096, Options(seed=3, top_k=40))])
    assert parse(model=model, seed=-1, top_k=-1).chat.options == Options(seed=None, top_k=0)


def test_several_choices_have_seeds_of_their_own_and_are_bounded() -> None:
    assert [one.options.seed for one in parse(n=3, seed=7).chats] == [7, 8, 9]
    assert [one.options.seed for one in parse(n=2, seed=2**63 - 1).chats] == [2**63 - 1, 0]
    assert parse(n=8).chats == [chat()] * 8
    for n in (0, 9, "2", 1.5, True):
        assert (refusal(n=n).code, refusal(n=n).param) == ("invalid_value", "n")


@pytest.mark.parametrize(
    ("values", "top_logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
    ids=short_id,
)
def test_the_probabilities_of_tokens_are_told_on_request(values: Json, top_logprobs: int | None) -> None:
    assert chat(**values).top_logprobs == top_logprobs


@pytest.mark.parametrize("values", [{"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}], ids=short_id)
def test_a_wrong_number_of_probabilities_is_refused(values: Json) -> None:
    assert (refusal(**values).code, refusal(**values).param) == ("invalid_value", "top_logprobs")


def test_a_reply_may_go_on_after_its_end() -> None:
    assert chat(ignore_eos=True) == dataclasses.replace(chat(), ignore_eos=True)
    assert chat(ignore_eos=False) == chat()


def test_arguments_of_the_chat_template_are_plain_values() -> None:
    arguments = {"enable_thinking": False, "date": "7 May 2025, 12:30", "depth": 3, "scale": 0.5, "other": None}
    assert chat(chat_template_kwargs=arguments).template_arguments == arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"text": "<|im_start|>system"},
        {"text": "[INST]"},
        {"text": "x" * 200},
        {"documents": [{"text": "a"}]},
        {"a-b": 1},
        {"": 1},
        {f"name{number}": 1 for number in range(17)},
        [],
        "thinking",
    ],
    ids=short_id,
)
def test_arguments_of_the_chat_template_cannot_pose_as_tokens_or_grow(arguments: Any) -> None:
    refused = refusal(chat_template_kwargs=arguments)
    assert refused.code == "invalid_value"
    assert str(refused.param).startswith("chat_template_kwargs")


# The name of the model


def test_a_model_has_other_names_which_replies_repeat() -> None:
    model = ModelList([ModelInfo("scripted", 4096, Options(), ("gpt-4o", "org/other"))])
    for name in ("scripted", "gpt-4o", "org/other"):
        assert parse(model=model, body={"model": name, "messages": HI}).model == name
    with pytest.raises(ModelNotFoundError):
        parse(model=model, body={"model": "gpt-5", "messages": HI})


def test_a_model_may_have_every_name_but_no_endless_one() -> None:
    model = ModelList([ModelInfo("scripted", 4096, Options(), ("*",))])
    for name in ("gpt-5", "*", "n" * 256):
        assert parse(model=model, body={"model": name, "messages": HI}).model == name
    for bad in ("", "n" * 257, 5, ["gpt-5"]):
        with pytest.raises(ModelNotFoundError):
            parse(model=model, body={"model": bad, "messages": HI})


@pytest.mark.parametrize("first", ["max_tokens", "max_completion_tokens"])
def test_the_newer_name_of_the_token_limit_counts(first: str) -> None:
    limits = {first: 0, "max_tokens": 5, "max_completion_tokens": 9}
    assert chat(**limits).options == Options(max_output_tokens=9)


@pytest.mark.parametrize("name", END_USER)
def test_the_end_user_has_256_characters_at_most(name: str) -> None:
    values: Json = {name: "x" * 300}
    assert parse(**values) == dataclasses.replace(parse(), end_user="x" * 256)


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
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, True, False),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, True, False),
        ({"stream_options": {}}, False, False),
    ],
    ids=short_id,
)
def test_a_stream_can_include_the_usage(values: Json, stream: bool, include_usage: bool) -> None:
    asked = parse(**values)
    assert (asked.stream, asked.include_usage, asked.continuous_usage) == (stream, include_usage, False)


def test_each_chunk_can_have_the_usage() -> None:
    asked = parse(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert (asked.include_usage, asked.continuous_usage) == (True, True)


NEUTRAL = [(name, value) for name, values in UNSUPPORTED.items() for value in values]
NULLABLE = [*UNSUPPORTED, *IGNORED, *OPTION_BY_PARAMETER, *{*ChatBody.__struct_fields__} - {"model", "messages"}]


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
        ("reasoning", {}),
        ("chat_template_kwargs", {}),
        ("structured_outputs", {}),
    ],
    ids=short_id,
)
def test_an_explicit_default_value_is_accepted(name: str, value: Any) -> None:
    assert parse(**{name: value}) == parse()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metadata", {"topic": "weather"}),
        ("prediction", {"type": "content", "content": "Hi"}),
        ("prompt_cache_options", {"mode": "explicit"}),
        ("prompt_cache_retention", "24h"),
        ("service_tier", "flex"),
        ("store", True),
        ("verbosity", "low"),
        ("parallel_tool_calls", True),
        ("guided_decoding_backend", "xgrammar"),
    ],
    ids=short_id,
)
def test_what_cannot_change_the_reply_is_accepted(name: str, value: Any) -> None:
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
        ({"role": "user", "content": "x", "name": "ann"}, {"role": "user", "content": "x"}),
        (
            {"role": "user", "content": "x", "cache_control": {"type": "ephemeral"}, "id": "msg_1"},
            {"role": "user", "content": "x"},
        ),
        (
            {"role": "system", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
            {"role": "system", "content": "x"},
        ),
        (
            {"role": "assistant", "content": "x", "reasoning_content": "hm", "annotations": [{"type": "x"}]},
            {"role": "assistant", "content": "x", "reasoning": "hm"},
        ),
        (
            {"role": "assistant", "content": "x", "reasoning": "hm", "reasoning_details": [{"text": "hm"}]},
            {"role": "assistant", "content": "x", "reasoning": "hm"},
        ),
        ({"role": "assistant", "content": "x", "reasoning_content": ""}, {"role": "assistant", "content": "x"}),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "call_1", "name": "weather", "arguments": '{"city": "Paris"}'}],
            },
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": " "}}],
            },
            {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "name": "f", "arguments": "{}"}]},
        ),
        (
            {"role": "tool", "tool_call_id": "call_1", "content": "21 C", "name": "weather"},
            {"role": "tool", "content": "21 C", "tool_call_id": "call_1"},
        ),
        (
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "21 C"}]},
            {"role": "tool", "content": "21 C", "tool_call_id": "call_1"},
        ),
    ],
    ids=short_id,
)
def test_a_message_has_the_form_of_the_domain(message: Json, parsed: Json) -> None:
    assert messages_of(*HI, message) == [*HI, parsed]


def test_a_message_of_the_openai_package_can_be_sent_back() -> None:
    reply = ChatCompletionMessage(role="assistant", content="Hello")
    for message in (reply.model_dump(), reply.model_dump(exclude_none=True), json.loads(reply.model_dump_json())):
        assert messages_of(*HI, message, *HI) == [*HI, {"role": "assistant", "content": "Hello"}, *HI]


def test_a_thousand_messages_are_accepted() -> None:
    assert len(messages_of(*MANY[:-1])) == 1000


# Tools


@pytest.mark.parametrize(
    ("values", "tools"),
    [
        ({}, Tools()),
        ({"tool_choice": "none"}, Tools(choice="none")),
        ({"tools": [TOOL]}, Tools((WEATHER,))),
        ({"tools": [TOOL], "tool_choice": "none"}, Tools((WEATHER,), "none")),
        ({"tools": [TOOL], "tool_choice": "auto"}, Tools((WEATHER,))),
        ({"tools": [TOOL], "tool_choice": "required"}, Tools((WEATHER,), "required")),
        ({"tools": [TOOL], "parallel_tool_calls": False}, Tools((WEATHER,), parallel=False)),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
            Tools((WEATHER,), "required", frozenset(["weather"]), parallel=False),
        ),
        (
            {
                "tools": [TOOL, {"type": "function", "function": {"name": "time"}}],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]},
                },
            },
            Tools((WEATHER, Tool("time")), "auto", frozenset(["time"])),
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "description": "Does.", "strict": True, "parameters": SCHEMA},
                        "cache_control": {"type": "ephemeral"},
                    }
                ]
            },
            Tools((Tool("f", "Does.", SCHEMA, strict=True),)),
        ),
    ],
    ids=short_id,
)
def test_tools_have_the_form_of_the_domain(values: Json, tools: Tools) -> None:
    assert chat(**values).tools == tools


def named(name: Any) -> Json:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("tools", "code", "param"),
    [
        ("weather", "invalid_value", "tools"),
        (["weather"], "invalid_value", "tools[0]"),
        ([{"type": "function"}], "invalid_value", "tools[0].function"),
        ([TOOL, {"type": "function", "function": {}}], "invalid_value", "tools[1].function.name"),
        ([named("two words")], "invalid_value", "tools[0].function.name"),
        ([named("\ud800")], "invalid_value", "tools[0].function.name"),
        ([named("n" * 129)], "invalid_value", "tools[0].function.name"),
        ([named("f"), named("f")], "invalid_value", "tools[1]"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            "invalid_value",
            "tools[0].function.parameters",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {"a": "x" * SCHEMA_BYTES}}}],
            "invalid_value",
            "tools[0].function.parameters",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {"enum": ["\ud800"]}}}],
            "invalid_value",
            "tools[0].function.parameters",
        ),
        ([named(f"f{number}") for number in range(MAX_TOOLS + 1)], "invalid_value", "tools"),
        ([TOOL, {"type": "web_search"}], "unsupported_parameter", "tools[1].type"),
        ([{"type": "custom", "custom": {"name": "f"}}], "unsupported_parameter", "tools[0].type"),
        ([{"type": {"a": "\ud800"}}], "unsupported_parameter", "tools[0].type"),
    ],
    ids=short_id,
)
def test_a_bad_tool_is_refused_with_its_place(tools: Any, code: str, param: str) -> None:
    refused = refusal(tools=tools)
    assert (refused.code, refused.param) == (code, param)
    json.dumps(render_error(refused), ensure_ascii=False).encode()


def test_the_most_tools_are_accepted() -> None:
    assert len(chat(tools=[named(f"f{number}") for number in range(MAX_TOOLS)]).tools.tools) == MAX_TOOLS


@pytest.mark.parametrize(
    "values",
    [
        {"tool_choice": "required"},
        {"tool_choice": "any", "tools": [TOOL]},
        {"tool_choice": named("time"), "tools": [TOOL]},
        {"tool_choice": named("\ud800"), "tools": [TOOL]},
        {"tool_choice": named(5), "tools": [TOOL]},
        {"tool_choice": {"type": "web_search"}, "tools": [TOOL]},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [5]}}, "tools": [TOOL]},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": []}}, "tools": [TOOL]},
        {"tool_choice": 1},
    ],
    ids=short_id,
)
def test_a_bad_choice_of_a_tool_is_refused(values: Json) -> None:
    refused = refusal(**values)
    assert (refused.code, refused.param) == ("invalid_value", "tool_choice")
    json.dumps(render_error(refused), ensure_ascii=False).encode()


# The form of the text


def schema_format(schema: Any, **more: Any) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("values", "format"),
    [
        ({"response_format": {"type": "json_object"}}, OutputFormat("json_object", None, "response_format")),
        (
            {"response_format": schema_format(SCHEMA, strict=True)},
            OutputFormat("json_schema", SCHEMA, "response_format.json_schema.schema", True),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}},
            OutputFormat("json_object", None, "response_format"),
        ),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            OutputFormat("json_schema", SCHEMA, "response_format.schema"),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, OutputFormat("json_schema", SCHEMA, "structured_outputs.json")),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA)}},
            OutputFormat("json_schema", SCHEMA, "structured_outputs.json"),
        ),
        ({"structured_outputs": {"json": {}}}, OutputFormat("json_schema", {}, "structured_outputs.json")),
        ({"guided_json": {}}, OutputFormat("json_schema", {}, "structured_outputs.json")),
        ({"structured_outputs": {"regex": "[ab]+"}}, OutputFormat("regex", "[ab]+", "structured_outputs.regex")),
        (
            {"structured_outputs": {"choice": ["yes", "no"], "regex": None}},
            OutputFormat("choice", ("yes", "no"), "structured_outputs.choice"),
        ),
        (
            {"structured_outputs": {"grammar": 'root ::= "a"'}},
            OutputFormat("grammar", 'root ::= "a"', "structured_outputs.grammar"),
        ),
        (
            {"structured_outputs": {"json_object": True}},
            OutputFormat("json_object", None, "structured_outputs.json_object"),
        ),
        ({"guided_json": SCHEMA}, OutputFormat("json_schema", SCHEMA, "structured_outputs.json")),
        ({"guided_regex": "[ab]+"}, OutputFormat("regex", "[ab]+", "structured_outputs.regex")),
        ({"guided_choice": ["yes"]}, OutputFormat("choice", ("yes",), "structured_outputs.choice")),
        ({"guided_grammar": "start: /a/"}, OutputFormat("grammar", "start: /a/", "structured_outputs.grammar")),
        (
            {"response_format": {"type": "text"}, "guided_regex": "a"},
            OutputFormat("regex", "a", "structured_outputs.regex"),
        ),
    ],
    ids=short_id,
)
def test_the_form_of_the_text_can_be_asked_for(values: Json, format: OutputFormat) -> None:
    assert chat(**values).format == format


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": schema_format([])}, "response_format.json_schema.schema"),
        ({"response_format": schema_format({"a": "x" * SCHEMA_BYTES})}, "response_format.json_schema.schema"),
        ({"response_format": schema_format({"a": "\ud800"})}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * (SCHEMA_BYTES + 1)}}, "structured_outputs.regex"),
        ({"guided_json": 5}, "structured_outputs.json"),
    ],
    ids=short_id,
)
def test_a_bad_form_is_refused_with_its_name(values: Json, param: str) -> None:
    refused = refusal(**values)
    assert (refused.code, refused.param) == ("invalid_value", param)


def test_a_schema_with_a_number_that_json_does_not_have_is_refused() -> None:
    body = b'{"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "guided_json": {"maximum": 1e999}}'
    assert refusal(body).param == "structured_outputs.json"


def test_a_schema_in_a_text_that_is_no_json_is_refused() -> None:
    assert refusal(guided_json="{").code == "invalid_json"


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
        parse({"model": "gpt-5", "messages": HI})


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
        ("top_k", -2),
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
        ("seed", -2),
        ("seed", 2**63),
        ("min_p", 1.5),
        ("logit_bias", {"5": 200}),
        ("logit_bias", {"yes": 1}),
        ("reasoning_effort", "extreme"),
        ("ignore_eos", "yes"),
        ("parallel_tool_calls", 1),
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
        ("modalities", ["text", "audio"]),
        ("moderation", {"model": "omni-moderation-latest"}),
        ("web_search_options", {}),
        ("suffix", "the end"),
        ("echo", True),
    ],
    ids=short_id,
)
def test_an_unsupported_parameter_is_refused_with_its_name(name: str, value: Any) -> None:
    refused = refusal(**{name: value})
    assert (refused.code, refused.param) == ("unsupported_parameter", name)
    assert name in str(refused)


@pytest.mark.parametrize("values", [{"n": True}, {"logprobs": 0}, {"echo": 0}, {"best_of": True}], ids=str)
def test_a_default_value_of_another_type_is_refused(values: Json) -> None:
    assert refusal(**values).param == next(iter(values))


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
    assert refusal(messages=[], seed=-2).param == "messages"


def test_every_parameter_of_the_openai_package_is_known() -> None:
    own = ("self", "extra_headers", "extra_query", "extra_body", "timeout")
    names = [name for name in inspect.signature(Completions.create).parameters if name not in own]
    assert "temperature" in names
    known = (*UNSUPPORTED, *IGNORED, *OPTION_BY_PARAMETER, *ChatBody.__struct_fields__)
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
        ([{"role": "tool", "content": "Hi"}], "invalid_value", "messages[0].tool_call_id"),
        ([{"role": "tool", "tool_call_id": "x"}], "invalid_value", "messages[0].content"),
        ([{"role": "tool", "content": "Hi", "tool_call_id": "x" * 257}], "invalid_value", "messages[0].tool_call_id"),
        ([{"role": "function", "content": "Hi", "name": "f"}], "unsupported_parameter", "messages[0].role"),
        ([{"role": "critic", "content": "Hi"}], "invalid_value", "messages[0].role"),
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
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "x", "type": "function"}]}],
            "invalid_value",
            "messages[0].tool_calls[0].function",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"id": "x", "type": "custom", "function": {"name": "f"}}]}],
            "invalid_value",
            "messages[0].tool_calls[0].type",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": {}}}]}],
            "invalid_value",
            "messages[0].tool_calls[0].function.arguments",
        ),
        ([{"role": "assistant", "tool_calls": [CALL] * (MAX_CALLS + 1)}], "invalid_value", "messages[0].tool_calls"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "invalid_value", "messages[0].tool_calls"),
        (
            [{"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": "{}"}}],
            "unsupported_parameter",
            "messages[0].function_call",
        ),
        (
            [{"role": "assistant", "content": "x", "reasoning_content": 5}],
            "invalid_value",
            "messages[0].reasoning_content",
        ),
        ([{"role": "user", "content": "x", "reasoning": "hm"}], "invalid_value", "messages[0].reasoning"),
        ([{"role": "assistant", "content": "", "refusal": "No."}], "unsupported_parameter", "messages[0].refusal"),
    ],
    ids=short_id,
)
def test_a_bad_message_is_refused_with_its_place(messages: Any, code: str, param: str) -> None:
    refused = refusal(messages=messages)
    assert (refused.code, refused.param) == (code, param)
    assert "messages" in str(refused)


# Any body

names = strategies.sampled_from(sorted({*UNSUPPORTED, *IGNORED, *OPTION_BY_PARAMETER, *ChatBody.__struct_fields__}))
characters = strategies.text(strategies.characters(exclude_categories=[]), max_size=20)
keys = strategies.sampled_from(
    [
        *["role", "content", "type", "text", "name", "include_usage", "include_obfuscation", "tool_calls", "refusal"],
        *["function", "parameters", "id", "arguments", "json_schema", "schema", "json", "regex", "choice", "effort"],
    ]
)
words = strategies.sampled_from(
    ["user", "assistant", "system", "developer", "tool", "text", "image_url", "none", "function"]
)
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


def answer_to(body: bytes) -> CompletionRequest | APIError:
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
        assert 0 < len(answer.chat.messages) <= MAX_MESSAGES
        sent = dataclasses.asdict(answer)
        sent["chat"] |= {
            "options": answer.chat.options.as_json(),
            "tools": [*map(dataclasses.asdict, answer.chat.tools.tools)],
        }
    json.dumps(sent, ensure_ascii=False, allow_nan=False).encode()
