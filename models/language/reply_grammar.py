"""The grammar of a reply whose form is not free, as Lark text for llguidance.

A reply is its reasoning, if the model thinks, and then what the request wants: calls of tools in the model's own
format, text in an output format, or free text in which a call, once it has begun, is a whole one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from models.chat_request import ChatRequest
from models.errors import UnsupportedParameterError
from models.language.replies.call_format import CallFormat, arguments_schema
from models.language.replies.harmony import CHANNEL, CONSTRAIN, END, MESSAGE, START
from models.language.replies.json_text import as_json
from models.language.reply_format import ReplyFormat
from models.output_format import OutputFormat
from models.tools import Tools

ANY = "/(?s:.*)/"
SPACE = r"/[ \n]{0,3}/"  # between parts
LarkOf = Callable[[OutputFormat], str]  # the whole grammar of an output format, with a rule `start`


class Grammar(NamedTuple):
    """The grammar of a whole reply. `param` is the parameter that it comes from, for errors."""

    lark: str
    param: str


def reply_grammar(format: ReplyFormat, request: ChatRequest, thinking: bool, lark_of: LarkOf) -> Grammar | None:
    """The grammar of the reply to a request; None if the reply is free.

    `thinking` says that the prompt has opened the reasoning. Raises UnsupportedParameterError.
    """
    tools, output = request.tools, request.format
    free = output.type == "text"
    forced = tools.forced
    calls = forced or any(tool.strict for tool in tools.callable)
    if free and not calls:
        return None
    if format.template is not None and calls and not forced:
        raise UnsupportedParameterError(
            "this model has a format of calls that cannot be constrained: set strict to false, or tool_choice to "
            '"required" or to one tool',
            "tools",
        )
    text = None if forced else "" if free else lark_of(output)
    builder = _Harmony(format, tools) if format.harmony else _Marked(format, tools, thinking)
    return Grammar("\n".join(["%llguidance {}", *builder.rules(text)]), "tools" if calls else output.param)


@dataclass
class _Builder:
    format: ReplyFormat
    tools: Tools

    def literal(self, text: str) -> str:
        """The expression of a text, in which special tokens are tokens."""
        special = sorted(self.format.special, key=len, reverse=True)
        pieces = re.split("|".join(f"({re.escape(token)})" for token in special) or "(?!)", text)
        shown = [
            f"<[{self.format.special[piece]}]>" if piece in self.format.special else as_json(piece)
            for piece in pieces
            if piece
        ]
        return " ".join(shown)

    def output(self, lark: str) -> list[str]:
        """The rule of the text: in the format of a grammar, or free if that is empty."""
        return [f"output: %lark {{\n{lark}\n}}" if lark else f"output: {ANY}"]


@dataclass
class _Marked(_Builder):
    """The grammar of a reply with markers."""

    thinking: bool

    def rules(self, text: str | None) -> list[str]:
        """The rules of a reply. Its text has the grammar `text`; None allows none."""
        calls, call_rules = self._calls()
        if text is None:
            body = calls
        elif not self.tools.callable:
            body = "output"
        elif text:
            body = f"(({calls}) | output)"
        else:
            body = "free"
            call_rules += self._free(calls)
        output = [] if text is None or body == "free" else self.output(text)
        return [f"start: {self._reasoning()} {body}", *self._thoughts(), *call_rules, *output]

    def _reasoning(self) -> str:
        if self.format.reasoning is None:
            return ""
        if self.thinking:
            return f"thoughts {SPACE}"
        return f"({self.literal(self.format.reasoning.open)} thoughts {SPACE})?"

    def _thoughts(self) -> list[str]:
        if self.format.reasoning is None:
            return []
        return _up_to("thoughts", self.literal(self.format.reasoning.close))

    def _calls(self) -> tuple[str, list[str]]:
        """The expression of the calls of a reply, from the first opener on, and its rules."""
        if not self.tools.callable:
            return "", []
        format = self.format.calls[0]
        opener = self.literal(format.openers[0]) if format.openers else ""
        return f"{opener} calls", self._calls_after_opener(format)

    def _calls_after_opener(self, format: CallFormat) -> list[str]:
        before, after = map(self.literal, format.frame)
        more = f"({self.literal(format.between)} call)*" if self.tools.parallel else ""
        names = [f"call_{index}" for index in range(len(self.tools.callable))]
        rules = [format.rule(tool, name, self.literal) for tool, name in zip(self.tools.callable, names, strict=True)]
        return [
            f"calls: {before} call {more} {after}",
            f"call: {' | '.join(names)}",
            *(rule for one in rules for rule in one),
        ]

    def _free(self, calls: str) -> list[str]:
        """Free text; after an opener, calls. Without an opener, a text that begins like a call is one."""
        format = self.format.calls[0]
        if not format.openers:
            return [f'free: {calls} | /[^{{\\[](?s:.*)/ | ""']
        return [f"free: (opening calls)* {ANY}", *_up_to("opening", self.literal(format.openers[0]))]


@dataclass
class _Harmony(_Builder):
    """The grammar of a reply in the harmony format, which ends with a call."""

    def rules(self, text: str | None) -> list[str]:
        names = [f"call_{index}" for index in range(len(self.tools.callable))]
        parts = [*names, *(["final"] if text is not None else [])]
        analysis = f"{CHANNEL}analysis{MESSAGE}", f"{END}{START}assistant"
        rules = [
            f"start: analysis* ({' | '.join(parts)})",
            f"analysis: {self.literal(analysis[0])} {ANY} {self.literal(analysis[1])}",
        ]
        for tool, name in zip(self.tools.callable, names, strict=True):
            head = f"{CHANNEL}commentary to=functions.{tool.name} {CONSTRAIN}json{MESSAGE}"
            rules += [f"{name}: {self.literal(head)} {name}_arguments"]
            rules += [f"{name}_arguments: %json {as_json(arguments_schema(tool))}"]
        if text is not None:
            rules += [f"final: {self.literal(f'{CHANNEL}final{MESSAGE}')} output", *self.output(text)]
        return rules


def _up_to(name: str, end: str) -> list[str]:
    """The rule of any text up to an expression, and with it. Text ends before a special token by itself."""
    if end.startswith("<["):
        return [f"{name}: {ANY} {end}"]
    return [f"{name}[lazy]: {name.upper()}_TEXT {end}", f"{name.upper()}_TEXT: {ANY}"]
