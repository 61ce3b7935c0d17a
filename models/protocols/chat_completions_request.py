"""The request of OpenAI's Chat Completions API, with what vLLM and llama.cpp add to it."""

from __future__ import annotations

import re
from typing import Annotated, Any

from msgspec import Meta, Struct, field

from models.chat_request import ChatRequest
from models.errors import InvalidValueError, UnsupportedParameterError
from models.model_info import ModelList
from models.options import ReasoningEffort
from models.output_format import PLAIN_TEXT
from models.protocols.chat_completions_messages import PART_PARAM, Messages, make_messages, take_images, without_neutral
from models.protocols.completion_request import (
    CompletionBody,
    CompletionRequest,
    Switch,
    check_options,
    convert_body,
    take_values,
)
from models.protocols.function_tools import ChatTools, parse_tools
from models.protocols.structured_outputs import ResponseFormat, StructuredOutputs, choose_format
from models.protocols.template_arguments import TemplateArguments
from models.validation import Json

GUIDED = ("json", "regex", "choice", "grammar")  # of `structured_outputs`, whose older names begin with "guided_"


class Reasoning(Struct, forbid_unknown_fields=True):
    """`reasoning`, as the Responses API has it."""

    effort: ReasoningEffort = None
    summary: Any = None  # ignored


class ChatBody(CompletionBody, forbid_unknown_fields=True, kw_only=True):
    """The parameters of Chat Completions that are not options."""

    messages: Messages
    tools: ChatTools = field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: Switch = None
    response_format: Annotated[ResponseFormat | None, Meta(description='{"type": "json_schema", ...}')] = None
    structured_outputs: StructuredOutputs | None = None
    logprobs: Switch = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None, Meta(description="a whole number from 0 to 20")
    ] = None
    reasoning: Annotated[Reasoning | None, Meta(description='{"effort": "..."}')] = None
    chat_template_kwargs: TemplateArguments = field(default_factory=dict)


def parse_chat_completion(body: bytes, models: ModelList, user: str) -> CompletionRequest:
    """The request of a user in a body. Raises APIError if anything in it is wrong."""
    model, chosen, values = take_values(body, models)
    if "messages" in values:
        values["messages"] = without_neutral(values["messages"])
    images = take_images(values.get("messages")) if model.has_images else {}
    guided = {name: values.pop(f"guided_{name}") for name in GUIDED if f"guided_{name}" in values}
    if guided:
        values.setdefault("structured_outputs", guided)
    parsed = _convert(values)
    messages = make_messages(parsed.messages, images)
    if parsed.reasoning and parsed.reasoning.effort:
        chosen.setdefault("reasoning_effort", parsed.reasoning.effort)
    format = parsed.response_format.as_format() if parsed.response_format else PLAIN_TEXT
    chat = ChatRequest(
        user,
        messages,
        check_options(chosen, model),
        parse_tools(parsed.tools, parsed.tool_choice, parsed.parallel_tool_calls is not False),
        choose_format(format, parsed.structured_outputs, "response_format"),
        _top_logprobs(parsed),
        parsed.chat_template_kwargs,
        model=model.name,
    )
    return CompletionRequest.of(parsed, chat)


def _convert(values: Json) -> ChatBody:
    try:
        return convert_body(values, ChatBody)
    except InvalidValueError as error:
        if re.fullmatch(PART_PARAM, str(error.param)):
            raise UnsupportedParameterError(str(error), str(error.param)) from None
        raise


def _top_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise InvalidValueError("top_logprobs needs logprobs: true", "top_logprobs")
    return body.top_logprobs or 0 if body.logprobs else None
