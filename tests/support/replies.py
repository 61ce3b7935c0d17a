# ruff: noqa: RUF001
"""Raw replies in the formats of families of models, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from models.language.events import ArgumentsDelta, Done, Event, ReasoningDelta, ToolCallStarted
from models.language.replies import families
from models.language.replies.call_format import CallFormat
from models.language.replies.harmony import HarmonyReply
from models.language.replies.parser import MarkedReply, Reasoning, ReplyParser
from models.tools import Tool, Tools

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "where": {"type": "object"},
        "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = Tools((Tool("weather", "The weather of a city", PARAMETERS), Tool("time")))
THINK = Reasoning("<think>", "</think>")

Item = tuple[str, str]  # "reasoning", "text", or "call" and the name; and the text of all deltas


def items_of(events: Iterable[Event]) -> list[Item]:
    """The parts of a reply, each with its deltas joined."""
    items: list[Item] = []
    open_kind = ""
    for event in events:
        if isinstance(event, Done):
            continue
        if isinstance(event, ToolCallStarted):
            items.append((f"call {event.name}", ""))
            open_kind = "arguments"
            continue
        assert event.text, "no delta is empty"
        kind = "arguments" if isinstance(event, ArgumentsDelta) else "text"
        kind = "reasoning" if isinstance(event, ReasoningDelta) else kind
        if kind == open_kind:
            items[-1] = (items[-1][0], items[-1][1] + event.text)
        else:
            assert kind != "arguments", "arguments belong to a call"
            items.append((kind, event.text))
            open_kind = kind
    return items


def parsed(parser: ReplyParser, pieces: Iterable[str]) -> list[Item]:
    """The parts that a parser makes of pieces of text."""
    events = [event for piece in pieces for event in parser.push(piece)]
    return items_of([*events, *parser.end()])


class RawReply(NamedTuple):
    """A raw reply, the parts in it, and how its parser is made."""

    make: Callable[[Tools], ReplyParser]
    text: str
    items: list[Item]


def marked(
    *formats: CallFormat, reasoning: Reasoning | None = THINK, special: str = "", thinking: bool = False
) -> Callable[[Tools], ReplyParser]:
    """A maker of parsers; `special` has the special tokens, with spaces between them."""
    return lambda tools: MarkedReply(reasoning, formats, tools, frozenset(special.split()), thinking)


GEMMA_THOUGHT = Reasoning("<|channel>thought", "<channel|>")
MISTRAL_THOUGHT = Reasoning("[THINK]", "[/THINK]")
ROME = ("call weather", '{"city": "Rome"}')
ROME_DAYS = ("call weather", '{"city": "Rome", "days": 3}')
NOW = ("call time", "{}")
MISTRAL_TOKENS = "[TOOL_CALLS] [ARGS] [CALL_ID] [THINK] [/THINK]"
GEMMA_TOKENS = '<|tool_call> <tool_call|> <|"|> <|channel> <channel|>'
HARMONY_END = "<|end|><|start|>assistant"

REPLIES: dict[str, RawReply] = {
    "plain": RawReply(marked(reasoning=None), " Hello.\n\nYou\n", [("text", " Hello.\n\nYou\n")]),
    "qwen": RawReply(
        marked(families.HERMES),
        "<think>\nWhere? Rome.\n\nSo:\n</think>\n\nLet me see.\n\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>\n',
        [("reasoning", "Where? Rome.\n\nSo:"), ("text", "Let me see."), ROME, NOW],
    ),
    "qwen-without-calls": RawReply(
        marked(families.HERMES),
        "<think>\n\n</think>\n\nUse <think> and </think>, or <tool_call>.\n",
        [("text", "Use <think> and </think>, or <tool_call>.\n")],
    ),
    "deepseek-r1": RawReply(
        marked(families.DEEPSEEK, thinking=True),
        "Hm.\n</think>\n\nHello.",
        [("reasoning", "Hm."), ("text", "Hello.")],
    ),
    "repeated-opening": RawReply(
        marked(families.HERMES, thinking=True), "<think>\nHm.</think>Hi", [("reasoning", "Hm."), ("text", "Hi")]
    ),
    "escapes": RawReply(
        marked(families.HERMES),
        '<tool_call>{"arguments": {"city": "R\\"o\\\\me</tool_call>}{"}, "name": "weather"}</tool_call>Bye',
        [("call weather", '{"city": "R\\"o\\\\me</tool_call>}{"}'), ("text", "Bye")],
    ),
    "odd-json": RawReply(
        marked(families.HERMES),
        '<tool_call>[{"name": "time"}, {"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}]</tool_call>'
        '<tool_call>{"type": "function", "function": {"name": "time", "arguments": null}}</tool_call>',
        [NOW, ROME, NOW],
    ),
    "no-json": RawReply(
        marked(families.HERMES),
        '<tool_call>{"name": "weather", "arguments": {\'city\': \'Rome\'}}</tool_call>Hi',
        [("call weather", "{'city': 'Rome'}}"), ("text", "Hi")],
    ),
    "qwen-coder": RawReply(
        marked(families.QWEN_CODER, families.HERMES),
        'Look:\n<tool_call>\n<function=weather>\n<parameter=city>\nRo"m\ne\n</parameter>\n<parameter=days>\n3\n'
        '</parameter>\n<parameter=where>\n{"x": [1]}\n</parameter>\n<parameter=unit>\nnull\n</parameter>\n'
        "</function>\n</tool_call>\n<tool_call>\n<function=time>\n</function>\n</tool_call>",
        [
            ("text", "Look:"),
            ("call weather", '{"city": "Ro\\"m\\ne", "days": 3, "where": {"x": [1]}, "unit": null}'),
            NOW,
        ],
    ),
    "qwen-coder-forgets": RawReply(
        marked(families.QWEN_CODER, families.HERMES),
        "<function=weather>\n<parameter=city>\nRome\n<parameter=days>\n3\n</function>\n</tool_call>\nHi",
        [ROME_DAYS, ("text", "Hi")],
    ),
    "qwen-coder-json": RawReply(
        marked(families.QWEN_CODER, families.HERMES),
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        [ROME],
    ),
    "glm": RawReply(
        marked(families.GLM),
        "\n<think>Hm.</think>\nLook.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>time\n</tool_call>",
        [("reasoning", "Hm."), ("text", "Look."), ROME_DAYS, NOW],
    ),
    "mistral-list": RawReply(
        marked(families.MISTRAL_LIST, families.MISTRAL_NAMED, reasoning=MISTRAL_THOUGHT, special=MISTRAL_TOKENS),
        '[THINK]Hm.[/THINK]Look. [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "1"}, '
        '{"name": "time", "arguments": {}}]',
        [("reasoning", "Hm."), ("text", "Look."), ROME, NOW],
    ),
    "mistral": RawReply(
        marked(families.MISTRAL_NAMED, families.MISTRAL_LIST, reasoning=MISTRAL_THOUGHT, special=MISTRAL_TOKENS),
        'Look.[THINK]Hm.[/THINK][TOOL_CALLS]weather[CALL_ID]a1[ARGS]{"city": "Rome"}[TOOL_CALLS]time[ARGS]{}',
        [("text", "Look."), ("reasoning", "Hm."), ROME, NOW],
    ),
    "llama": RawReply(
        marked(families.JSON, families.PYTHON_TAG, reasoning=None),
        ' {"name": "weather", "parameters": {"city": "Rome"}}; {"name": "time", "parameters": {}}',
        [ROME, NOW],
    ),
    "llama-tag": RawReply(
        marked(families.JSON, families.PYTHON_TAG, reasoning=None, special="<|python_tag|>"),
        'Look.<|python_tag|>{"type": "function", "name": "weather", "parameters": {"city": "Rome"}}',
        [("text", "Look."), ROME],
    ),
    "llama-json-answer": RawReply(
        marked(families.JSON, reasoning=None),
        '{"name": "Rome", "parameters": {"size": 3}}\n',
        [("text", '{"name": "Rome", "parameters": {"size": 3}}\n')],
    ),
    "llama-call-and-answer": RawReply(
        marked(families.JSON, reasoning=None),
        '{"name": "time", "parameters": {}}; {"name": "Rome"}',
        [NOW, ("text", '; {"name": "Rome"}')],
    ),
    "gemma": RawReply(
        marked(families.GEMMA4, reasoning=GEMMA_THOUGHT, special=GEMMA_TOKENS),
        '<|channel>thought\nHm.\n<channel|>Look.<|tool_call>call:weather{city:<|"|>Ro"m\ne<|"|>,days:3,where:'
        '{x:[1,true,{}],"y z":"w"},unit:meters}<tool_call|><|tool_call>call:time{}<tool_call|><|tool_response>',
        [
            ("reasoning", "Hm."),
            ("text", "Look."),
            (
                "call weather",
                '{"city": "Ro\\"m\\ne", "days": 3, "where": {"x": [1, true, {}], "y z": "w"}, "unit": "meters"}',
            ),
            NOW,
        ],
    ),
    "function-gemma": RawReply(
        marked(families.FUNCTION_GEMMA, reasoning=None),
        "<start_function_call>call:weather{city:<escape>Rome<escape>}<end_function_call>",
        [ROME],
    ),
    "deepseek": RawReply(
        marked(families.DEEPSEEK),
        '</think>Look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome"}'
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [("text", "</think>Look."), ROME, NOW],
    ),
    "deepseek-v3": RawReply(
        marked(families.DEEPSEEK),
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Rome"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [ROME, NOW],
    ),
    "deepseek-xml": RawReply(
        marked(families.DEEPSEEK_XML),
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Rome'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="time">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        [ROME_DAYS, NOW],
    ),
    "kimi": RawReply(
        marked(families.KIMI),
        "Look.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Rome"}<|tool_call_end|><|tool_call_begin|>functions.time:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        [("text", "Look."), ROME, NOW],
    ),
    "minimax": RawReply(
        marked(families.MINIMAX),
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Rome</parameter>\n</invoke>\n'
        '<invoke name="time">\n</invoke>\n</minimax:tool_call>\nHi',
        [ROME, NOW, ("text", "Hi")],
    ),
    "phi": RawReply(
        marked(families.PHI, special="<|tool_call|> <|/tool_call|>"),
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome"}}]<|/tool_call|>',
        [ROME],
    ),
    "gpt-oss": RawReply(
        HarmonyReply,
        f"<|channel|>analysis<|message|>Hm.{HARMONY_END}<|channel|>analysis<|message|>So.{HARMONY_END}"
        f"<|channel|>commentary<|message|>Look.{HARMONY_END}<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Rome"}<|call|>',
        [("reasoning", "Hm.\n\nSo."), ("text", "Look."), ROME],
    ),
    "gpt-oss-role-first": RawReply(
        HarmonyReply, ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}', [ROME]
    ),
    "gpt-oss-answer": RawReply(
        HarmonyReply,
        f"<|channel|>analysis<|message|>The user says hi.{HARMONY_END}<|channel|>final<|message|>Hello!<|return|>",
        [("reasoning", "The user says hi."), ("text", "Hello!")],
    ),
    "gpt-oss-without-header": RawReply(HarmonyReply, "Hello!", [("text", "Hello!")]),
}
