"""The messages of a request of Chat Completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from models.errors import InvalidValueError, UnsupportedParameterError
from models.messages import MAX_MESSAGES, Message, Role, ToolCall
from models.protocols.function_tools import FunctionName
from models.protocols.image_parts import PART_TYPES, Content as MessageContent
from models.validation import NO_SURROGATE, Text, convert

MAX_CALLS = 128  # in one message

ROLES: Mapping[str, Role] = {
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
NEUTRAL = ("annotations", "cache_control", "id", "name", "provider_specific_fields", "reasoning_details")

CallId = Annotated[str, Meta(min_length=1, max_length=256, pattern=NO_SURROGATE, description="text, as in tool_calls")]


class TextPart(Struct, forbid_unknown_fields=True):
    """One part of a message."""

    type: Literal["text"]
    text: Text
    cache_control: Any = None  # ignored


class CalledFunction(Struct, forbid_unknown_fields=True):
    """What a call calls; `arguments` is JSON text."""

    name: FunctionName
    arguments: Text = ""


class Call(Struct, forbid_unknown_fields=True):
    """One call of a tool. Streams have an index, which clients send back."""

    id: CallId
    function: CalledFunction
    type: Annotated[Literal["function"], Meta(description="function: other calls are not supported")] = "function"
    index: Any = None


PART = Meta(description='{"type": "text", "text": "..."}: only text is supported', extra={"report_object": True})
PART_PARAM = r"messages\[\d+\]\.content\[\d+\]"
Content = Text | list[Annotated[TextPart, PART]]
Calls = Annotated[
    list[Annotated[Call, Meta(description='{"id": "...", "type": "function", "function": {...}}')]],
    Meta(max_length=MAX_CALLS, description=f"a list of up to {MAX_CALLS} calls"),
]


class ChatMessage(Struct, forbid_unknown_fields=True):
    """One message. Only a message of the assistant may have no content."""

    role: Annotated[
        Literal["developer", "system", "user", "assistant", "tool", "function"],
        Meta(description=f"one of {', '.join(ROLES)}"),
    ]
    content: Annotated[Content | None, Meta(description="text, or a list of parts")] = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: Calls | None = None
    tool_call_id: CallId | None = None

    def as_message(self, at: str) -> Message:
        """The message in the form of the domain. Raises InvalidValueError or UnsupportedParameterError."""
        self._check(at)
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        message: Message = {"role": ROLES[self.role], "content": text}
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id or ""
        if reasoning := self.reasoning_content or self.reasoning:
            message["reasoning"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [_tool_call(call) for call in self.tool_calls]
        return message

    def _check(self, at: str) -> None:
        if self.role == "function":
            told = 'the role "function" is not supported: use "tool", with a tool_call_id'
            raise UnsupportedParameterError(f"{at}.role: {told}", f"{at}.role")
        if self.role == "tool" and self.tool_call_id is None:
            raise InvalidValueError(f"{at}.tool_call_id is missing", f"{at}.tool_call_id")
        if self.role != "assistant" and self.content is None:
            raise InvalidValueError(f"{at}.content is missing", f"{at}.content")
        for name in ("reasoning_content", "reasoning", "tool_calls"):
            if self.role != "assistant" and getattr(self, name):
                raise InvalidValueError(f"{at}.{name} must be in a message of the assistant", f"{at}.{name}")


Messages = Annotated[
    list[Annotated[ChatMessage, Meta(description="an object of role and content")]],
    Meta(
        min_length=1,
        max_length=MAX_MESSAGES,
        description=f"a list of 1 to {MAX_MESSAGES} objects of role and content",
    ),
]


def without_neutral(messages: Any) -> Any:
    """Messages without what cannot change the reply, such as the empty tool calls that clients send back."""
    if not isinstance(messages, list) or len(messages) > MAX_MESSAGES:
        return messages
    return [_without_neutral(message) if isinstance(message, dict) else message for message in messages]


def _without_neutral(message: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in message.items()
        if name == "content" or (name not in NEUTRAL and value not in (None, [], {}))
    }


def take_images(messages: Any) -> dict[int, MessageContent]:
    """Take the parts out of the messages of users that have pictures; returns them, by the places of the messages.

    Raises InvalidValueError.
    """
    taken: dict[int, MessageContent] = {}
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        match message:
            case {"role": "user", "content": [*parts]} if any(map(_is_image, parts)):
                taken[index] = _with_images(parts, f"messages[{index}].content")
                message["content"] = taken[index].text
    return taken


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in PART_TYPES


def _with_images(parts: list[Any], at: str) -> MessageContent:
    content = MessageContent()
    for index, part in enumerate(parts):
        param = f"{at}[{index}]"
        if _is_image(part):
            content.add_image(part, param, has_images=True)
        else:
            content.add_text(convert(part, TextPart, param).text)
    return content


def make_messages(messages: list[ChatMessage], images: Mapping[int, MessageContent] | None = None) -> list[Message]:
    """The messages in the form of the domain. Raises InvalidValueError or UnsupportedParameterError."""
    made = [message.as_message(f"messages[{index}]") for index, message in enumerate(messages)]
    for index, content in (images or {}).items():
        made[index]["images"] = content.images
    if not any(message["content"].strip() or "images" in message for message in made):
        raise InvalidValueError("messages must contain text", "messages")
    return made


def _tool_call(call: Call) -> ToolCall:
    arguments = call.function.arguments
    return {"id": call.id, "name": call.function.name, "arguments": arguments if arguments.strip() else "{}"}
