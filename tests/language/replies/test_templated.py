from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from models.language.replies.templated import TemplatedReply
from models.tools import NO_TOOLS, Tools
from tests.support.replies import TOOLS, Item, parsed

TEMPLATE: dict[str, Any] = {
    "start_anchor": "<start>",
    "fields": {
        "thinking": {"open": "(think)", "close": "(/think)"},
        "tool_calls": {
            "open": "(call)",
            "close": "(/call)",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}
CALL = '(call){"name": "weather", "arguments": {"city": "Rome", "days": "3"}}(/call)'


def parts(text: str, tools: Tools = TOOLS, prompt: str = "<start>") -> list[Item]:
    whole = parsed(TemplatedReply(TEMPLATE, prompt, tools), [text])
    assert parsed(TemplatedReply(TEMPLATE, prompt, tools), text) == whole
    return whole


def test_the_tokenizers_own_template_tells_the_parts_apart() -> None:
    assert parts(f"(think)Hm.\n(/think)\n\nLook.\n{CALL}") == [
        ("reasoning", "Hm."),
        ("text", "Look."),
        ("call weather", '{"city": "Rome", "days": 3}'),
    ]


def test_the_prompt_may_have_opened_the_reasoning() -> None:
    parser = TemplatedReply(TEMPLATE, "<start>(think)\n", TOOLS)
    assert parser.thinking
    assert parsed(parser, "Hm.(/think)Hi") == [("reasoning", "Hm."), ("text", "Hi")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param('Hi (call){"na', [("text", 'Hi {"na')], id="cut"),
        pytest.param("Hi (call)nothing(/call) there", [("text", "Hi nothing there")], id="no-json"),
    ],
)
def test_a_call_that_cannot_be_read_is_text(text: str, expected: list[Item]) -> None:
    assert parts(text) == expected


@pytest.mark.parametrize("tools", [NO_TOOLS, replace(TOOLS, choice="none")], ids=["no-tools", "none"])
def test_without_callable_tools_calls_are_text(tools: Tools) -> None:
    assert parts(CALL, tools) == [("text", CALL)]


def test_the_reply_ends_after_the_only_call() -> None:
    parser = TemplatedReply(TEMPLATE, "<start>", replace(TOOLS, parallel=False))
    assert [kind for kind, _ in parsed(parser, CALL + CALL)] == ["call weather"]
    assert parser.ended
