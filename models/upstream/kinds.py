"""The kinds of servers, and what each of them takes in a request."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.output_format import OutputFormat

Body = dict[str, Any]

STANDARD = {  # the names of our options in OpenAI's API
    "temperature": "temperature",
    "top_p": "top_p",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "max_output_tokens": "max_tokens",
    "stop": "stop",
    "seed": "seed",
    "logit_bias": "logit_bias",
}
USUAL = STANDARD | {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty"}
EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}  # where only low, medium and high are known


@dataclass(frozen=True, eq=False)
class Kind:
    """What servers of a kind take in a request. What they do not take is refused by name.

    `options` has their names of our options. `extras` are fields of every request, such as those that ask for token
    counts in each chunk. `effort` and `format` return the fields for a reasoning effort and for an output format;
    `format` returns None if the servers cannot keep to it.
    """

    name: str
    options: Mapping[str, str]
    effort: Callable[[str], Body]
    format: Callable[[OutputFormat], Body | None]
    extras: Mapping[str, Any]
    template_arguments: bool = False  # whether they take `chat_template_kwargs`, and `ignore_eos`
    top_k_off: int = 0
    seeds: int = 2**63
    reasoning_fields: tuple[str, ...] = ()  # of earlier replies
    salted: bool = False  # whether the prefix cache can keep users apart


# Reasoning efforts


def _plain_effort(effort: str) -> Body:
    return {"reasoning_effort": effort}


def _template_effort(effort: str) -> Body:
    """The arguments that chat templates know; each one ignores those that it does not read."""
    arguments: Body = {"enable_thinking": effort != "none", "thinking": effort != "none"}
    if effort != "none":
        arguments["reasoning_effort"] = EFFORTS.get(effort, effort)
    return {"chat_template_kwargs": arguments}


def _both_efforts(effort: str) -> Body:
    named = {} if effort == "none" else {"reasoning_effort": EFFORTS.get(effort, effort)}
    return named | _template_effort(effort)


# Output formats


def _schema_format(format: OutputFormat) -> Body | None:
    match format.type:
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "json_schema":
            schema: Body = {"name": "reply", "schema": format.value}
            if format.strict is not None:
                schema["strict"] = format.strict
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return None


def _structured(format: OutputFormat) -> Body | None:
    if format.type in ("regex", "choice", "grammar"):
        return {"structured_outputs": {format.type: format.value}}
    return _schema_format(format)


def _sglang_format(format: OutputFormat) -> Body | None:
    match format.type, format.value:
        case "regex", str(pattern):
            return {"regex": pattern}
        case "choice", (*texts,):
            return {"regex": f"({'|'.join(map(re.escape, texts))})"}
        case "grammar", str(grammar):
            return {"ebnf": grammar}
    return _schema_format(format)


def _llama_format(format: OutputFormat) -> Body | None:
    match format.type, format.value:
        case "choice", (*texts,):
            return {"grammar": f"root ::= {' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)}"}
        case "grammar", str(grammar):
            return {"grammar": grammar}
    return _schema_format(format)


# The kinds

USAGE = {"stream_options": {"include_usage": True}}
CONTINUOUS_USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}

OTHER = Kind("other", STANDARD, _plain_effort, _schema_format, USAGE)
OPENAI = Kind("openai", STANDARD | {"max_output_tokens": "max_completion_tokens"}, _plain_effort, _schema_format, USAGE)
PARLEY = Kind(
    "parley",
    USUAL,
    _plain_effort,
    _structured,
    CONTINUOUS_USAGE,
    template_arguments=True,
    reasoning_fields=("reasoning_content",),
)
VLLM = Kind(
    "vllm",
    USUAL,
    _both_efforts,
    _structured,
    CONTINUOUS_USAGE,
    template_arguments=True,
    reasoning_fields=("reasoning", "reasoning_content"),
    salted=True,
)
SGLANG = Kind(
    "sglang",
    USUAL,
    _both_efforts,
    _sglang_format,
    CONTINUOUS_USAGE,
    template_arguments=True,
    top_k_off=-1,
    reasoning_fields=("reasoning_content",),
)
LLAMA_CPP = Kind(
    "llama.cpp",
    USUAL | {"repetition_penalty": "repeat_penalty"},
    _template_effort,
    _llama_format,
    {**USAGE, "timings_per_token": True, "cache_prompt": True},
    template_arguments=True,
    seeds=2**32 - 1,
    reasoning_fields=("reasoning_content",),
)

BY_OWNER = {  # what `owned_by` of a model says
    "parley": PARLEY,
    "vllm": VLLM,
    "sglang": SGLANG,
    "llamacpp": LLAMA_CPP,
    "openai": OPENAI,
    "openai-internal": OPENAI,
    "system": OPENAI,
}


def kind_of(owner: str) -> Kind:
    """The kind of the server whose models have this `owned_by`."""
    return BY_OWNER.get(owner.lower(), OTHER)
