# ruff: noqa: RUF001
from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies

from models.language.events import Event
from models.language.replies import families
from models.language.replies.call_format import ToolsByName
from models.language.replies.harmony import HarmonyReply
from models.language.replies.json_calls import JSONCalls
from models.language.replies.parser import MarkedReply, ReplyParser
from models.language.replies.parts import Parts
from models.language.replies.source import Reader, Source
from models.tools import Tool, Tools
from tests.support.replies import NOW, REPLIES, THINK, TOOLS, Item, RawReply, items_of, marked, parsed

every_reply = pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
NOT_CALLABLE = replace(TOOLS, choice="none")
FRAGMENTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "weather", ">", "<parameter=city>", "</"),
    *("parameter>", "</function>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[TOOL_CALLS]", "[ARGS]"),
    *("{", "}", "[", "]", '"', ":", ",", '"name"', '"arguments"', '"parameters"', '{"name": "weather", "arguments": '),
    *("\\", "\\u00", "null", "1.5e", "'", " ", "\n\n", "é", "😀", "\0", "x"),
    *("<|channel|>", "analysis", "final", "commentary to=functions.weather", "<|message|>", "<|end|>", "<|start|>"),
    *("<|tool_call>", "<tool_call|>", "call:weather{", '<|"|>', "<|channel>thought", "<channel|>", "<|python_tag|>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "[THINK]", "[/THINK]"),
]


def cut(text: str, places: list[int]) -> list[str]:
    """The text in pieces, cut at some places."""
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


places = strategies.lists(strategies.integers(0, 2000), max_size=12)


@every_reply
def test_a_reply_is_told_apart_into_its_parts(reply: RawReply) -> None:
    assert parsed(reply.make(TOOLS), [reply.text]) == reply.items


@every_reply
def test_a_reply_in_single_characters_has_the_same_parts(reply: RawReply) -> None:
    assert parsed(reply.make(TOOLS), reply.text) == reply.items


@given(strategies.sampled_from([*REPLIES.values()]), places)
def test_any_split_of_a_reply_gives_the_same_parts(reply: RawReply, places: list[int]) -> None:
    assert parsed(reply.make(TOOLS), cut(reply.text, places)) == reply.items


@settings(max_examples=400)
@given(strategies.sampled_from([*REPLIES.values()]), strategies.lists(strategies.sampled_from(FRAGMENTS)), places)
def test_any_split_of_any_text_gives_the_same_parts(reply: RawReply, fragments: list[str], places: list[int]) -> None:
    text = "".join(fragments)
    assert parsed(reply.make(TOOLS), cut(text, places)) == parsed(reply.make(TOOLS), [text])


@every_reply
def test_what_was_said_is_never_taken_back(reply: RawReply) -> None:
    parser, events = reply.make(TOOLS), list[Event]()
    for character in reply.text:
        events += parser.push(character)
        so_far = items_of(events)
        assert so_far[:-1] == reply.items[: len(so_far)][:-1]
        if so_far:
            kind, text = reply.items[len(so_far) - 1]
            assert so_far[-1][0] == kind
            assert text.startswith(so_far[-1][1])


@every_reply
def test_a_call_in_a_reply_that_is_cut_stays_a_call(reply: RawReply) -> None:
    for end in range(len(reply.text)):
        parser = reply.make(TOOLS)
        events = parser.push(reply.text[:end])
        said, whole = items_of(events), items_of([*events, *parser.end()])
        assert [kind for kind, _ in whole[: len(said)]] == [kind for kind, _ in said]
        for (_, before), (_, after) in zip(said, whole, strict=False):
            assert after.startswith(before)


@every_reply
def test_deltas_come_as_soon_as_they_are_certain(reply: RawReply) -> None:
    parser = reply.make(TOOLS)
    events = [event for piece in reply.text for event in parser.push(piece)]
    late = items_of(parser.end())
    assert events
    assert all(len(text) < 20 for _, text in late)


# Calls


def test_arguments_stream_while_the_model_writes_them() -> None:
    for name in ("qwen", "qwen-coder", "glm", "mistral", "gemma", "deepseek", "kimi", "gpt-oss", "llama"):
        reply = REPLIES[name]
        parser = reply.make(TOOLS)
        before = reply.text[: reply.text.rindex("Ro") + 2]
        *_, (kind, arguments) = items_of(event for piece in before for event in parser.push(piece))
        assert (kind, arguments) == ("call weather", '{"city": "Ro'), name


@every_reply
def test_without_callable_tools_all_is_text_or_reasoning(reply: RawReply) -> None:
    for tools in (Tools(), NOT_CALLABLE):
        assert {kind for kind, _ in parsed(reply.make(tools), [reply.text])} <= {"text", "reasoning"}


def test_the_text_of_a_call_is_kept_without_callable_tools() -> None:
    text = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert parsed(marked(families.HERMES)(NOT_CALLABLE), [text]) == [("text", text)]


def test_an_unknown_name_is_a_call_where_a_marker_says_so() -> None:
    text = '<tool_call>{"name": "nothing", "arguments": {}}</tool_call>'
    assert parsed(marked(families.HERMES)(TOOLS), [text]) == [("call nothing", "{}")]


def test_an_unknown_name_is_text_where_no_marker_says_that_it_is_a_call() -> None:
    text = '{"name": "nothing", "parameters": {}}'
    assert parsed(marked(families.JSON)(TOOLS), [text]) == [("text", text)]


@pytest.mark.parametrize("name", ["qwen", "qwen-coder", "mistral", "mistral-list", "llama", "gemma", "minimax"])
def test_a_reply_ends_after_the_only_call_that_it_may_have(name: str) -> None:
    reply = REPLIES[name]
    parser = reply.make(replace(TOOLS, parallel=False))
    items = parsed(parser, reply.text)
    assert parser.ended
    assert [kind for kind, _ in items if kind.startswith("call")] == ["call weather"]
    assert items == reply.items[: len(items)]
    assert parser.push("more") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tool_call>", [("text", "<tool_call>")]),
        ('<tool_call>{"na', [("text", '<tool_call>{"na')]),
        ('<tool_call>{"name": "tim', [("text", '<tool_call>{"name": "tim')]),
        ('<tool_call>{"name": "time"', [("call time", "")]),
        ('<tool_call>{"name": "time", "argu', [("call time", "")]),
        ('<tool_call>{"name": "time", "arguments": {"a', [("call time", '{"a')]),
        ("a < b <tool", [("text", "a < b <tool")]),
        ("<tool_call> is a marker", [("text", "<tool_call> is a marker")]),
        ("<tool_call>{}</tool_call>", [("text", "<tool_call>{}</tool_call>")]),
        ('<tool_call>{"city": "Rome"}</tool_call>', [("text", '<tool_call>{"city": "Rome"}</tool_call>')]),
        (
            '<tool_call>{"name": "time", "arguments": {}}, {"city": 1}',
            [NOW, ("text", ', {"city": 1}')],
        ),
        ("Hi </tool_call>", [("text", "Hi </tool_call>")]),
    ],
)
def test_a_marker_that_never_became_a_call_is_text(text: str, expected: list[Item]) -> None:
    assert parsed(marked(families.HERMES)(TOOLS), text) == expected


# Reasoning


def test_reasoning_that_never_ends_is_reasoning() -> None:
    assert parsed(marked()(TOOLS), "<think>Hm. <tool_call>{") == [("reasoning", "Hm. <tool_call>{")]


def test_reasoning_may_come_again_after_a_call() -> None:
    text = '<think>a</think><tool_call>{"name": "time"}</tool_call>\n<think>b</think>c <think>d'
    expected = [("reasoning", "a"), NOW, ("reasoning", "b"), ("text", "c <think>d")]
    assert parsed(marked(families.HERMES)(TOOLS), text) == expected


def test_a_special_token_that_begins_a_call_ends_the_reasoning() -> None:
    parser = marked(families.KIMI, special="<|tool_call_begin|>")(TOOLS)
    text = "<think>a<|tool_call_begin|>functions.time:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    assert parsed(parser, text) == [("reasoning", "a"), NOW]


def test_it_is_known_when_the_model_thinks() -> None:
    parser = marked(families.HERMES)(TOOLS)
    thinking = []
    for piece in ("<think>", "Hm", "</think>", "\n\n", "Hi"):
        parser.push(piece)
        thinking.append(parser.thinking)
    assert thinking == [True, True, False, False, False]


# Special tokens


def test_special_tokens_never_become_text() -> None:
    parser = marked(families.MISTRAL_NAMED, special="[TOOL_CALLS] [ARGS] [/THINK]")(TOOLS)
    assert parsed(parser, "a[ARGS]b[/THINK][TOOL_CALLS] c") == [("text", "ab c")]


@every_reply
def test_a_zero_byte_becomes_a_replacement_character(reply: RawReply) -> None:
    assert "\0" not in "".join(text for _, text in parsed(reply.make(TOOLS), f"a\0{reply.text}\0"))


# Errors


class Broken(JSONCalls):
    """A format that fails in the middle of a call."""

    def read(self, opener: str, source: Source, parts: Parts, tools: ToolsByName) -> Reader[bool]:
        yield from source.matches("{")
        raise RuntimeError("a bug")


def test_an_error_in_a_format_makes_the_rest_text() -> None:
    parser = MarkedReply(THINK, [Broken(("<tool_call>",))], TOOLS)
    assert parsed(parser, 'Hi <tool_call>{"name": <tool_call>') == [("text", 'Hi {"name": <tool_call>')]


def test_too_deep_arguments_become_no_error() -> None:
    deep = "<|tool_call>call:weather{where:" + "[" * 5000
    items = parsed(marked(families.GEMMA4)(TOOLS), [deep])
    assert items[0][0] == "call weather"


# Typed arguments


@pytest.mark.parametrize(
    ("schema", "raw", "expected"),
    [
        ({"type": "string"}, "3", "3"),
        ({"type": "string"}, ' a "b"\n', ' a "b"\n'),
        ({"type": "integer"}, "3", 3),
        ({"type": "integer"}, "3.0", 3),
        ({"type": "integer"}, "three", "three"),
        ({"type": "number"}, "3", 3),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "null"]}, "none", "none"),
        ({"type": "array"}, "[1, 2", "[1, 2"),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"$ref": "#/$defs/point"}, '{"x": 1}', {"x": 1}),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({}, "3", 3),
        ({}, "Rome", "Rome"),
        ({"type": "number"}, "NaN", "NaN"),
    ],
)
def test_a_tagged_argument_has_the_type_of_its_schema(schema: object, raw: str, expected: object) -> None:
    parameters = {"type": "object", "properties": {"a": schema}, "$defs": {"point": {"type": "object"}}}
    tools = Tools((Tool("f", None, parameters),))
    text = f"<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{raw}</arg_value>\n</tool_call>"
    ((_, arguments),) = parsed(marked(families.GLM)(tools), text)
    assert json.loads(arguments) == {"a": expected}


@given(strategies.text(strategies.characters(exclude_categories=["Cs"], exclude_characters="\0<")))
def test_any_text_is_a_tagged_argument(value: str) -> None:
    text = f"<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    ((_, arguments),) = parsed(marked(families.GLM)(TOOLS), text)
    assert json.loads(arguments) == {"city": value}


json_values = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.text(max_size=6),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=4), inner),
    max_leaves=8,
)


@given(strategies.dictionaries(strategies.text(max_size=4), json_values), places, strategies.sampled_from([None, 2]))
def test_arguments_in_json_stay_as_they_were_written(
    value: dict[str, object], places: list[int], indent: int | None
) -> None:
    written = json.dumps(value, indent=indent)
    for make, text in [
        (marked(families.HERMES), f'<tool_call>\n{{"name": "weather", "arguments": {written}}}\n</tool_call>'),
        (marked(families.MISTRAL_NAMED), f"[TOOL_CALLS]weather[ARGS]{written}"),
        (marked(families.JSON), f'{{"name": "weather", "parameters": {written}}}'),
        (HarmonyReply, f"<|channel|>commentary to=functions.weather<|message|>{written}<|call|>"),
    ]:
        parser: ReplyParser = make(TOOLS)
        assert parsed(parser, cut(text, places)) == [("call weather", written)]
