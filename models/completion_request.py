"""What a request for a chat completion of OpenAI's API may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.events import MESSAGES, Json, parse_object, short
from models.item import Message, Role
from models.options import InvalidOption, check, text
from models.refused import InvalidValue, Refused


class ModelNotFound(Refused):
    """A model that is not the one that answers here."""

    code = "model_not_found"
    param = "model"

    def __init__(self, model: str) -> None:
        super().__init__(f"the model that answers here is {model}")


class UnsupportedParameter(Refused):
    """A parameter that asks for what Parley does not do; ignored, it would be missed."""

    def __init__(self, message: str, param: str, code: str = "unsupported_parameter") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


OPTIONS = {  # of a completion, and what they are called here; of two for one, the later counts
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "stop": "stop",
    "seed": "seed",
}
LABELS = ("user", "safety_identifier", "prompt_cache_key")  # say for whom it is, the first there is, and ask nothing
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {  # and the values that ask for nothing
    "audio": (),
    "best_of": (1,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
ROLES: Mapping[str, Role] = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class CompletionRequest:
    """A request for the reply to `messages`; `options` are those of `Options` that it names.

    `end_user` is whom our user asks for.
    """

    messages: list[Message]
    options: Mapping[str, Any]
    stream: bool
    include_usage: bool
    end_user: str | None

    @classmethod
    def parse(cls, body: bytes, model: str) -> CompletionRequest:
        """The request in a body, for a model. Raises Refused, whatever the body holds."""
        values = {name: value for name, value in parse_object(body, "the body").items() if value is not None}
        for name in ("model", "messages"):
            if name not in values:
                raise InvalidValue(f"{name} is missing", name)
        if values["model"] != model:
            raise ModelNotFound(model)
        for name, value in values.items():
            _check_supported(name, value)
        stream = _switch(values, "stream", "stream")
        return cls(
            _messages(values["messages"]),
            {ours: _option(values, name, ours) for name, ours in OPTIONS.items() if name in values},
            stream,
            _include_usage(values, stream),
            next(iter([_text(values[name], name)[:256] for name in LABELS if name in values]), None),
        )


def _check_supported(name: str, value: Any) -> None:
    if name in UNSUPPORTED and not any(_same(value, neutral) for neutral in UNSUPPORTED[name]):
        raise UnsupportedParameter(f"{name} is not supported here: leave it out", name)
    if name not in (*UNSUPPORTED, *OPTIONS, *LABELS, "model", "messages", "stream", "stream_options"):
        shown = short(name, 64)
        raise UnsupportedParameter(f"{shown} is no parameter that is known here", shown, "unknown_parameter")


def _same(value: Any, other: Any) -> bool:
    """As JSON sees it, where true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _option(values: Json, name: str, ours: str) -> Any:
    try:
        return check(ours, values[name])
    except InvalidOption as invalid:
        raise InvalidValue(f"{name} must be {invalid.allowed}", name) from None


def _switch(values: Json, name: str, param: str) -> bool:
    value = values.get(name)
    if not isinstance(value, bool | None):
        raise InvalidValue(f"{param} must be true or false", param)
    return bool(value)


def _include_usage(values: Json, stream: bool) -> bool:
    options = values.get("stream_options", {})
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise InvalidValue('stream_options must be {"include_usage": true or false}', "stream_options")
    if options and not stream:
        raise InvalidValue("stream_options are for streams only", "stream_options")
    if options.get("include_obfuscation"):
        raise UnsupportedParameter("streams are not obfuscated here", "stream_options.include_obfuscation")
    return _switch(options, "include_usage", "stream_options.include_usage")


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not 1 <= len(value) <= MESSAGES:
        raise InvalidValue(f"messages must be a list of 1 to {MESSAGES} of {{role, content}}", "messages")
    messages = [_message(turn, f"messages[{index}]") for index, turn in enumerate(value)]
    if not any(message["content"].strip() for message in messages):
        raise InvalidValue("messages must say something", "messages")
    return messages


def _message(turn: Any, param: str) -> Message:
    if not isinstance(turn, dict):
        raise InvalidValue(f"{param} must be an object of role and content", param)
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidValue(f"{param}.role must be one of {', '.join(ROLES)}", f"{param}.role")
    for name, value in turn.items():
        if name not in ("role", "content") and value not in (None, [], {}):
            shown = short(f"{param}.{name}", 64)
            raise UnsupportedParameter(f"{shown} is not supported here: leave it out", shown)
    return {"role": ROLES[role], "content": _content(turn.get("content"), role, f"{param}.content")}


def _content(value: Any, role: str, param: str) -> str:
    if value is None and role == "assistant":
        return ""
    if not isinstance(value, list):
        return _text(value, param)
    return "\n".join(_part(part, f"{param}[{index}]") for index, part in enumerate(value))


def _part(part: Any, param: str) -> str:
    if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
        raise UnsupportedParameter(f'{param} must be {{"type": "text", "text": "..."}}: only text is understood', param)
    return _text(part["text"], f"{param}.text")


def _text(value: Any, param: str) -> str:
    try:
        return text(value)
    except ValueError:
        raise InvalidValue(f"{param} must be text", param) from None
