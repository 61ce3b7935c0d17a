"""A reply as a choice of a chat completion of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from models.generation.events import OutputDelta, OutputItemAdded
from models.model_info import ModelInfo
from models.output_item import OutputItem, TokenLogprob
from models.protocols.completion import Choice, finish_reason
from models.protocols.logprobs import render_logprobs
from models.store.item import Item
from models.validation import Json


class ChatChoice(Choice):
    """A choice with a message: its text, its reasoning and its calls of tools."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    input_param = "messages"

    def __init__(self, index: int, has_logprobs: bool) -> None:
        super().__init__(index, has_logprobs)
        self._item = OutputItem("message")  # the part that was added last
        self._calls = 0

    def whole(self, reply: Item) -> Json:
        """The choice with the whole message; one that only calls tools has no content."""
        calls = [item for item in reply.output if item.type == "function_call"]
        reasoning = _text_of(reply, "reasoning")
        message: Json = {"role": "assistant", "content": _text_of(reply, "message"), "refusal": None}
        if calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [_render_call(call, call.text) for call in calls]
        if reasoning:
            message["reasoning_content"] = reasoning
        logprobs = None
        if self.has_logprobs:
            pieces = (piece for item in reply.output for piece in item.logprobs or ())
            logprobs = _render_logprobs(chain.from_iterable(pieces))
        return {
            "index": self.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": _finish_reason(reply, bool(calls)),
        }

    def first(self) -> Json:
        """The choice with the role."""
        return self._choice({"role": "assistant", "content": ""})

    def next(self, event: OutputItemAdded | OutputDelta) -> Json | None:
        """The choice with the next piece of text, reasoning or arguments, or with the beginning of a call."""
        if isinstance(event, OutputItemAdded):
            self._item = event.item
            if event.item.type != "function_call":
                return None
            self._calls += 1
            return self._choice({"tool_calls": [{"index": self._calls - 1, **_render_call(event.item, "")}]})
        match self._item.type:
            case "reasoning":
                return self._choice({"reasoning_content": event.text})
            case "function_call":
                arguments = {"index": self._calls - 1, "function": {"arguments": event.text}}
                return self._choice({"tool_calls": [arguments]})
        logprobs = None if event.logprobs is None or not self.has_logprobs else _render_logprobs(event.logprobs)
        return self._choice({"content": event.text}, logprobs)

    def last(self, reply: Item) -> Json:
        """The choice with the finish reason."""
        return self._choice({}, None, _finish_reason(reply, bool(self._calls)))

    def _choice(self, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def render_model(model: ModelInfo, created: int, name: str | None = None) -> Json:
    """The model as OpenAI's API lists it, by its own or another name; `created` is in Unix seconds."""
    told: Json = {
        "id": name or model.name,
        "object": "model",
        "created": created,
        "owned_by": "parley",
        "max_model_len": model.context,
    }
    return told | {"architecture": {"input_modalities": ["text", "image"]}} if model.has_images else told


def _text_of(reply: Item, kind: str) -> str:
    return "".join(item.text for item in reply.output if item.type == kind)


def _finish_reason(reply: Item, has_calls: bool) -> str | None:
    reason = finish_reason(reply)
    return "tool_calls" if reason == "stop" and has_calls else reason


def _render_call(call: OutputItem, arguments: str) -> Json:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _render_logprobs(tokens: Iterable[TokenLogprob]) -> Json:
    return {"content": render_logprobs(tokens), "refusal": None}
