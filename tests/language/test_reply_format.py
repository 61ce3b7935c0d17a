from __future__ import annotations

from typing import Any

import pytest

from models.language.replies import families
from models.language.replies.call_format import CallFormat
from models.language.replies.harmony import HarmonyReply
from models.language.replies.parser import MarkedReply, Reasoning
from models.language.replies.templated import TemplatedReply
from models.language.reply_format import ReplyFormat
from tests.support.chat_templates import CHATML, FAMILIES, HARMONY_TOKENS, tokenizer_with
from tests.support.replies import TOOLS, parsed
from tests.support.tiny import tiny_tokenizer

THINK = Reasoning("<think>", "</think>")


def found(family: str) -> ReplyFormat:
    return ReplyFormat.of(FAMILIES[family].tokenizer(), knows_tools=True)


@pytest.mark.parametrize(
    ("family", "reasoning", "calls"),
    [
        ("qwen", THINK, families.HERMES),
        ("qwen-coder", None, families.QWEN_CODER),
        ("llama", None, families.JSON),
        ("mistral", Reasoning("[THINK]", "[/THINK]"), families.MISTRAL_LIST),
        ("gemma", Reasoning("<|channel>thought", "<channel|>"), families.GEMMA4),
        ("glm", THINK, families.GLM),
        ("deepseek", THINK, families.DEEPSEEK),
        ("smollm", THINK, families.HERMES),
    ],
)
def test_the_format_of_a_family_is_found(family: str, reasoning: Reasoning | None, calls: CallFormat) -> None:
    format = found(family)
    assert (format.reasoning, format.calls[0], format.harmony) == (reasoning, calls, False)
    assert isinstance(format.parser(TOOLS, ""), MarkedReply)


def test_harmony_is_found() -> None:
    format = found("gpt-oss")
    assert format.harmony
    assert format.special.keys() == {*HARMONY_TOKENS}
    assert isinstance(format.parser(TOOLS, ""), HarmonyReply)


def test_what_the_template_says_counts_more_than_the_tokens() -> None:
    """As of a model that was trained further, with the tokenizer of the first one."""
    template = CHATML + "{% if tools %}<tool_call>{% endif %}"
    format = ReplyFormat.of(tokenizer_with(template, ["[TOOL_CALLS]", "[ARGS]", "[THINK]"]), knows_tools=True)
    assert format.calls == (families.HERMES,)


def test_only_special_tokens_of_the_format_become_text() -> None:
    vocabulary = FAMILIES["mistral"].tokenizer().get_vocab()
    names = ("[TOOL_CALLS]", "[THINK]", "[/THINK]")
    assert found("mistral").special == {name: vocabulary[name] for name in names}
    assert found("qwen").special == {}


def test_a_template_without_tools_gets_the_format_of_hermes() -> None:
    tokenizer = tokenizer_with(CHATML, ["[TOOL_CALLS]"])
    assert ReplyFormat.of(tokenizer, knows_tools=False) == ReplyFormat()


def test_a_template_with_tools_and_no_sign_gets_json() -> None:
    assert ReplyFormat.of(tokenizer_with(CHATML), knows_tools=True).calls[0] == families.JSON


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [("<|im_start|>assistant\n<think>\n", True), ("<think>\n\n</think>\n\n", False), ("assistant\n", False)],
)
def test_the_prompt_says_whether_the_reply_begins_with_reasoning(prompt: str, thinking: bool) -> None:
    format = found("qwen")
    assert format.is_thinking(prompt) == thinking
    assert format.parser(TOOLS, prompt).thinking == thinking


TEMPLATE: dict[str, Any] = {
    "start_anchor": "<|start|>",
    "fields": {"thinking": {"open": "(think)", "close": "<|end|>"}, "content": {"content": "text"}},
}


def test_a_tokenizers_own_response_template_is_used_where_the_table_has_nothing() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.response_template = TEMPLATE
    format = ReplyFormat.of(tokenizer, knows_tools=False)
    parser = format.parser(TOOLS, "<|start|>")
    assert isinstance(parser, TemplatedReply)
    assert format.special == {"<|end|>": 2, "<|start|>": 1}
    assert parsed(parser, "(think)Hm<|end|>Hi") == [("reasoning", "Hm"), ("text", "Hi")]


@pytest.mark.parametrize("template", [{"fields": {}}, "text", {"version": 9}], ids=str)
def test_a_broken_response_template_is_not_used(template: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.response_template = template
    assert ReplyFormat.of(tokenizer, knows_tools=False).template is None


def test_the_table_comes_before_a_response_template() -> None:
    tokenizer = FAMILIES["qwen"].tokenizer()
    tokenizer.response_template = TEMPLATE
    assert isinstance(ReplyFormat.of(tokenizer, knows_tools=True).parser(TOOLS, ""), MarkedReply)
