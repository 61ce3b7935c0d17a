"""The input items of the Responses API: parses them into messages, and renders messages as items."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from models.errors import InvalidValueError, ItemNotFoundError, UnsupportedParameterError
from models.messages import MAX_MESSAGES, Image, Message, Role, ToolCall, length, parts_of
from models.protocols.image_parts import Content as MessageContent
from models.validation import NO_SURROGATE, Json, Text, convert, printable

ROLES: Mapping[str, Role] = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
MAX_REFERRED = 2**20  # characters in the items that one request refers to: as many as it could have in itself
TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")

Id = Annotated[
    str, Meta(min_length=1, max_length=256, pattern=NO_SURROGATE, description="a string of 1 to 256 characters")
]
Parts = Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES, description="a list of parts")]
Content = Annotated[
    Annotated[str, Meta(pattern=NO_SURROGATE)] | Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES)],
    Meta(description="text, or a list of parts"),
]


@dataclass(frozen=True)
class ItemReference:
    """A stored item, in place of its text."""

    id: str
    param: str  # the name of the parameter, for errors


InputItem = Message | ItemReference


class _Typed(Struct):
    type: Text = "message"


class _Message(Struct):
    role: Annotated[Literal["developer", "system", "user", "assistant"], Meta(description=f"one of {', '.join(ROLES)}")]
    content: Content


class _FunctionCall(Struct):
    call_id: Id
    name: Id
    arguments: Text


class _FunctionCallOutput(Struct):
    call_id: Id
    output: Content


class _Reasoning(Struct):
    summary: Parts | None = None
    content: Parts | None = None


class _Reference(Struct):
    id: Id


class _Part(Struct):
    type: Text
    text: Text | None = None
    refusal: Text | None = None


def parse_input(value: Any, at: str = "input", has_images: bool = False) -> list[InputItem]:
    """The messages of an input: text, or a list of items; `has_images` allows pictures. Raises InvalidRequestError."""
    if isinstance(value, str):
        return [{"role": "user", "content": convert(value, Text, at)}]
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        raise InvalidValueError(f"{at} must be text, or a list of at most {MAX_MESSAGES} items", at)
    return [_parse_item(item, f"{at}[{index}]", has_images) for index, item in enumerate(value)]


async def resolve(items: Iterable[InputItem], find: Callable[[str], Awaitable[Message]]) -> list[Message]:
    """The items, with stored ones in place of references, each of which is read once.

    Raises ItemNotFoundError, which names the reference, or InvalidValueError if the stored ones are too long.
    """
    messages: list[Message] = []
    found: dict[str, Message] = {}
    referred = 0
    for item in items:
        if not isinstance(item, ItemReference):
            messages.append(item)
            continue
        try:
            message = found[item.id] = found.get(item.id) or await find(item.id)
        except ItemNotFoundError:
            raise ItemNotFoundError(f"{item.param} is an item that does not exist", item.param) from None
        referred += length(message)
        if referred > MAX_REFERRED:
            told = f"items that have at most {MAX_REFERRED:,} characters together"
            raise InvalidValueError(f"{item.param} must refer to {told}", item.param, told)
        messages.append(message)
    return messages


def _parse_item(item: Any, at: str, has_images: bool) -> InputItem:
    match convert(item, _Typed, at).type:
        case "message":
            return _parse_message(convert(item, _Message, at), f"{at}.content", has_images)
        case "function_call":
            call = convert(item, _FunctionCall, at)
            tool_call: ToolCall = {"id": call.call_id, "name": call.name, "arguments": call.arguments}
            return {"role": "assistant", "content": "", "tool_calls": [tool_call]}
        case "function_call_output":
            output = convert(item, _FunctionCallOutput, at)
            return {"role": "tool", "content": _text(output.output, f"{at}.output"), "tool_call_id": output.call_id}
        case "reasoning":
            reasoning = convert(item, _Reasoning, at)
            name = "content" if reasoning.content else "summary"
            text = _text(getattr(reasoning, name) or (), f"{at}.{name}")
            return {"role": "assistant", "content": "", "reasoning": text}
        case "item_reference":
            return ItemReference(convert(item, _Reference, at).id, at)
        case other:
            raise UnsupportedParameterError(f"{at}: items of type {printable(other, 64)} are not supported", at)


def _parse_message(message: _Message, at: str, has_images: bool) -> Message:
    content = _content(message.content, at, has_images and message.role == "user")
    parsed: Message = {"role": ROLES[message.role], "content": content.text}
    return {**parsed, "images": content.images} if content.images else parsed


def _text(content: str | Sequence[Any], at: str) -> str:
    """The text of a content; that of several parts in lines. Raises UnsupportedParameterError."""
    return _content(content, at, has_images=False).text


def _content(content: str | Sequence[Any], at: str, has_images: bool) -> MessageContent:
    result = MessageContent()
    if isinstance(content, str):
        result.add_text(content)
        return result
    for index, value in enumerate(content):
        part, param = convert(value, _Part, f"{at}[{index}]"), f"{at}[{index}]"
        if part.type == "input_image":
            result.add_image(value, param, has_images)
            continue
        if part.type not in TEXT_PARTS:
            kind = printable(part.type, 64)
            raise UnsupportedParameterError(f"{param}: {kind} is not supported, this server reads only text", param)
        text = part.refusal if part.type == "refusal" else part.text
        if text is None:
            raise InvalidValueError(f"{param}.text must be text", f"{param}.text")
        result.add_text(text)
    return result


def render_message(id: str, message: Message) -> Json:
    """An input item with a message."""
    if calls := message.get("tool_calls"):
        call = calls[0]
        named = {"call_id": call["id"], "name": call["name"], "arguments": call["arguments"]}
        return {"id": id, "type": "function_call", "status": "completed"} | named
    if message["role"] == "tool":
        answered = {"call_id": message.get("tool_call_id", ""), "output": message["content"]}
        return {"id": id, "type": "function_call_output", "status": "completed"} | answered
    if "reasoning" in message:
        thought = [{"type": "reasoning_text", "text": message["reasoning"]}]
        return {"id": id, "type": "reasoning", "summary": [], "content": thought, "status": "completed"}
    content: list[Json] = [{"type": "input_text", "text": message["content"]}]
    if message["role"] == "assistant":
        content = [{"type": "output_text", "text": message["content"], "annotations": [], "logprobs": []}]
    elif "images" in message:
        content = [_render_part(part) for part in parts_of(message)]
    return {"id": id, "type": "message", "role": message["role"], "status": "completed", "content": content}


def _render_part(part: str | Image) -> Json:
    if isinstance(part, str):
        return {"type": "input_text", "text": part}
    return {"type": "input_image", "image_url": part["url"], "detail": "auto"}
