"""What upstreams answer, as far as we read it. Other fields are ignored."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta as Limit, Raw, Struct, field

Name = Annotated[str, Limit(min_length=1, max_length=256)]
Length = Annotated[int, Limit(ge=0, le=2**31 - 1)]  # in tokens


class Meta(Struct):
    """What llama-server tells of a model."""

    n_ctx: Length | None = None
    n_ctx_train: Length | None = None


class Architecture(Struct):
    """What llama-server, OpenRouter and Parley tell of a model."""

    input_modalities: list[str] | None = None


class Model(Struct):
    """One entry of `GET /v1/models`."""

    id: Name
    owned_by: str | None = None
    max_model_len: Length | None = None  # vLLM, SGLang, Parley
    context_length: Length | None = None  # OpenRouter and others
    meta: Meta | None = None
    architecture: Architecture | None = None


class Models(Struct):
    """`GET /v1/models`, with models that are read one by one."""

    data: list[Raw]


class GenerationSettings(Struct):
    n_ctx: Length | None = None
    params: dict[str, Any] = field(default_factory=dict)


class TemplateCapabilities(Struct):
    supports_tools: bool = True


class Props(Struct):
    """`GET /props` of llama-server."""

    default_generation_settings: GenerationSettings = field(default_factory=GenerationSettings)
    total_slots: Length | None = None
    chat_template_caps: TemplateCapabilities = field(default_factory=TemplateCapabilities)


class Arguments(Struct):
    """`GET /args` of Parley, without what surrounds it."""

    slots: Length | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Args(Struct):
    """`GET /args` of Parley."""

    args: Arguments


class Counted(Struct):
    """`POST /tokenize` of vLLM."""

    count: int


# Chunks of a stream


class CalledFunction(Struct):
    name: str | None = None
    arguments: str | None = None


class ToolCall(Struct):
    index: int | None = None
    id: str | None = None
    function: CalledFunction | None = None


class Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None


class TopLogprob(Struct):
    token: str
    logprob: float | None = None
    bytes: list[int] | None = None


class Logprob(TopLogprob):
    top_logprobs: list[TopLogprob] | None = None


class Logprobs(Struct):
    """Those of Chat Completions are in `content`, those of Completions in the other fields."""

    content: list[Logprob] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(Struct):
    """Chat Completions have a `delta`, Completions a `text`."""

    index: int | None = None
    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class PromptDetails(Struct):
    cached_tokens: int | None = None


class CompletionDetails(Struct):
    reasoning_tokens: int | None = None


class Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class Timings(Struct):
    """The counts of llama-server, in each chunk."""

    cache_n: int = 0  # tokens of the prompt that were in the cache
    prompt_n: int = 0  # and those that were not
    predicted_n: int = 0


class Chunk(Struct):
    """One event of a stream; one with an `error` is the last."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    error: Any = None


decode_model = msgspec.json.Decoder(Model).decode
decode_chunk = msgspec.json.Decoder(Chunk).decode
