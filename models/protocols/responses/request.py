"""The request of the Responses API: `POST /v1/responses`, and `response.create` on a socket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from models.chat_request import ChatRequest
from models.errors import (
    InvalidValueError,
    UnsupportedParameterError,
)
from models.generation.interface import (
    Branch,
    NewConversation,
    ResponseRequest,
    StoredConversation,
    Target,
    Unstored,
)
from models.messages import Message
from models.model_info import ModelInfo, ModelList
from models.options import ReasoningEffort
from models.output_format import PLAIN_TEXT, OutputFormat
from models.protocols.function_tools import MAX_TOOLS, SCHEMA_BYTES, Function, make_tools
from models.protocols.parameters import convert_parameters, read_option, take_unsupported
from models.protocols.responses.input_items import Id, InputItem, parse_input
from models.protocols.structured_outputs import Schema, StructuredOutputs, choose_format
from models.protocols.template_arguments import TemplateArguments
from models.store.conversations import Conversations
from models.store.item import Edge
from models.tools import Tool, Tools
from models.validation import NO_SURROGATE, Json, Text, check_json, convert, printable

NEW = "new"  # in place of the id of a conversation
MAX_PAIRS = 16  # of metadata

OPTIONS = (  # parameters that are options of the same name; those after max_output_tokens are ours
    "instructions",
    "temperature",
    "top_p",
    "max_output_tokens",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "stop",
    "seed",
    "logit_bias",
)
ECHOED = (  # what a response tells of its request, beside its options
    "background",
    "max_tool_calls",
    "metadata",
    "model",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "store",
    "top_logprobs",
    "truncation",
    "user",
)
IGNORED = (  # parameters that cannot change the reply: OpenAI's, those of its clients, and vLLM's
    "cache_salt",
    "client_metadata",
    "priority",
    "prompt_cache_options",
    "prompt_cache_retention",
    "request_id",
    "service_tier",
    "stream_options",
)
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {  # parameters, with the values that have no effect
    "context_management": ([],),
    "enable_response_messages": (False,),
    "include_stop_str_in_output": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "prompt": (),
    "skip_special_tokens": (True,),
}

Switch = Annotated[bool, Meta(description="true or false")]
Label = Annotated[str, Meta(max_length=512, pattern=NO_SURROGATE, description="text of at most 512 characters")]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Label],
    Meta(max_length=MAX_PAIRS, description=f"an object of up to {MAX_PAIRS} texts of at most 512 characters"),
]
ToolList = Annotated[
    list[Annotated[dict[str, Any], Meta(description='{"type": "function", ...}')]],
    Meta(max_length=MAX_TOOLS, description=f"a list of up to {MAX_TOOLS} tools"),
]


class _Format(Struct):
    """The form of the text. Without a schema, "json_schema" means any object, as in Chat Completions."""

    type: Annotated[Literal["text", "json_object", "json_schema"], Meta(description="text, json_object or json_schema")]
    name: Text | None = None
    description: Text | None = None
    schema: Schema | None = None
    strict: Switch | None = None

    def __post_init__(self) -> None:
        if self.type == "json_schema" and self.schema is None:
            self.type = "json_object"


class _Text(Struct, frozen=True):
    format: Annotated[_Format | None, Meta(description='{"type": ...}')] = None
    verbosity: Annotated[Literal["low", "medium", "high"] | None, Meta(description="low, medium or high")] = None


class _Reasoning(Struct, frozen=True):
    """How the model thinks; there are no summaries of it, so fields that ask for some are ignored."""

    effort: ReasoningEffort = None


class ConversationReference(Struct, frozen=True, forbid_unknown_fields=True):
    """A conversation, and the item after which the request continues it; None is before the first one."""

    id: Id
    after: Id | UnsetType | None = UNSET

    @property
    def continues(self) -> bool:
        """Whether there may be messages before the request."""
        return self.id != NEW and self.after is not None


class _Body(Struct, forbid_unknown_fields=True):
    """The parameters that are not options."""

    model: Text | None = None
    stream: Switch = False
    store: Switch = True
    background: Switch = False
    generate: Switch = True
    ignore_eos: Switch = False
    previous_response_id: Id | None = None
    conversation: Annotated[Id | ConversationReference | None, Meta(description="an id, or an object with it")] = None
    include: Annotated[list[Text], Meta(max_length=64, description="a list of up to 64 texts")] = field(
        default_factory=list
    )
    metadata: Metadata = field(default_factory=dict)
    text: Annotated[_Text, Meta(description='{"format": ...}')] = _Text()
    structured_outputs: StructuredOutputs | None = None
    reasoning: Annotated[_Reasoning, Meta(description='{"effort": ...}')] = _Reasoning()
    tools: ToolList = field(default_factory=list)
    tool_choice: Any = "auto"
    parallel_tool_calls: Switch = True
    truncation: Annotated[Literal["auto", "disabled"], Meta(description="auto or disabled")] = "disabled"
    top_logprobs: Annotated[int, Meta(ge=0, le=20, description="a whole number from 0 to 20")] | None = None
    chat_template_kwargs: TemplateArguments = field(default_factory=dict)
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    max_tool_calls: Annotated[
        Annotated[int, Meta(ge=1, le=2**31)] | None, Meta(description="a whole number, 1 or more, or null")
    ] = None  # of hosted tools, which there are none of


@dataclass(frozen=True)
class ResponsesRequest:
    """A request for a response. `options` has only the options that the request names."""

    model: ModelInfo
    input: Sequence[InputItem]
    options: Mapping[str, Any]
    tools: Tools
    format: OutputFormat
    top_logprobs: int | None
    template_arguments: Mapping[str, Any]
    truncate: bool
    stream: bool
    store: bool
    background: bool
    generate: bool
    ignore_eos: bool
    previous: str | None
    conversation: ConversationReference | None
    details: Json
    end_user: str | None  # the person for whom our user sends the request

    @classmethod
    def parse(cls, values: Json, models: ModelList) -> ResponsesRequest:
        """The request in an object of JSON. Raises APIError if anything in it is wrong."""
        values = {name: value for name, value in values.items() if value is not None and name not in IGNORED}
        take_unsupported(values, UNSUPPORTED)
        options = {name: read_option(name, values.pop(name), name) for name in OPTIONS if name in values}
        input = values.pop("input", [])
        body = convert_parameters(values, _Body)
        model = models.choose(body.model)
        messages = parse_input(input, has_images=model.has_images)
        if body.reasoning.effort is not None:
            options["reasoning_effort"] = body.reasoning.effort
        conversation = body.conversation
        if isinstance(conversation, str):
            conversation = ConversationReference(conversation)
        _check(body, conversation, messages)
        tools = _tools(body)
        wants_logprobs = body.top_logprobs or "message.output_text.logprobs" in body.include
        return cls(
            model=model,
            input=messages,
            options=options,
            tools=tools,
            format=choose_format(_text_format(body.text.format), body.structured_outputs, "text.format"),
            top_logprobs=body.top_logprobs or 0 if wants_logprobs else None,
            template_arguments=body.chat_template_kwargs,
            truncate=body.truncation == "auto",
            stream=body.stream,
            store=body.store,
            background=body.background,
            generate=body.generate,
            ignore_eos=body.ignore_eos,
            previous=body.previous_response_id,
            conversation=conversation,
            details={"model": model.name} | _details(values, body, tools),
            end_user=body.user or body.safety_identifier or body.prompt_cache_key,
        )

    def response_request(self, user: str, messages: Iterable[Message], target: Target | None = None) -> ResponseRequest:
        """The request in the form of the domain, with these messages, and for another target if one is given."""
        chat = self._chat_request(user, messages)
        return ResponseRequest(
            chat, target or self.target(), self.background, self.generate, self.previous, self.details
        )

    def _chat_request(self, user: str, messages: Iterable[Message]) -> ChatRequest:
        return ChatRequest(
            user,
            list(messages),
            self.model.defaults.updated(self.options),
            self.tools,
            self.format,
            self.top_logprobs,
            self.template_arguments,
            self.truncate,
            ignore_eos=self.ignore_eos,
            model=self.model.name,
        )

    def target(self) -> Target:
        """Where the response is stored."""
        if self.conversation is not None:
            if self.conversation.id == NEW:
                return NewConversation(Conversations.new_id())
            after: str | Edge | UnsetType | None = self.conversation.after
            after = Edge.END if after is UNSET else Edge.START if after is None else after
            return StoredConversation(self.conversation.id, after)
        if not self.store:
            return Unstored(self.previous)
        return Branch(self.previous) if self.previous else NewConversation(Conversations.new_id(), listed=False)


def _check(body: _Body, conversation: ConversationReference | None, items: Sequence[InputItem]) -> None:
    """Raise InvalidValueError if parameters do not go together."""
    continues = body.previous_response_id or (conversation and conversation.continues)
    if body.generate and not continues and not any(map(_has_content, items)):
        raise InvalidValueError("input must contain text", "input")
    if body.previous_response_id and conversation:
        told = "previous_response_id and conversation cannot be used together"
        raise InvalidValueError(told, "previous_response_id")
    if not body.store and (body.background or conversation):
        told = "store must be true for a response in the background, or of a conversation"
        raise InvalidValueError(told, "store")


def _has_content(item: InputItem) -> bool:
    return not isinstance(item, dict) or bool(item["content"].strip() or item.keys() - {"role", "content"})


def _tools(body: _Body) -> Tools:
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools)]
    match body.tool_choice:
        case "auto" | "none" | "required" as choice:
            return make_tools(tools, choice, None, body.parallel_tool_calls)
        case {"type": "function", "name": str(name)}:
            return make_tools(tools, "required", frozenset([printable(name)]), parallel=False)
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": [*allowed]}:
            return make_tools(tools, mode, _names(allowed), body.parallel_tool_calls)
    raise _bad_choice()


def _tool(value: Json, at: str) -> Tool:
    if value.get("type") != "function":
        kind = printable(value.get("type"), 64)
        raise UnsupportedParameterError(f"{at}: tools of the type {kind} are not supported, only functions", at)
    return convert(value, Function, at).as_tool(at)


def _names(tools: list[Any]) -> frozenset[str]:
    """The names of the functions of `allowed_tools`."""
    names = [tool.get("name") for tool in tools if isinstance(tool, dict) and tool.get("type") == "function"]
    if not names or len(names) != len(tools) or not all(isinstance(name, str) for name in names):
        raise _bad_choice()
    return frozenset(map(printable, names))


def _bad_choice() -> InvalidValueError:
    told = 'auto, none, required, {"type": "function", "name": "..."}, or allowed_tools with functions'
    return InvalidValueError(f"tool_choice must be {told}", "tool_choice", told)


def _text_format(format: _Format | None) -> OutputFormat:
    if format is None or format.type == "text":
        return PLAIN_TEXT
    if format.type == "json_object":
        return OutputFormat("json_object")
    at = "text.format.schema"
    check_json(format.schema, at, SCHEMA_BYTES)
    return OutputFormat("json_schema", format.schema, at, format.strict)


def _details(values: Json, body: _Body, tools: Tools) -> Json:
    """What the response tells of its request, where that is not what is usual."""
    details = {name: values[name] for name in ECHOED if name in values}
    if body.text != _Text():
        details["text"] = _told_text(body.text)
    if tools.tools:
        details["tools"] = [{"type": "function", **vars(tool)} for tool in tools.tools]
    if tools.tools or tools.choice != "auto":
        details["tool_choice"] = _told_choice(tools)
    return details


def _told_choice(tools: Tools) -> Json | str:
    if tools.allowed is None:
        return tools.choice
    named = [{"type": "function", "name": name} for name in sorted(tools.allowed)]
    if tools.choice == "required" and len(named) == 1:
        return named[0]
    return {"type": "allowed_tools", "mode": tools.choice, "tools": named}


def _told_text(text: _Text) -> Json:
    format = text.format or _Format("text")
    fields = ("type", "name", "description", "schema", "strict") if format.type == "json_schema" else ("type",)
    told = {"format": {name: getattr(format, name) for name in fields}}
    return told if text.verbosity is None else told | {"verbosity": text.verbosity}
