"""How a chat template takes calls of tools and their results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from models.language.replies.json_text import parsed
from models.messages import Message, ToolCall


@dataclass(frozen=True)
class CallStyle:
    """How a chat template takes calls of tools and their results.

    `text_arguments` says that arguments must be JSON text, not an object. `short_ids` makes ids of nine letters and
    digits of all ids, which some templates demand. `apart` gives each call, with its result, a message of its own, and
    the text before it too.
    """

    text_arguments: bool = False
    short_ids: bool = False
    apart: bool = False

    def as_dicts(self, messages: Sequence[Message], reasoning_keys: Sequence[str]) -> list[dict[str, Any]]:
        """The messages in the form that templates take."""
        names = {call["id"]: call["name"] for message in messages for call in message.get("tool_calls", ())}
        return [
            self._as_dict(message, names, reasoning_keys)
            for message in (_taken_apart(messages) if self.apart else messages)
        ]

    def _as_dict(self, message: Message, names: dict[str, str], reasoning_keys: Sequence[str]) -> dict[str, Any]:
        shown: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        if reasoning := message.get("reasoning"):
            shown |= dict.fromkeys(reasoning_keys, reasoning)
        if calls := message.get("tool_calls"):
            shown["tool_calls"] = [self._call(call) for call in calls]
        if message["role"] == "tool":
            call_id = message.get("tool_call_id", "")
            shown |= {"tool_call_id": self._id(call_id), "name": names.get(call_id, "")}
        return shown

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments: Any = call["arguments"] or "{}"
        if not self.text_arguments:
            # Arguments that were cut are no JSON; templates that want an object get them in one.
            value = parsed(arguments)
            arguments = value if isinstance(value, dict) else {"arguments": arguments}
        function = {"name": call["name"], "arguments": arguments}
        return {"id": self._id(call["id"]), "type": "function", "function": function}

    def _id(self, call_id: str) -> str:
        return hashlib.sha256(call_id.encode()).hexdigest()[:9] if self.short_ids else call_id


def styles() -> list[CallStyle]:
    """All styles, the usual ones first."""
    return [CallStyle(text, short, apart) for apart, text, short in product((False, True), repeat=3)]


def _taken_apart(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages with one call in each: text, a call, its result, the next call, ..."""
    results = {message.get("tool_call_id", ""): message for message in messages if message["role"] == "tool"}
    told: set[str] = set()
    for message in messages:
        if message["role"] == "tool" and message.get("tool_call_id", "") in told:
            continue
        if not (calls := message.get("tool_calls")):
            yield message
            continue
        if message["content"]:
            yield {"role": "assistant", "content": message["content"]}
        for index, call in enumerate(calls):
            alone: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
            if index == 0 and "reasoning" in message:
                alone["reasoning"] = message["reasoning"]
            yield alone
            if call["id"] in results:
                told.add(call["id"])
                yield results[call["id"]]
