"""The request of OpenAI's Chat Completions API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from models.errors import (
    InvalidValueError,
    MissingFieldError,
    ModelNotFoundError,
    UnknownFieldError,
    UnsupportedParameterError,
)
from models.messages import MAX_MESSAGES, Message, Role
from models.options import check_option
from models.validation import Json, Text, convert, parse_object, printable

MAX_END_USER = 256  # characters that are logged
MAX_PARAM = 64  # characters of an unknown name that are sent back

OPTION_BY_PARAMETER = {  # OpenAI's names, and ours; if a request has two names of one option, the later one here counts
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
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {  # parameters, with the values that have no effect
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


class TextPart(Struct, forbid_unknown_fields=True):
    """One part of a message."""

    type: Literal["text"]
    text: Text


PART = Meta(description='{"type": "text", "text": "..."}: only text is supported', extra={"report_object": True})
PART_PARAM = r"messages\[\d+\]\.content\[\d+\]"
Content = Text | list[Annotated[TextPart, PART]]


class ChatMessage(Struct, forbid_unknown_fields=True):
    """One message. Only a message of the assistant may have no content."""

    role: Annotated[Literal["developer", "system", "user", "assistant"], Meta(description=f"one of {', '.join(ROLES)}")]
    content: Annotated[Content | None, Meta(description="text, or a list of parts")] = None

    def as_message(self, at: str) -> Message:
        """The message in the form of the domain. Raises InvalidValueError."""
        if self.content is None and self.role != "assistant":
            raise InvalidValueError(f"{at}.content is missing", f"{at}.content")
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        return {"role": ROLES[self.role], "content": text}


Switch = Annotated[bool | None, Meta(description="true or false")]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream has in addition to its chunks."""

    include_usage: Switch = None
    include_obfuscation: Any = None  # not supported


STREAM_OPTIONS = Meta(description='{"include_usage": true or false}', extra={"report_object": True})


class _Body(Struct, forbid_unknown_fields=True):
    """The parameters that are not options."""

    model: Text
    messages: Annotated[
        list[Annotated[ChatMessage, Meta(description="an object of role and content")]],
        Meta(
            min_length=1,
            max_length=MAX_MESSAGES,
            description=f"a list of 1 to {MAX_MESSAGES} objects of role and content",
        ),
    ]
    stream: Switch = None
    stream_options: Annotated[StreamOptions | None, STREAM_OPTIONS] = None
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None


@dataclass(frozen=True)
class ChatCompletionRequest:
    """A request for a reply to messages. `options` has only the options that the request names."""

    messages: list[Message]
    options: Mapping[str, Any]
    stream: bool
    include_usage: bool
    end_user: str | None  # the person for whom our user sends the request

    @classmethod
    def parse(cls, body: bytes, model: str) -> ChatCompletionRequest:
        """The request in a body, for the loaded model. Raises APIError if anything in it is wrong."""
        values = {name: value for name, value in parse_object(body, "the body").items() if value is not None}
        if values.get("model", model) != model:
            raise ModelNotFoundError(model)
        for name in sorted(UNSUPPORTED.keys() & values.keys()):
            _check_neutral(name, values.pop(name))
        chosen = {name: values.pop(name) for name in OPTION_BY_PARAMETER if name in values}
        if isinstance(values.get("messages"), list) and len(values["messages"]) <= MAX_MESSAGES:
            values["messages"] = [_without_neutral(message) for message in values["messages"]]
        parsed = _convert(values)
        messages = [message.as_message(f"messages[{index}]") for index, message in enumerate(parsed.messages)]
        if not any(message["content"].strip() for message in messages):
            raise InvalidValueError("messages must contain text", "messages")
        options = {OPTION_BY_PARAMETER[name]: _option(name, value) for name, value in chosen.items()}
        stream, include_usage = bool(parsed.stream), _include_usage(parsed)
        labels = (parsed.user, parsed.safety_identifier, parsed.prompt_cache_key)
        end_user = next((label[:MAX_END_USER] for label in labels if label is not None), None)
        return cls(messages, options, stream, include_usage, end_user)


def _check_neutral(name: str, value: Any) -> None:
    """Raise UnsupportedParameterError if the value of an unsupported parameter would have an effect."""
    for neutral in UNSUPPORTED[name]:
        if value == neutral and isinstance(value, bool) == isinstance(neutral, bool):  # in JSON, true is not 1
            return
    raise UnsupportedParameterError(f"{name} is not supported: leave it out", name)


def _option(name: str, value: Any) -> Any:
    try:
        return check_option(OPTION_BY_PARAMETER[name], value)
    except InvalidValueError as error:
        raise InvalidValueError(f"{name} must be {error.allowed}", name) from None


def _without_neutral(message: Any) -> Any:
    """A message without empty fields, such as the empty tool calls that clients send back."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if name == "content" or value not in (None, [], {})}


def _convert(values: Json) -> _Body:
    """The body as a struct, with the error codes of this API."""
    try:
        return convert(values, _Body)
    except MissingFieldError as error:
        raise InvalidValueError(str(error), str(error.param)) from None
    except UnknownFieldError as error:
        param = printable(error.param, MAX_PARAM)
        if param.startswith("messages["):
            raise UnsupportedParameterError(f"{param} is not supported: leave it out", param) from None
        raise UnsupportedParameterError(f"there is no parameter {param}", param, "unknown_parameter") from None
    except InvalidValueError as error:
        if re.fullmatch(PART_PARAM, str(error.param)):
            raise UnsupportedParameterError(str(error), str(error.param)) from None
        raise


def _include_usage(body: _Body) -> bool:
    options = body.stream_options
    if options is None:
        return False
    if not body.stream and (options.include_usage, options.include_obfuscation) != (None, None):
        raise InvalidValueError("stream_options are for streams only", "stream_options")
    if options.include_obfuscation:
        param = "stream_options.include_obfuscation"
        raise UnsupportedParameterError(f"{param} is not supported: leave it out", param)
    return bool(options.include_usage)
