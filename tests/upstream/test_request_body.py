"""What each kind of server is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from models.chat_request import ChatRequest
from models.errors import UnsupportedParameterError
from models.messages import Message
from models.options import Options
from models.output_format import OutputFormat
from models.tools import Tool, Tools
from models.upstream.kinds import LLAMA_CPP, OPENAI, OTHER, PARLEY, SGLANG, VLLM, Kind, kind_of
from models.upstream.request_body import body_of, render_messages
from models.upstream.upstream_chat import OWN

KINDS = [VLLM, SGLANG, LLAMA_CPP, PARLEY, OPENAI, OTHER]
SCHEMA = {"type": "object"}


def asked(kind: Kind, *, options: Options = OWN, **fields: Any) -> dict[str, Any]:
    """The fields that a request of ann's has beside the usual ones."""
    usual = body_of(ChatRequest("ann", [], OWN), kind, "tiny")
    body = body_of(ChatRequest("ann", [], options, **fields), kind, "tiny")
    return {name: value for name, value in body.items() if usual.get(name) != value}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_options_that_nobody_has_set_are_left_to_the_upstream(kind: Kind) -> None:
    body = body_of(ChatRequest("ann", [], OWN), kind, "tiny")
    assert not {*kind.options.values(), "top_k", "min_p"} & body.keys()
    assert (body["model"], body["stream"], body["stream_options"]["include_usage"]) == ("tiny", True, True)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 1.0),
        ("top_p", 0.5),
        ("frequency_penalty", 0.5),
        ("presence_penalty", 0.0),
        ("seed", 7),
        ("logit_bias", {"17": 5.0}),
    ],
)
def test_options_of_the_standard_are_passed_on(kind: Kind, name: str, value: Any) -> None:
    assert asked(kind, options=OWN.updated({name: value})) == {name: value}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (VLLM, {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}),
        (SGLANG, {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}),
        (PARLEY, {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}),
        (LLAMA_CPP, {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.2}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_options_have_the_names_of_the_kind(kind: Kind, fields: dict[str, Any]) -> None:
    options = OWN.updated({"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2})
    assert asked(kind, options=options) == fields


@pytest.mark.parametrize("kind", [OPENAI, OTHER], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("name", "value", "neutral"), [("top_k", 5, 0), ("min_p", 0.1, 0.0), ("repetition_penalty", 1.2, 1.0)]
)
def test_other_options_are_refused_by_name_unless_they_change_nothing(
    kind: Kind, name: str, value: float, neutral: float
) -> None:
    assert asked(kind, options=OWN.updated({name: neutral})) == {}
    with pytest.raises(UnsupportedParameterError) as caught:
        asked(kind, options=OWN.updated({name: value}))
    assert caught.value.param == name


def test_the_limit_of_tokens_has_another_name_at_openai() -> None:
    options = OWN.updated({"max_output_tokens": 9, "stop": ["END"]})
    assert asked(OPENAI, options=options) == {"max_completion_tokens": 9, "stop": ["END"]}
    assert asked(VLLM, options=options) == {"max_tokens": 9, "stop": ["END"]}


def test_values_have_the_bounds_of_the_kind() -> None:
    assert asked(SGLANG, options=OWN.updated({"top_k": 0})) == {"top_k": -1}
    assert asked(LLAMA_CPP, options=OWN.updated({"seed": 2**32 + 4})) == {"seed": 5}


@pytest.mark.parametrize(
    ("kind", "effort", "fields"),
    [
        (OPENAI, "minimal", {"reasoning_effort": "minimal"}),
        (PARLEY, "none", {"reasoning_effort": "none"}),
        (LLAMA_CPP, "none", {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}),
        (
            VLLM,
            "xhigh",
            {
                "reasoning_effort": "high",
                "chat_template_kwargs": {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"},
            },
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_reasoning_effort_is_told_as_the_kind_knows_it(kind: Kind, effort: str, fields: dict[str, Any]) -> None:
    assert asked(kind, options=OWN.updated({"reasoning_effort": effort})) == fields


def test_the_arguments_of_a_request_for_the_chat_template_come_first() -> None:
    body = asked(VLLM, options=OWN.updated({"reasoning_effort": "none"}), template_arguments={"thinking": True, "a": 1})
    assert body["chat_template_kwargs"] == {"enable_thinking": False, "thinking": True, "a": 1}
    with pytest.raises(UnsupportedParameterError, match="chat_template_kwargs"):
        asked(OPENAI, template_arguments={"a": 1})


@pytest.mark.parametrize(
    ("kind", "format", "fields"),
    [
        (VLLM, OutputFormat("regex", "a+"), {"structured_outputs": {"regex": "a+"}}),
        (VLLM, OutputFormat("choice", ("a", "b")), {"structured_outputs": {"choice": ("a", "b")}}),
        (PARLEY, OutputFormat("grammar", "start: /a/"), {"structured_outputs": {"grammar": "start: /a/"}}),
        (SGLANG, OutputFormat("regex", "a+"), {"regex": "a+"}),
        (SGLANG, OutputFormat("choice", ("a.", "b")), {"regex": r"(a\.|b)"}),
        (SGLANG, OutputFormat("grammar", "root ::= a"), {"ebnf": "root ::= a"}),
        (LLAMA_CPP, OutputFormat("choice", ('a"', "ü")), {"grammar": 'root ::= "a\\"" | "ü"'}),
        (LLAMA_CPP, OutputFormat("grammar", "root ::= a"), {"grammar": "root ::= a"}),
    ],
)
def test_a_format_is_told_as_the_kind_knows_it(kind: Kind, format: OutputFormat, fields: dict[str, Any]) -> None:
    assert asked(kind, format=format) == fields


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_schema_is_told_as_in_the_standard(kind: Kind) -> None:
    schema = {"name": "reply", "schema": SCHEMA}
    for strict, said in ((None, {}), (True, {"strict": True}), (False, {"strict": False})):
        told = {"type": "json_schema", "json_schema": schema | said}
        assert asked(kind, format=OutputFormat("json_schema", SCHEMA, strict=strict)) == {"response_format": told}
    assert asked(kind, format=OutputFormat("json_object")) == {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("kind", "type"), [(LLAMA_CPP, "regex"), (OPENAI, "regex"), (OTHER, "choice"), (OTHER, "grammar")]
)
def test_a_format_that_a_kind_does_not_know_is_refused_by_name(kind: Kind, type: Any) -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        asked(kind, format=OutputFormat(type, "a", f"guided_{type}"))
    assert caught.value.param == f"guided_{type}"


def test_only_tools_that_may_be_called_are_told() -> None:
    f, g = Tool("f", "Does f", SCHEMA, strict=True), Tool("g")
    told_f = {"name": "f", "description": "Does f", "parameters": SCHEMA, "strict": True}
    tools = Tools((f, g), "required", frozenset(["f"]), parallel=False)
    assert asked(VLLM, tools=tools) == {
        "tools": [{"type": "function", "function": told_f}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    assert asked(VLLM, tools=Tools((g,)))["tools"] == [{"type": "function", "function": {"name": "g"}}]
    assert asked(VLLM, tools=Tools((f, g), "none")) == {}


def test_the_end_of_a_reply_is_ignored_only_where_that_can_be_asked_for() -> None:
    assert asked(VLLM, ignore_eos=True) == {"ignore_eos": True}
    with pytest.raises(UnsupportedParameterError, match="ignore_eos"):
        asked(OTHER, ignore_eos=True)


def test_users_share_no_prefix_cache_of_vllm() -> None:
    salts = {body_of(ChatRequest(user, [], OWN), VLLM, "tiny")["cache_salt"] for user in ("ann", "bob", "ann")}
    assert len(salts) == 2
    assert "cache_salt" not in body_of(ChatRequest("ann", [], OWN), OTHER, "tiny")


def test_messages_have_the_form_of_chat_completions() -> None:
    messages: list[Message] = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "Hm",
            "tool_calls": [{"id": "call_1", "name": "f", "arguments": "{}"}],
        },
        {"role": "tool", "content": "7", "tool_call_id": "call_1"},
    ]
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "content": "7", "tool_call_id": "call_1"}
    assert render_messages(messages, OTHER) == [messages[0], answer, result]
    assert render_messages(messages, LLAMA_CPP)[1] == answer | {"reasoning_content": "Hm"}


@pytest.mark.parametrize(
    ("owner", "kind"), [("vllm", VLLM), ("SGLang", SGLANG), ("llamacpp", LLAMA_CPP), ("parley", PARLEY), ("me", OTHER)]
)
def test_a_server_tells_its_kind(owner: str, kind: Kind) -> None:
    assert kind_of(owner) is kind
