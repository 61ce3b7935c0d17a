"""What upstreams are asked: a request in the form of Chat Completions, or of Completions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from models.chat_request import ChatRequest
from models.errors import UnsupportedParameterError
from models.messages import Image, Message, parts_of
from models.options import Options
from models.tools import Tool, Tools
from models.upstream.kinds import Body, Kind

NEUTRAL = Options(  # values that change nothing
    temperature=None,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
)
ELSEWHERE = ("instructions", "reasoning_effort")  # options that are no sampling parameters


def body_of(request: ChatRequest, kind: Kind, model: str) -> Body:
    """The fields of a request, but for its messages. Raises UnsupportedParameterError for what a kind cannot do."""
    body: Body = {"model": model, "stream": True, **kind.extras, **_sampling(request.options, kind)}
    if request.options.reasoning_effort is not None:
        body |= kind.effort(request.options.reasoning_effort)
    if request.template_arguments:
        _check(kind.template_arguments, "chat_template_kwargs")
        body["chat_template_kwargs"] = body.get("chat_template_kwargs", {}) | dict(request.template_arguments)
    if request.ignore_eos:
        _check(kind.template_arguments, "ignore_eos")
        body["ignore_eos"] = True
    if request.format.type != "text":
        fields = kind.format(request.format)
        _check(fields is not None, request.format.param)
        body |= fields or {}
    if request.top_logprobs is not None:
        in_chat: Body = {"logprobs": True, "top_logprobs": request.top_logprobs}
        body |= in_chat if request.prompt is None else {"logprobs": request.top_logprobs}
    if kind.salted:  # no user can measure what others have asked
        body["cache_salt"] = hashlib.sha256(request.user.encode()).hexdigest()
    return body | _tools(request.tools)


def _sampling(options: Options, kind: Kind) -> Body:
    """The options that are set, by the names that they have there."""
    body: Body = {}
    for name, value in options.as_json().items():
        if name in ELSEWHERE or value in (None, [], {}):
            continue
        if name in kind.options:
            body[kind.options[name]] = value
        else:
            _check(value == getattr(NEUTRAL, name), name)
    if body.get("top_k") == 0:
        body["top_k"] = kind.top_k_off
    if "seed" in body:
        body["seed"] %= kind.seeds
    return body


def _check(is_supported: bool, param: str) -> None:
    if not is_supported:
        raise UnsupportedParameterError(f"{param} is not supported by the server that runs this model", param)


def _tools(tools: Tools) -> Body:
    if not tools.callable:
        return {}
    choice: Body = {"tools": [_tool(tool) for tool in tools.callable], "tool_choice": tools.choice}
    return choice if tools.parallel else choice | {"parallel_tool_calls": False}


def _tool(tool: Tool) -> Body:
    function: Body = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    told = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": told | ({"strict": True} if tool.strict else {})}


def render_messages(messages: Sequence[Message], kind: Kind) -> list[Mapping[str, Any]]:
    """Messages in the form of Chat Completions."""
    return [_message(message, kind) for message in messages]


def _part(part: str | Image) -> Body:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": part["url"]}}


def _message(message: Message, kind: Kind) -> Body:
    told: Body = {"role": message["role"], "content": message["content"]}
    if "images" in message:
        told["content"] = [_part(part) for part in parts_of(message)]
    if reasoning := message.get("reasoning"):
        told |= dict.fromkeys(kind.reasoning_fields, reasoning)
    if calls := message.get("tool_calls"):
        told["content"] = message["content"] or None
        told["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in calls
        ]
    if message["role"] == "tool":
        told["tool_call_id"] = message.get("tool_call_id", "")
    return told
