from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from models.language.detokenizer import Detokenizer
from models.language.events import Done, Event, ReasoningDelta, TextDelta
from models.language.reply_events import ReplyEvents
from models.language.reply_format import ReplyFormat
from models.messages import FinishReason
from models.tools import NO_TOOLS, Tools
from tests.support.chat_templates import FAMILIES
from tests.support.replies import TOOLS, items_of


def events_of(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    reason: FinishReason,
    stop: tuple[str, ...] = (),
    tools: Tools = NO_TOOLS,
) -> list[Event]:
    """The events that come of the tokens of a text; `reason` comes with the last token."""
    return pushed(tokenizer, text, reason, stop, tools)[0]


def pushed(
    tokenizer: PreTrainedTokenizerBase, text: str, reason: FinishReason, stop: tuple[str, ...], tools: Tools
) -> tuple[list[Event], ReplyEvents]:
    format = ReplyFormat.of(tokenizer, knows_tools=bool(tools.tools))
    reply = ReplyEvents(Detokenizer(tokenizer, format.special.values()), format.parser(tools, ""), stop)
    *ids, last = tokenizer.encode(text, add_special_tokens=False)
    events: list[Event] = []
    for token_id in ids:
        events += reply.push(token_id, None)
        if events and isinstance(events[-1], Done):
            return events, reply
    return [*events, *reply.push(last, reason)], reply


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


# Text


@pytest.mark.parametrize(
    ("text", "reason", "stop", "expected"),
    [
        pytest.param("ab", "max_output_tokens", (), ("ab", "max_output_tokens"), id="cut"),
        pytest.param("ab<|end|>", "stop", (), ("ab", "stop"), id="stop-token"),
        pytest.param(" a\n<|end|>", "stop", (), (" a\n", "stop"), id="white-space"),
        pytest.param("a\0b", "context_length", (), ("a\ufffdb", "context_length"), id="nul"),
        pytest.param("aENDb", "max_output_tokens", ("END",), ("a", "stop"), id="stop-string"),
        pytest.param("aEN", "max_output_tokens", ("END",), ("aEN", "max_output_tokens"), id="half-of-one"),
        pytest.param("aEN<|end|>", "stop", ("END",), ("aEN", "stop"), id="half-of-one-and-stop-token"),
        pytest.param("aEND", "max_output_tokens", ("END",), ("a", "stop"), id="stop-string-at-the-cut"),
    ],
)
def test_the_text_of_a_reply_has_no_stop_token_stop_string_or_nul(
    tokenizer: PreTrainedTokenizerBase, text: str, reason: FinishReason, stop: tuple[str, ...], expected: Any
) -> None:
    *deltas, last = events_of(tokenizer, text, reason, stop)
    assert (text_of(deltas), last) == (expected[0], Done(expected[1]))


def test_text_comes_with_its_token(tokenizer: PreTrainedTokenizerBase) -> None:
    deltas = [TextDelta("a"), TextDelta(" "), TextDelta("b")]
    assert events_of(tokenizer, "a b", "max_output_tokens") == [*deltas, Done("max_output_tokens")]


@pytest.mark.parametrize("reason", ["max_output_tokens", "context_length"])
def test_half_a_character_at_a_cut_is_left_out(tokenizer: PreTrainedTokenizerBase, reason: FinishReason) -> None:
    reply = ReplyEvents(Detokenizer(tokenizer), ReplyFormat().parser(NO_TOOLS, ""), ())
    first, second, _ = tokenizer.encode("州")
    assert [reply.push(first, None), reply.push(second, reason)] == [[], [Done(reason)]]


def test_half_a_character_before_a_stop_token_becomes_a_replacement_character(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    reply = ReplyEvents(Detokenizer(tokenizer), ReplyFormat().parser(NO_TOOLS, ""), ())
    first, second, _ = tokenizer.encode("州")
    (end,) = tokenizer.encode("<|end|>")
    events = [reply.push(first, None), reply.push(second, None), reply.push(end, "stop")]
    assert events == [[], [], [TextDelta("\ufffd"), Done("stop")]]


# Parts


def test_stop_strings_are_looked_for_in_the_answer_only() -> None:
    tokenizer = FAMILIES["qwen"].tokenizer()
    call = '<tool_call>{"name": "weather", "arguments": {"city": "END"}}</tool_call>'
    events = events_of(tokenizer, f"<think>END</think>a EN{call}b ENDc", "stop", ("END",), TOOLS)
    expected = [("reasoning", "END"), ("text", "a EN"), ("call weather", '{"city": "END"}'), ("text", "b ")]
    assert items_of(events) == expected
    assert events[-1] == Done("stop")


def test_a_stop_string_does_not_reach_from_one_text_to_the_next() -> None:
    tokenizer = FAMILIES["qwen"].tokenizer()
    call = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    events = events_of(tokenizer, f"aEN{call}Db", "max_output_tokens", ("END",), TOOLS)
    assert items_of(events) == [("text", "aEN"), ("call time", "{}"), ("text", "Db")]


def test_special_tokens_mark_the_parts_and_never_become_text() -> None:
    tokenizer = FAMILIES["mistral"].tokenizer()
    text = '[THINK]Hm[/THINK]Hi[INST][TOOL_CALLS][{"name": "time", "arguments": {}}]</s>'
    assert items_of(events_of(tokenizer, text, "stop", tools=TOOLS)) == [
        ("reasoning", "Hm"),
        ("text", "Hi"),
        ("call time", "{}"),
    ]


def test_a_reply_in_the_harmony_format_ends_with_its_call() -> None:
    tokenizer = FAMILIES["gpt-oss"].tokenizer()
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Rome"}<|call|>'
    )
    events = events_of(tokenizer, text, "stop", tools=TOOLS)
    assert items_of(events) == [("reasoning", "Hm."), ("call weather", '{"city": "Rome"}')]


def test_a_reply_ends_after_its_only_call() -> None:
    tokenizer = FAMILIES["qwen"].tokenizer()
    call = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    events = events_of(tokenizer, call + call, "max_output_tokens", tools=replace(TOOLS, parallel=False))
    assert (items_of(events), events[-1]) == ([("call time", "{}")], Done("stop"))


@pytest.mark.parametrize(
    ("family", "text", "tokens"),
    [
        ("qwen", "<think>abc</think>\n\nxyz", 5),
        ("qwen", "xyz", 0),
        ("qwen", "<think>abc", 4),
        ("mistral", "[THINK]abc[/THINK]x", 5),
        ("gpt-oss", "<|channel|>analysis<|message|>abc<|end|><|start|>assistant<|channel|>final<|message|>x", 5),
    ],
)
def test_the_tokens_of_the_reasoning_are_counted(family: str, text: str, tokens: int) -> None:
    _, reply = pushed(FAMILIES[family].tokenizer(), text, "max_output_tokens", (), TOOLS)
    assert reply.reasoning_tokens == tokens


def test_a_cut_within_the_reasoning_leaves_no_half_character() -> None:
    tokenizer = FAMILIES["qwen"].tokenizer()
    format = ReplyFormat.of(tokenizer, knows_tools=True)
    reply = ReplyEvents(Detokenizer(tokenizer), format.parser(TOOLS, "<think>\n"), ())
    first, second, _ = tokenizer.encode("州")
    (letter,) = tokenizer.encode("a")
    events = [*reply.push(letter, None), *reply.push(first, None), *reply.push(second, "max_output_tokens")]
    assert events == [ReasoningDelta("a"), Done("max_output_tokens")]
