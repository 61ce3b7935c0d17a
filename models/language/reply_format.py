"""How a model writes its replies: reasoning, calls of tools, special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from models.language.replies.call_format import CallFormat
from models.language.replies.families import CALLS, HERMES, OTHER_CALLS, REASONING
from models.language.replies.harmony import CHANNEL, MARKERS, MESSAGE, HarmonyReply
from models.language.replies.parser import MarkedReply, Reasoning, ReplyParser
from models.language.replies.templated import TemplatedReply, can_read
from models.tools import Tools

T = TypeVar("T")


@dataclass(frozen=True)
class ReplyFormat:
    """How a model writes its replies.

    `calls` has the formats in which it calls tools, the usual one first. `special` has the special tokens that are
    markers, with their ids: the parser needs them as text. `template` is the tokenizer's own response template, if we
    know nothing better.
    """

    harmony: bool = False
    reasoning: Reasoning | None = None
    calls: tuple[CallFormat, ...] = (HERMES,)
    special: Mapping[str, int] = field(default_factory=dict)
    template: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, knows_tools: bool) -> ReplyFormat:
        """Find out the format by the chat template, else by the tokens. `knows_tools` is whether the template does."""
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}.union(tokenizer.all_special_tokens)
        signs = str(tokenizer.get_chat_template()), "\0".join(token.content for token in added)
        reasoning, calls = _found(REASONING, *signs), _found(CALLS, *signs) if knows_tools else None
        harmony = any(CHANNEL in text and MESSAGE in text for text in signs)
        template = getattr(tokenizer, "response_template", None)
        if template and not (harmony or reasoning or calls) and can_read(template):
            own = {content: _id(tokenizer, content) for content in special if content in str(template)}
            return cls(special=own, template=template)
        calls = calls or (OTHER_CALLS if knows_tools else (HERMES,))
        markers = {*MARKERS} if harmony else {text for format in calls for text in format.all_markers}
        if reasoning and not harmony:
            markers |= {reasoning.open, reasoning.close}
        # A marker may be a special token with text after it.
        own = {content: _id(tokenizer, content) for content in special if any(content in marker for marker in markers)}
        return cls(harmony, None if harmony else reasoning, calls, own)

    @property
    def thinks(self) -> bool:
        """Whether replies may have reasoning."""
        return self.harmony or self.reasoning is not None or "reasoning" in str(self.template)

    def parser(self, tools: Tools, prompt: str) -> ReplyParser:
        """A parser of one reply. `prompt` is the end of its prompt."""
        if self.harmony:
            return HarmonyReply(tools)
        if self.template is not None and tools.choice != "required":  # a forced call has a format of ours
            return TemplatedReply(dict(self.template), prompt, tools)
        return MarkedReply(self.reasoning, self.calls, tools, frozenset(self.special), self.is_thinking(prompt))

    def is_thinking(self, prompt: str) -> bool:
        """Whether a prompt with this end has opened the reasoning."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning.open)


def _found(table: tuple[tuple[str, T], ...], *texts: str) -> T | None:
    """The first entry whose sign stands in the first text, else in the second one."""
    return next((entry for text in texts for sign, entry in table if sign in text), None)


def _id(tokenizer: PreTrainedTokenizerBase, content: str) -> int:
    return int(tokenizer.get_vocab()[content])
