from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from openai.types.responses import ResponseCreateParams

from models.errors import APIError, ModelNotFoundError, UnsupportedParameterError
from models.generation.interface import (
    Branch,
    NewConversation,
    StoredConversation,
    Target,
    Unstored,
)
from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.output_format import PLAIN_TEXT, OutputFormat
from models.protocols.responses.request import ResponsesRequest
from models.protocols.responses.resource import render_response
from models.store.item import Edge, Item, Status
from models.tools import NO_TOOLS, Tool, Tools
from models.validation import parse_object
from tests.support.openai_types import check_response

MODEL = ModelList([ModelInfo("tiny", 4096, Options(temperature=0.5, seed=3))])
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"type": "function", "name": "weather", "description": "The weather.", "parameters": SCHEMA, "strict": True}
CLOCK = {"type": "function", "name": "time"}
WEATHER = Tool("weather", "The weather.", SCHEMA, strict=True)
TIME = Tool("time")


def parse(**values: Any) -> ResponsesRequest:
    return ResponsesRequest.parse({"input": "Hi"} | values, MODEL)


def options_of(request: ResponsesRequest) -> Options:
    return request.response_request("ann", []).chat.options


def refused(values: Any) -> APIError:
    """The error that refuses a request, whose parameter and message say why."""
    with pytest.raises(APIError) as raised:
        ResponsesRequest.parse(values, MODEL)
    error = raised.value
    assert error.param
    assert "\n" not in str(error)
    assert len(str(error).encode()) < 1000
    return error


# What a request asks for


def test_a_request_needs_nothing_but_its_input() -> None:
    request = parse()
    assert list(request.input) == [{"role": "user", "content": "Hi"}]
    assert (request.options, request.tools, request.format) == ({}, NO_TOOLS, PLAIN_TEXT)
    assert (request.stream, request.store, request.background, request.generate) == (False, True, False, True)
    assert (request.top_logprobs, request.truncate, request.previous, request.conversation) == (None, False, None, None)
    assert request.details == {"model": "tiny"}


def test_options_that_are_not_named_are_the_models_own() -> None:
    options = options_of(parse(top_p=0.25, max_output_tokens=7, instructions="Be brief.", stop="x"))
    assert (options.temperature, options.seed) == (0.5, 3)
    assert (options.top_p, options.max_output_tokens, options.instructions) == (0.25, 7, "Be brief.")
    assert options.stop == ("x",)


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max"])
def test_the_effort_of_reasoning_is_an_option(effort: str) -> None:
    assert options_of(parse(reasoning={"effort": effort, "summary": "auto"})).reasoning_effort == effort


def test_null_is_what_is_usual() -> None:
    names = [*ResponseCreateParams.__args__[0].__annotations__, "conversation", "generate"]  # type: ignore[attr-defined]
    request = parse(**dict.fromkeys(name for name in names if name != "input"))
    assert request == parse()


@pytest.mark.parametrize(("name", "meant"), [("seed", None), ("top_k", 0)])
def test_minus_one_turns_an_option_off_as_on_other_servers(name: str, meant: int | None) -> None:
    assert getattr(options_of(parse(**{name: -1})), name) == meant


@pytest.mark.parametrize(
    "values",
    [
        {"service_tier": "priority"},
        {"stream_options": {"include_obfuscation": False}},
        {"prompt_cache_retention": "24h"},
        {"prompt_cache_options": {"mode": "explicit"}},
        {"include": ["reasoning.encrypted_content", "web_search_call.action.sources"]},
        {"client_metadata": {"x-codex-turn-metadata": "{}"}},
        {"max_tool_calls": 3},
        {"text": {"verbosity": "low"}},
        {"reasoning": {"summary": "auto", "generate_summary": "auto", "context": "auto"}},
        {"context_management": []},
        {"priority": 0},
        {"request_id": "x"},
        {"cache_salt": "x"},
        {"skip_special_tokens": True},
        {"ignore_eos": False},
        {"model": "tiny"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_what_cannot_change_the_reply_is_accepted(values: dict[str, Any]) -> None:
    request = parse(**values)
    assert (request.options, request.tools, request.format) == ({}, NO_TOOLS, PLAIN_TEXT)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"moderation": {}}, "moderation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"skip_special_tokens": 1}, "skip_special_tokens"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 7}, "max_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [CLOCK, {"type": "custom", "name": "patch"}]}, "tools[1]"),
        ({"tools": [{"type": "mcp"}], "tool_choice": "none"}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0]"),
    ],
)
def test_what_asks_for_something_that_is_not_there_is_refused_by_name(values: dict[str, Any], param: str) -> None:
    error = refused({"input": "Hi"} | values)
    assert (error.status, error.param) == (400, param)
    assert error.code in ("unsupported_parameter", "unknown_parameter")
    assert param in str(error)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"instructions": "x" * (2**15 + 1)}, "instructions"),
        ({"instructions": [{"role": "user", "content": "Hi"}]}, "instructions"),
        ({"input": 7}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": " \n"}]}, "input"),
        ({"store": "false"}, "store"),
        ({"stream": 1}, "stream"),
        ({"background": []}, "background"),
        ({"truncation": "oldest"}, "truncation"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"x" * 65: "a"}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        ({"reasoning": "low"}, "reasoning"),
        ({"user": 7}, "user"),
        ({"include": "x"}, "include"),
        ({"include": [7]}, "include[0]"),
        ({"previous_response_id": ""}, "previous_response_id"),
        ({"previous_response_id": "x" * 257}, "previous_response_id"),
        ({"previous_response_id": "resp_1", "conversation": "conv_1"}, "previous_response_id"),
        ({"conversation": {"after": None}}, "conversation"),
        ({"conversation": {"id": 7}}, "conversation"),
        ({"conversation": 7}, "conversation"),
        ({"store": False, "conversation": "conv_1"}, "store"),
        ({"store": False, "background": True}, "store"),
        ({"text": {"format": {"type": "regex"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": []}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"x": "y" * 2**16}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"x": float("inf")}}}}, "text.format.schema"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity"),
        ({"text": "json"}, "text"),
        ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "x"}}, "text.format"),
        ({"structured_outputs": {"regex": "x", "choice": ["a"]}}, "structured_outputs"),
        ({"tools": {}}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [CLOCK | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [CLOCK | {"parameters": {"x": "y" * 2**16}}]}, "tools[0].parameters"),
        ({"tools": [CLOCK, CLOCK]}, "tools[1]"),
        ({"tools": [CLOCK] * 257}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "time"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "name": "weather"}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": ["x"]}}, "tool_choice"),
        ({"chat_template_kwargs": {"x": "<|im_start|>"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": []}}, "chat_template_kwargs"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
    ],
)
def test_a_bad_value_is_refused_with_its_place(values: dict[str, Any], param: str) -> None:
    error = refused({"input": "Hi"} | values)
    assert (error.status, error.type) == (400, "invalid_request_error")
    assert str(error.param).startswith(param)


@pytest.mark.parametrize("name", ["gpt-9", ""])
def test_another_model_is_not_found(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="tiny"):
        parse(model=name)


def test_a_model_has_the_other_names_that_the_settings_say() -> None:
    model = ModelList([dataclasses.replace(MODEL.default, aliases=("gpt-4o",))])
    assert ResponsesRequest.parse({"input": "Hi", "model": "gpt-4o"}, model).details == {"model": "gpt-4o"}
    with pytest.raises(ModelNotFoundError):
        ResponsesRequest.parse({"input": "Hi", "model": "gpt-4"}, model)


def test_a_model_that_has_every_name_has_none_that_is_too_long_to_be_told() -> None:
    model = ModelList([dataclasses.replace(MODEL.default, aliases=("*",))])
    assert ResponsesRequest.parse({"input": "Hi", "model": "x" * 256}, model).details == {"model": "x" * 256}
    with pytest.raises(ModelNotFoundError):
        ResponsesRequest.parse({"input": "Hi", "model": "x" * 257}, model)


# Where the reply goes


@pytest.mark.parametrize(
    ("values", "target"),
    [
        ({"store": False}, Unstored()),
        ({"store": False, "previous_response_id": "resp_1"}, Unstored("resp_1")),
        ({"previous_response_id": "resp_1"}, Branch("resp_1")),
        ({"conversation": "conv_1"}, StoredConversation("conv_1", Edge.END)),
        ({"conversation": {"id": "conv_1"}}, StoredConversation("conv_1", Edge.END)),
        ({"conversation": {"id": "conv_1", "after": None}}, StoredConversation("conv_1", Edge.START)),
        ({"conversation": {"id": "conv_1", "after": "msg_1"}}, StoredConversation("conv_1", "msg_1")),
    ],
)
def test_the_target_is_where_the_request_says(values: dict[str, Any], target: Target) -> None:
    assert parse(**values).target() == target


@pytest.mark.parametrize(("values", "listed"), [({}, False), ({"conversation": "new"}, True)])
def test_a_request_that_continues_nothing_begins_a_conversation(values: dict[str, Any], listed: bool) -> None:
    target = parse(**values).target()
    assert isinstance(target, NewConversation)
    assert target.listed == listed
    assert target.id != parse(**values).target().id  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "values", [{"previous_response_id": "resp_1"}, {"conversation": "conv_1"}, {"generate": False}]
)
def test_what_continues_something_or_generates_nothing_needs_no_input(values: dict[str, Any]) -> None:
    assert list(ResponsesRequest.parse(values, MODEL).input) == []


def test_the_request_in_the_form_of_the_domain_has_all_of_it() -> None:
    request = parse(
        tools=[CLOCK],
        top_logprobs=2,
        truncation="auto",
        chat_template_kwargs={"enable_thinking": False},
        background=True,
        previous_response_id="resp_1",
        ignore_eos=True,
    )
    asked = request.response_request("ann", [{"role": "user", "content": "Hi"}])
    assert (asked.user, asked.target, asked.previous) == ("ann", Branch("resp_1"), "resp_1")
    assert (asked.background, asked.generate, asked.chat.ignore_eos) == (True, True, True)
    assert asked.chat.messages == [{"role": "user", "content": "Hi"}]
    assert (asked.chat.tools, asked.chat.top_logprobs, asked.chat.truncate) == (Tools((TIME,)), 2, True)
    assert asked.chat.template_arguments == {"enable_thinking": False}


# Tools, formats, probabilities


@pytest.mark.parametrize(
    ("choice", "tools"),
    [
        ("auto", Tools((WEATHER, TIME))),
        ("none", Tools((WEATHER, TIME), "none")),
        ("required", Tools((WEATHER, TIME), "required")),
        ({"type": "function", "name": "time"}, Tools((WEATHER, TIME), "required", frozenset(["time"]), parallel=False)),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "time"}]},
            Tools((WEATHER, TIME), "auto", frozenset(["time"])),
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [FUNCTION, CLOCK]},
            Tools((WEATHER, TIME), "required", frozenset(["time", "weather"])),
        ),
    ],
)
def test_a_choice_says_which_tools_the_model_may_call(choice: Any, tools: Tools) -> None:
    assert parse(tools=[FUNCTION, CLOCK], tool_choice=choice).tools == tools


def test_one_call_at_a_time_can_be_asked_for() -> None:
    assert not parse(tools=[CLOCK], parallel_tool_calls=False).tools.parallel


@pytest.mark.parametrize(
    ("values", "format"),
    [
        ({"text": {}}, PLAIN_TEXT),
        ({"text": {"format": None}}, PLAIN_TEXT),
        ({"text": {"format": {"type": "text"}}}, PLAIN_TEXT),
        ({"text": {"format": {"type": "json_object"}}}, OutputFormat("json_object")),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}},
            OutputFormat("json_schema", SCHEMA, "text.format.schema", True),
        ),
        ({"text": {"format": {"type": "json_schema"}}}, OutputFormat("json_object")),  # of the AI SDK
        ({"structured_outputs": {"regex": "a+"}}, OutputFormat("regex", "a+", "structured_outputs.regex")),
        (
            {"structured_outputs": {"choice": ["a", "b"]}, "text": {"format": {"type": "text"}}},
            OutputFormat("choice", ("a", "b"), "structured_outputs.choice"),
        ),
    ],
)
def test_the_text_has_the_format_that_the_request_asks_for(values: dict[str, Any], format: OutputFormat) -> None:
    assert parse(**values).format == format


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({}, None),
        ({"top_logprobs": 0}, None),
        ({"top_logprobs": 5}, 5),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, 3),
    ],
)
def test_probabilities_are_told_if_they_are_asked_for(values: dict[str, Any], count: int | None) -> None:
    assert parse(**values).top_logprobs == count


# What the response tells of the request


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tools": [FUNCTION, CLOCK], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [CLOCK], "tool_choice": {"type": "function", "name": "time"}},
        {"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [CLOCK]}},
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}, "verbosity": "low"}},
        {"text": {"format": {"type": "json_object"}}},
        {"text": {"format": {"type": "json_schema", "name": "x"}}},
        {"metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "p"},
        {"truncation": "auto", "top_logprobs": 3, "max_tool_calls": 7, "background": True},
        {"service_tier": "flex", "reasoning": {"effort": "low", "summary": "detailed"}},
        {"store": False},
    ],
)
def test_a_response_tells_its_request_in_the_forms_of_the_standard(values: dict[str, Any]) -> None:
    request = parse(**values)
    options = options_of(request).differences(MODEL.default.defaults)
    reply = Item.of_reply("resp_1", 1.0, [], status=Status.COMPLETED, options=options, request=request.details)
    told = render_response(MODEL, None, reply)
    check_response(told)
    for name in ("metadata", "truncation", "top_logprobs", "background", "parallel_tool_calls", "store", "user"):
        if name in values:
            assert told[name] == values[name]
    assert told["service_tier"] == "default"
    assert [tool["name"] for tool in told["tools"]] == [tool["name"] for tool in values.get("tools", [])]
    choice = values.get("tool_choice", "auto")
    if isinstance(choice, str) or choice["type"] == "function":
        assert told["tool_choice"] == choice
    else:
        assert told["tool_choice"] == choice | {"tools": [{"type": "function", "name": "time"}]}


def test_a_response_tells_the_schema_of_its_text() -> None:
    format = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
    assert parse(text={"format": format}).details["text"] == {"format": format | {"description": None}}


@pytest.mark.parametrize("depth", [99, 500, 900, 980])
def test_a_schema_that_is_too_deep_to_be_stored_is_refused(depth: int) -> None:
    deep = '{"x":' * depth + "1" + "}" * depth
    for text in (
        '{"input": "Hi", "tools": [{"type": "function", "name": "f", "parameters": %s}]}',
        '{"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": %s}}}',
        '{"input": "Hi", "tool_choice": %s}',
        '{"input": [%s]}',
        '{"input": "Hi", "tools": [{"type": %s}]}',
    ):
        try:
            request = ResponsesRequest.parse(parse_object(text % deep, "the body"), MODEL)
        except APIError as error:
            json.dumps([str(error), error.param])
        else:
            assert depth == 99
            json.dumps(request.details)


# Any JSON

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", "auto", "message"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        *("input", "instructions", "temperature", "max_output_tokens", "logit_bias", "stop", "seed", "model", "store"),
        *("conversation", "previous_response_id", "tools", "tool_choice", "text", "structured_outputs", "reasoning"),
        *("include", "metadata", "top_logprobs", "chat_template_kwargs", "generate", "background", "stream"),
        *("truncation", "user", "prompt", "context_management", "max_tool_calls", "parallel_tool_calls"),
    ]
)
ITEMS = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "item_reference"])
        | JSON
    },
    optional=dict.fromkeys(["role", "content", "call_id", "name", "arguments", "output", "summary", "id"], JSON),
)
TOOLS = st.fixed_dictionaries(
    {"type": st.just("function")}, optional=dict.fromkeys(["name", "description", "parameters", "strict"], JSON)
)
BODIES = st.dictionaries(NAMES | st.text(), JSON, max_size=4) | st.fixed_dictionaries(
    {"input": st.lists(ITEMS, max_size=3) | st.text()},
    optional={"tools": st.lists(TOOLS, max_size=3), "tool_choice": JSON, "text": JSON, "conversation": JSON},
)


@given(body=BODIES)
@settings(deadline=None, max_examples=120)
def test_any_json_is_a_request_or_is_refused(body: dict[str, Any]) -> None:
    try:
        request = ResponsesRequest.parse(body, MODEL)
    except APIError as error:
        json.dumps([str(error), error.param], ensure_ascii=False).encode()
        return
    asked = request.response_request("ann", [])
    reply = Item.of_reply("resp_1", 1.0, [], status=Status.COMPLETED, request=asked.details)
    rendered = render_response(MODEL, None, reply)
    json.dumps(rendered, ensure_ascii=False).encode()
    check_response(rendered)


def test_an_unsupported_parameter_says_what_to_do() -> None:
    with pytest.raises(UnsupportedParameterError, match="prompt is not supported: leave it out"):
        parse(prompt={"id": "pmpt_1"})
