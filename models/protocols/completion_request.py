"""What the requests of Chat Completions and of the older Completions have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from msgspec import Meta, Struct

from models.chat_request import ChatRequest
from models.errors import InvalidValueError, UnsupportedParameterError
from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.protocols.parameters import convert_parameters, read_option, take_unsupported
from models.validation import Json, Text, parse_object

MAX_CHOICES = 8
MAX_END_USER = 256  # characters that are logged
SEEDS = 2**63

OPTION_BY_PARAMETER = {  # OpenAI's names, and ours; if a request has two names of one option, the later one here counts
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "stop": "stop",
    "seed": "seed",
    "logit_bias": "logit_bias",
    "reasoning_effort": "reasoning_effort",
}
IGNORED = (  # parameters that cannot change the reply
    "guided_decoding_backend",
    "metadata",
    "prediction",
    "prompt_cache_options",
    "prompt_cache_retention",
    "service_tier",
    "store",
    "verbosity",
)
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {  # parameters, with the values that have no effect
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "suffix": ("",),
    "web_search_options": (),
}
INSTEAD = {"functions": "use tools", "function_call": "use tool_choice"}

Switch = Annotated[bool | None, Meta(description="true or false")]
Choices = Annotated[
    Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None, Meta(description=f"a whole number from 1 to {MAX_CHOICES}")
]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream has in addition to its chunks."""

    include_usage: Switch = None
    continuous_usage_stats: Switch = None
    include_obfuscation: Any = None  # ignored


STREAM_OPTIONS = Meta(description='{"include_usage": true or false}', extra={"report_object": True})


class CompletionBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """The parameters that both APIs have, and that are not options."""

    model: Text
    n: Choices = None
    stream: Switch = None
    stream_options: Annotated[StreamOptions | None, STREAM_OPTIONS] = None
    ignore_eos: Switch = None
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None


Body = TypeVar("Body", bound=CompletionBody)


@dataclass(frozen=True)
class CompletionRequest:
    """A request for one or several replies to the same messages, or to the same prompt."""

    chat: ChatRequest
    model: str  # as the client calls it
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False  # in each chunk
    end_user: str | None = None  # the person for whom our user sends the request

    @classmethod
    def of(cls, body: CompletionBody, chat: ChatRequest) -> CompletionRequest:
        """The request in a body that asks the model this. Raises InvalidValueError."""
        options = body.stream_options or StreamOptions()
        if not body.stream and options != StreamOptions():
            raise InvalidValueError("stream_options are for streams only", "stream_options")
        labels = (body.user, body.safety_identifier, body.prompt_cache_key)
        return cls(
            chat=replace(chat, ignore_eos=bool(body.ignore_eos)),
            model=body.model,
            choices=body.n or 1,
            stream=bool(body.stream),
            include_usage=bool(options.include_usage),
            continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
            end_user=next((label[:MAX_END_USER] for label in labels if label is not None), None),
        )

    @property
    def chats(self) -> list[ChatRequest]:
        """One for each reply; a seed makes them differ, and gives the same ones again."""
        options, seed = self.chat.options, self.chat.options.seed
        seeds = [None if seed is None else (seed + index) % SEEDS for index in range(self.choices)]
        return [replace(self.chat, options=options.updated({"seed": seed})) for seed in seeds]


def take_values(body: bytes, models: ModelList) -> tuple[ModelInfo, Json, Json]:
    """The model that a body names, the parameters that are options of the reply, and the others.

    Parameters that are null or that cannot change the reply are gone. Raises APIError if one is not supported, or if
    there is no such model.
    """
    values = {name: value for name, value in parse_object(body, "the body").items() if value is not None}
    name = values.get("model")
    model = models.choose(name if isinstance(name, str | None) else "")
    for name in IGNORED:
        values.pop(name, None)
    take_unsupported(values, UNSUPPORTED, INSTEAD)
    chosen = {name: values.pop(name) for name in OPTION_BY_PARAMETER if name in values}
    return model, chosen, values


def check_options(chosen: Json, model: ModelInfo) -> Options:
    """The options of a reply: the model's own, and those that a request chooses. Raises InvalidValueError."""
    checked = {
        option: read_option(name, chosen[name], option)
        for name, option in OPTION_BY_PARAMETER.items()
        if name in chosen
    }
    return model.defaults.updated(checked)


def convert_body(values: Json, type: type[Body]) -> Body:
    """The body as a struct, with the error codes of these APIs."""
    try:
        return convert_parameters(values, type)
    except UnsupportedParameterError as error:
        if (param := str(error.param)).startswith("messages["):
            raise UnsupportedParameterError(f"{param} is not supported: leave it out", param) from None
        raise
