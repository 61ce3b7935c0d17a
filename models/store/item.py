"""A node of a conversation's tree as it is stored: an input message, or a reply. And functions over paths of nodes."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from itertools import takewhile
from typing import Any

from models.messages import Image, Message, Role, ToolCall
from models.output_item import OutputItem, OutputType

TITLE_LENGTH = 60

PREFIXES: Mapping[OutputType, str] = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
PART_ID = re.compile(r"(?:msg|rs|fc)_([^_]+)_([0-9]+)")


class Status(StrEnum):
    """Whether a reply is still in progress, or how it ended. A deleted message has a status too."""

    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"  # ended by max_output_tokens, the context, or the user's next input
    CANCELLED = "cancelled"
    FAILED = "failed"
    DELETED = "deleted"  # its text is gone; its row stays while others come after it


class Edge(Enum):
    """The start or the end of a conversation, as a place without an item."""

    START = 0  # before the first item
    END = 1  # after the current leaf


@dataclass(frozen=True)
class Item:
    """A node as it is stored. `parent` is the node before it; the store sets it.

    The fields after `tool_call_id` belong to replies, whose `content` is the text of all messages in the output.
    """

    id: str
    role: Role
    content: str
    created: float  # Unix seconds
    parent: str | None = None  # None: it is the first
    images: Sequence[Image] | None = None  # this field and the next three are those of an input message
    reasoning: str | None = None
    tool_calls: Sequence[ToolCall] | None = None
    tool_call_id: str | None = None
    status: Status | None = None
    reason: str | None = None  # why the reply ended
    failure: str | None = None  # the same in words, if there is more to tell
    usage: Mapping[str, int] | None = None  # token counts
    options: Mapping[str, Any] | None = None  # the options that differ from the defaults
    left_out: int | None = None  # how many of the oldest messages after the system prompt the model did not see
    output: Sequence[OutputItem] = ()
    request: Mapping[str, Any] | None = None  # what else the protocol wants to know of the request, as JSON
    previous: str | None = None  # the previous_response_id of the request
    ended: float | None = None  # Unix seconds
    decode_seconds: float | None = None  # from the first delta to the last

    @classmethod
    def of_message(cls, message: Message, created: float) -> Item:
        """A new node with an input message."""
        return cls(
            f"msg_{uuid.uuid4().hex}",
            message["role"],
            message["content"],
            created,
            images=message.get("images"),
            reasoning=message.get("reasoning"),
            tool_calls=message.get("tool_calls"),
            tool_call_id=message.get("tool_call_id"),
        )

    @classmethod
    def of_reply(cls, id: str, created: float, output: Iterable[OutputItem], **fields: Any) -> Item:
        """A reply with its output so far. The output is copied, since the original goes on growing."""
        parts = [
            replace(part, pieces=[*part.pieces], logprobs=None if part.logprobs is None else [*part.logprobs])
            for part in output
        ]
        content = "".join(part.text for part in parts if part.type == "message")
        return cls(id, "assistant", content, created, output=parts, **fields)

    @property
    def is_reply(self) -> bool:
        """Whether it was generated here."""
        return is_response(self.id)

    @property
    def message(self) -> Message:
        """The message that the model gets. A reply's parts are joined."""
        message: Message = {"role": self.role, "content": self.content}
        reasoning, calls = self.reasoning, self.tool_calls
        if self.is_reply:
            reasoning = "".join(part.text for part in self.output if part.type == "reasoning")
            calls = [
                {"id": part.call_id, "name": part.name, "arguments": part.text}
                for part in self.output
                if part.type == "function_call" and part.name
            ]
        if self.images:
            message["images"] = list(self.images)
        if reasoning:
            message["reasoning"] = reasoning
        if calls:
            message["tool_calls"] = list(calls)
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def is_response(id: str) -> bool:
    """Whether an id is that of a response."""
    return id.startswith("resp_")


def part_id(response: str, type: OutputType, index: int) -> str:
    """The item id of a part of a reply: `resp_<hex>` and the index in the output make `msg_<hex>_<index>`."""
    return f"{PREFIXES[type]}_{response.removeprefix('resp_')}_{index}"


def node_id(item: str) -> str:
    """The id of the node that has an item: of the reply, if the item is a part of one, else the same id."""
    match = PART_ID.fullmatch(item)
    return f"resp_{match[1]}" if match else item


def part_index(item: str) -> int | None:
    """The index in the output of a part of a reply; None for other items."""
    match = PART_ID.fullmatch(item)
    return int(match[2]) if match else None


def linked(items: Iterable[Item], parent: str | None) -> list[Item]:
    """The items, each one below the one before it; the first one is below `parent`."""
    nodes = []
    for item in items:
        nodes.append(replace(item, parent=parent))
        parent = item.id
    return nodes


def count_left_out(path: Sequence[Item]) -> int:
    """How many of the oldest messages after the system prompt the model does not see any more."""
    unseen = next((item.left_out for item in reversed(path) if item.left_out is not None), 0)
    # System messages right after the cut would be taken for the system prompt.
    return unseen + len(_system_prompt(path[len(_system_prompt(path)) + unseen :]))


def visible_messages(path: Sequence[Item]) -> list[Message]:
    """The messages that the model sees: the system prompt, and the messages that are not left out, nor deleted."""
    prompt = _system_prompt(path)
    seen = [*prompt, *path[len(prompt) + count_left_out(path) :]]
    return [item.message for item in seen if item.status is not Status.DELETED]


def _system_prompt(path: Sequence[Item]) -> list[Item]:
    """The system messages at the beginning of a path."""
    return list(takewhile(lambda item: item.role == "system", path))


def title_of(path: Sequence[Item]) -> str:
    """A title made from the beginning of the first user message; empty if there are no messages."""
    path = [item for item in path if item.status is not Status.DELETED]
    first = next((item for item in path if item.role == "user"), path[0] if path else None)
    line = " ".join(first.content.split()) if first else ""
    if len(line) <= TITLE_LENGTH:
        return line
    return f"{line[:TITLE_LENGTH].rpartition(' ')[0] or line[:TITLE_LENGTH]}…"
