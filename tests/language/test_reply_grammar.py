# ruff: noqa: RUF001
from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import llguidance
import llguidance.hf
import pytest
from transformers import PreTrainedTokenizerBase

from models.chat_request import ChatRequest
from models.errors import UnsupportedParameterError
from models.language.replies import families
from models.language.replies.call_format import CallFormat
from models.language.replies.harmony import MARKERS
from models.language.replies.parser import Reasoning
from models.language.reply_format import ReplyFormat
from models.language.reply_grammar import Grammar, reply_grammar
from models.options import Options
from models.output_format import PLAIN_TEXT, OutputFormat
from models.tools import NO_TOOLS, Tool, Tools
from tests.support.chat_templates import CHATML, tokenizer_with
from tests.support.replies import THINK, TOOLS, parsed

JSON = OutputFormat("json_schema", {"type": "object"}, "text.format.schema")
SPECIAL = ["[TOOL_CALLS]", "[ARGS]", "<|tool_call>", "<tool_call|>", '<|"|>', "[THINK]", "[/THINK]", *MARKERS]
FORCED = replace(TOOLS, choice="required")
ONE = replace(FORCED, parallel=False)
STRICT = Tools((replace(TOOLS.tools[0], strict=True), TOOLS.tools[1]))

WIRE = {
    "hermes": (
        families.HERMES,
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    ),
    "qwen-coder": (
        families.QWEN_CODER,
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        "\n<tool_call>\n<function=time>\n</function>\n</tool_call>",
    ),
    "glm": (
        families.GLM,
        "<tool_call>weather\n<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>",
        "\n<tool_call>time\n</tool_call>",
    ),
    "mistral": (families.MISTRAL_NAMED, '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}', "[TOOL_CALLS]time[ARGS]{}"),
    "mistral-list": (
        families.MISTRAL_LIST,
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}',
        ', {"name": "time", "arguments": {}}',
    ),
    "llama": (
        families.JSON,
        '{"name": "weather", "parameters": {"city": "Rome"}}',
        '; {"name": "time", "parameters": {}}',
    ),
    "gemma": (
        families.GEMMA4,
        '<|tool_call>call:weather{"city": "Rome"}<tool_call|>',
        "<|tool_call>call:time{}<tool_call|>",
    ),
    "deepseek": (
        families.DEEPSEEK,
        '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>',
        "<｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
    ),
    "kimi": (
        families.KIMI,
        '<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|>',
        "<|tool_call_begin|>functions.time:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
    ),
    "minimax": (
        families.MINIMAX,
        '<minimax:tool_call><invoke name="weather"><parameter name="city">Rome</parameter></invoke>'
        "</minimax:tool_call>",
        '\n<minimax:tool_call><invoke name="time"></invoke></minimax:tool_call>',
    ),
}
TAILS = {"mistral-list": "]"}
every_format = pytest.mark.parametrize("name", WIRE)


@pytest.fixture(scope="module")
def wire_tokenizer() -> PreTrainedTokenizerBase:
    return tokenizer_with(CHATML, SPECIAL)


@pytest.fixture(scope="module")
def compiler(wire_tokenizer: PreTrainedTokenizerBase) -> Any:
    return llguidance.hf.from_tokenizer(wire_tokenizer)  # type: ignore[arg-type]


class Judge:
    """Says which replies the grammar of a request allows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, compiler: Any) -> None:
        self._tokenizer = tokenizer
        self._compiler = compiler

    def format(self, *calls: CallFormat, reasoning: Reasoning | None = None, harmony: bool = False) -> ReplyFormat:
        vocabulary = self._tokenizer.get_vocab()
        return ReplyFormat(
            harmony, reasoning, calls or (families.HERMES,), {text: vocabulary[text] for text in SPECIAL}
        )

    def allows(
        self, format: ReplyFormat, text: str, tools: Tools, output: OutputFormat = PLAIN_TEXT, thinking: bool = False
    ) -> bool:
        """Whether the text is a whole reply in the grammar."""
        grammar = grammar_of(format, tools, output, thinking)
        assert grammar
        assert not llguidance.LLMatcher.validate_grammar(grammar.lark, self._compiler)
        matcher = llguidance.LLMatcher(self._compiler, grammar.lark)
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return bool(matcher.consume_tokens(ids) and matcher.is_accepting())


@pytest.fixture
def judge(wire_tokenizer: PreTrainedTokenizerBase, compiler: Any) -> Judge:
    return Judge(wire_tokenizer, compiler)


def grammar_of(
    format: ReplyFormat, tools: Tools, output: OutputFormat = PLAIN_TEXT, thinking: bool = False
) -> Grammar | None:
    def lark_of(output: OutputFormat) -> str:
        return f"start: %json {json.dumps(output.value)}"

    return reply_grammar(format, ChatRequest("ann", [], Options(), tools, output), thinking, lark_of)


# Calls


@every_format
def test_a_forced_call_has_the_models_own_format(judge: Judge, name: str) -> None:
    call, first, second = WIRE[name]
    format, tail = judge.format(call), TAILS.get(name, "")
    assert judge.allows(format, first + tail, FORCED)
    assert judge.allows(format, first + second + tail, FORCED)
    assert not judge.allows(format, "Hello", FORCED)
    assert not judge.allows(format, "", FORCED)
    assert not judge.allows(format, first.replace("weather", "nothing") + tail, FORCED)
    assert not judge.allows(format, first.replace("city", "town") + tail, FORCED)


@every_format
def test_only_one_call_is_allowed_without_parallel_calls(judge: Judge, name: str) -> None:
    call, first, second = WIRE[name]
    format, tail = judge.format(call), TAILS.get(name, "")
    assert judge.allows(format, first + tail, ONE)
    assert not judge.allows(format, first + second + tail, ONE)


@every_format
def test_what_the_grammar_allows_is_parsed_as_calls(name: str) -> None:
    call, first, second = WIRE[name]
    parser = ReplyFormat(calls=(call,)).parser(TOOLS, "")
    kinds = [kind for kind, _ in parsed(parser, first + second + TAILS.get(name, ""))]
    assert kinds == ["call weather", "call time"]


def test_a_named_tool_is_the_only_one(judge: Judge) -> None:
    _, first, second = WIRE["hermes"]
    named = replace(FORCED, allowed=frozenset({"time"}))
    assert judge.allows(judge.format(), second.strip(), named)
    assert not judge.allows(judge.format(), first, named)


@every_format
def test_a_strict_tool_lets_text_free_and_holds_calls_to_the_schema(judge: Judge, name: str) -> None:
    call, first, second = WIRE[name]
    format, tail = judge.format(call), TAILS.get(name, "")
    text = "" if name == "llama" else "Look. "
    assert judge.allows(format, "Hello.\n\nYou", STRICT)
    assert judge.allows(format, text + first + tail, STRICT)
    assert judge.allows(format, text + first + second + tail, STRICT)
    assert not judge.allows(format, text + first.replace("city", "town") + tail, STRICT)
    assert not judge.allows(format, text + first.replace("weather", "nothing") + tail, STRICT)


@pytest.mark.parametrize("name", [name for name in WIRE if '"city": "Rome"' in WIRE[name][1]])
@pytest.mark.parametrize("tools", [FORCED, STRICT], ids=["forced", "strict"])
def test_a_call_has_no_endless_spaces(judge: Judge, name: str, tools: Tools) -> None:
    call, first, _ = WIRE[name]
    for spaces, allowed in ((10, True), (100, False)):
        text = first.replace('"city": "Rome"', '"city":' + " " * spaces + '"Rome"') + TAILS.get(name, "")
        assert judge.allows(judge.format(call), text, tools) == allowed


def test_a_schema_with_definitions_holds(judge: Judge) -> None:
    parameters = {
        "type": "object",
        "properties": {"where": {"$ref": "#/$defs/place"}, "unit": {"enum": ["C", "F"]}},
        "required": ["where", "unit"],
        "$defs": {"place": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
    }
    tools = Tools((Tool("f", None, parameters, strict=True),), "required")
    coder = judge.format(families.QWEN_CODER)
    call = "<tool_call>\n<function=f>\n<parameter=where>\n{}\n</parameter>\n<parameter=unit>\n{}\n</parameter>\n"
    end = "</function>\n</tool_call>"
    assert judge.allows(coder, call.format('{"x": 1}', "C") + end, tools)
    assert not judge.allows(coder, call.format('{"x": "1"}', "C") + end, tools)
    assert not judge.allows(coder, call.format('{"x": 1}', "K") + end, tools)
    hermes = '<tool_call>\n{"name": "f", "arguments": {"where": {"x": 1}, "unit": "F"}}\n</tool_call>'
    assert judge.allows(judge.format(), hermes, tools)
    assert not judge.allows(judge.format(), hermes.replace("1", "true"), tools)


def test_what_a_schema_cannot_say_is_ignored_unless_the_tool_is_strict(judge: Judge, compiler: Any) -> None:
    tool = Tool("f", None, {"type": "object", "properties": {"a": {"not": {"type": "string"}}}})
    assert judge.allows(
        judge.format(), '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', Tools((tool,), "required")
    )
    strict = grammar_of(judge.format(), Tools((replace(tool, strict=True),), "required"))
    assert strict
    assert llguidance.LLMatcher.validate_grammar(strict.lark, compiler)
    assert strict.param == "tools"


@pytest.mark.parametrize("tools", [NO_TOOLS, TOOLS, replace(STRICT, choice="none")], ids=["no-tools", "auto", "none"])
def test_a_free_reply_has_no_grammar(tools: Tools) -> None:
    assert grammar_of(ReplyFormat(), tools) is None


def test_a_strict_tool_is_refused_where_the_format_of_calls_cannot_be_constrained() -> None:
    format = ReplyFormat(template={"fields": {}})
    with pytest.raises(UnsupportedParameterError, match="set strict to false"):
        grammar_of(format, STRICT)
    assert grammar_of(format, FORCED)
    assert grammar_of(format, TOOLS) is None


# Formats and reasoning


@pytest.mark.parametrize(
    ("text", "thinking", "allowed"),
    [
        ('{"a": 1}', False, True),
        ('<think>\nHm {.\n</think>\n\n{"a": 1}', False, True),
        ("<think>\nHm.\n</think>\n\nHello", False, False),
        ("Hello", False, False),
        ('Hm.\n</think>\n\n{"a": 1}', True, True),
        ('{"a": 1}', True, False),
    ],
)
def test_a_format_comes_after_the_reasoning(judge: Judge, text: str, thinking: bool, allowed: bool) -> None:
    assert judge.allows(judge.format(reasoning=THINK), text, NO_TOOLS, JSON, thinking) == allowed


def test_reasoning_between_special_tokens_comes_before_calls(judge: Judge) -> None:
    format = judge.format(families.MISTRAL_NAMED, reasoning=Reasoning("[THINK]", "[/THINK]"))
    call = WIRE["mistral"][1]
    assert judge.allows(format, f"[THINK]Hm.[/THINK]{call}", FORCED)
    assert judge.allows(format, call, FORCED)
    assert not judge.allows(format, f"Hm.{call}", FORCED)


def test_a_format_allows_calls_of_tools_too(judge: Judge) -> None:
    format = judge.format(reasoning=THINK)
    for text in ('{"a": 1}', WIRE["hermes"][1], f"<think>Hm.</think>\n\n{WIRE['hermes'][1]}"):
        assert judge.allows(format, text, TOOLS, JSON)
    assert not judge.allows(format, "Hello", TOOLS, JSON)


def test_the_grammar_names_the_parameter_that_it_comes_from() -> None:
    for tools, output, param in [
        (NO_TOOLS, JSON, JSON.param),
        (TOOLS, JSON, JSON.param),
        (FORCED, PLAIN_TEXT, "tools"),
    ]:
        grammar = grammar_of(ReplyFormat(), tools, output)
        assert grammar
        assert grammar.param == param


# Harmony

ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}'


@pytest.mark.parametrize(
    ("text", "tools", "output", "allowed"),
    [
        (ANALYSIS + CALL, FORCED, PLAIN_TEXT, True),
        (CALL, FORCED, PLAIN_TEXT, True),
        (ANALYSIS + CALL.replace("city", "town"), FORCED, PLAIN_TEXT, False),
        (f"{ANALYSIS}<|channel|>final<|message|>Hi", FORCED, PLAIN_TEXT, False),
        (f"{ANALYSIS}<|channel|>final<|message|>Hi", STRICT, PLAIN_TEXT, True),
        (ANALYSIS + CALL, STRICT, PLAIN_TEXT, True),
        (ANALYSIS + CALL.replace("city", "town"), STRICT, PLAIN_TEXT, False),
        (f'{ANALYSIS}<|channel|>final<|message|>{{"a": 1}}', NO_TOOLS, JSON, True),
        (f"{ANALYSIS}<|channel|>final<|message|>Hi", NO_TOOLS, JSON, False),
    ],
)
def test_the_grammar_of_harmony(judge: Judge, text: str, tools: Tools, output: OutputFormat, allowed: bool) -> None:
    assert judge.allows(judge.format(harmony=True), text, tools, output) == allowed
