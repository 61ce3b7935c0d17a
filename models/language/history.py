"""The messages of a conversation, made ready for a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from models.messages import Message, ToolCall


def text_of(message: Message) -> str:
    """All text that a message may bring into a prompt."""
    calls = (f"{call['name']}{call['arguments']}" for call in message.get("tool_calls", ()))
    return "".join([message.get("reasoning", ""), message["content"], *calls])


def merged(messages: Iterable[Message]) -> list[Message]:
    """The messages, with the parts of one reply in one message: reasoning, then text, then calls."""
    result: list[Message] = []
    for message in messages:
        if result and _continues(result[-1], message):
            result[-1] = _joined(result[-1], message)
        else:
            result.append(message)
    return result


def _continues(before: Message, message: Message) -> bool:
    """Whether a message is the next part of the reply before it."""
    if not before["role"] == message["role"] == "assistant" or (before["content"] and message["content"]):
        return False
    ended = bool(before["content"] or before.get("tool_calls"))
    return not (ended and message.get("reasoning"))


def _joined(before: Message, message: Message) -> Message:
    joined: Message = {"role": "assistant", "content": before["content"] or message["content"]}
    if reasoning := "\n\n".join(filter(None, (part.get("reasoning") for part in (before, message)))):
        joined["reasoning"] = reasoning
    if calls := [*before.get("tool_calls", ()), *message.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    return joined


def without_empty(messages: Iterable[Message]) -> list[Message]:
    """The messages without empty ones; reasoning alone is an empty reply.

    Two messages of one role around an empty reply become one message, since many templates want the roles to alternate.
    """
    kept: list[Message] = []
    skipped = False
    for message in messages:
        said = message["content"] or message.get("images") or message.get("tool_calls")
        empty = not said and message["role"] != "tool"
        if empty:
            skipped = True
            continue
        if skipped and kept and kept[-1]["role"] == message["role"] and can_join(kept[-1], message):
            kept[-1] = {**kept[-1], "content": f"{kept[-1]['content']}\n\n{message['content']}"}
        else:
            kept.append(message)
        skipped = False
    return kept


def can_join(before: Message, message: Message) -> bool:
    """Whether two messages of one role can become one, with both their texts."""
    if before.get("images") or message.get("images"):
        return False
    return message["role"] != "tool" and not before.get("tool_calls") and not message.get("tool_calls")


def without_old_reasoning(messages: Sequence[Message]) -> list[Message]:
    """The same messages, without the reasoning of the replies before the last question."""
    last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=0)
    kept = [*messages]
    for index, message in enumerate(messages[:last]):
        if "reasoning" in message:
            kept[index] = message.copy()
            del kept[index]["reasoning"]
    return kept


def calls_as_text(messages: Iterable[Message]) -> list[Message]:
    """The messages for a template that knows no calls: they and their results are text, as in Hermes' format."""
    result: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            result.append({"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"})
        elif calls := message.get("tool_calls"):
            texts = [message["content"], *map(_call_as_text, calls)]
            result.append({"role": "assistant", "content": "\n".join(filter(None, texts))})
        else:
            result.append(message)
    return result


def _call_as_text(call: ToolCall) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(call["name"])}, "arguments": {call["arguments"]}}}\n</tool_call>'


def with_instructions(system: Sequence[Message], instructions: str | None, operators: str | None) -> list[Message]:
    """The system prompt, with the instructions of a request before it.

    The operator's are for requests without a system message.
    """
    if instructions and (not system or instructions != operators):
        return [{"role": "system", "content": instructions}, *system]
    return [*system]


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system prompt, and the turns. A turn is a user message and its reply, after any system messages.

    The result of a call is in the turn of the call.
    """
    start = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    ends, together = _last_results(messages), 0  # up to where all messages are in one turn
    turns: list[list[Message]] = []
    for index, message in enumerate(messages[start:], start):
        begins = message["role"] in ("system", "user") and index > together
        if not turns or (begins and turns[-1][-1]["role"] != "system"):
            turns.append([])
        turns[-1].append(message)
        together = max(together, ends[index])
    return [*messages[:start]], turns


def _last_results(messages: Sequence[Message]) -> list[int]:
    """For each message, where the last result of its calls is; its own place if it has none."""
    ends = [*range(len(messages))]
    callers: dict[str, int] = {}
    for index, message in enumerate(messages):
        callers |= {call["id"]: index for call in message.get("tool_calls", ())}
        if (caller := callers.get(message.get("tool_call_id", ""))) is not None:
            ends[caller] = index
    return ends
