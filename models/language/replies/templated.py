"""Replies in a format that a model ships itself, as its tokenizer's `response_template`."""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_parsing import ResponseParser

from models.language.replies.json_text import as_json
from models.language.replies.parser import ReplyParser
from models.language.replies.parts import EnoughCalls, Parts
from models.language.replies.source import Reader
from models.tools import NO_TOOLS, Tools

REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of a template
CALLS = "tool_calls"


class TemplatedReply(ReplyParser):
    """Drives transformers' parser. A call comes as a whole, when it has ended; one that is cut is text.

    `prompt` is the end of the prompt, which may hold the beginning of the reply.
    """

    def __init__(self, template: dict[str, Any], prompt: str, tools: Tools = NO_TOOLS) -> None:
        fields = template.get("fields", {})
        if not tools.callable:
            fields = {name: field for name, field in fields.items() if name != CALLS}
        specs: list[Any] = [{"name": tool.name, "parameters": dict(tool.parameters or {})} for tool in tools.callable]
        self._parser = ResponseParser({**template, "fields": fields}, prefix=prompt, tools=specs)
        self._cut = ""  # the text of a call that has not ended
        super().__init__(Parts(False, not tools.parallel))
        self._handle([event for event in self._parser.initial_events if event["type"] != "region_chunk"])

    def _read(self) -> Reader[None]:
        while (yield from self._source.peek()):
            try:
                # By single characters, since what a piece brings before an error is lost.
                self._handle(self._parser.feed(self._source.take(1)))
            except EnoughCalls:
                raise
            except Exception:  # it cannot read a call
                self._parts.text(self._cut)
                raise
        if self._cut:  # the parser would fail on it
            self._parts.text(self._cut)
        else:
            self._handle(self._parser.finalize()[1])

    def _handle(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            field, kind = event["field"], event["type"]
            if field in REASONING:
                self._parts.thinking = kind != "region_close"
            if kind == "region_close" and field == CALLS:
                self._call(event["value"])
                self._cut = ""
            elif kind == "region_chunk" and field == CALLS:
                self._cut += event["text"]
            elif kind == "region_chunk":
                (self._parts.reasoning if field in REASONING else self._parts.text)(event["text"])

    def _call(self, value: Any) -> None:
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call)
            arguments = function.get("arguments", {})
            self._parts.call(str(function["name"]))
            self._parts.arguments(arguments if isinstance(arguments, str) else as_json(arguments))
            self._parts.end_call()


def can_read(template: dict[str, Any]) -> bool:
    """Whether transformers' parser takes a template."""
    try:
        TemplatedReply(template, "")
    except Exception:  # of any kind, since the template is a file of the model
        return False
    return True
