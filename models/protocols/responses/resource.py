"""The response object of the Responses API, and its output items."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from models.model_info import ModelList
from models.output_item import OutputItem
from models.protocols.logprobs import render_logprobs
from models.store.item import Item, Status, part_id
from models.validation import Json

INCOMPLETE = {"context_length": "max_output_tokens"}  # reasons that have another name in the standard
FAILURES: Mapping[str | None, str] = {  # messages
    "format_failed": "The reply could not go on in its format: it is too complex, or a dead end; make it simpler.",
    "server_shutdown": "The server stopped before the reply ended.",
    "revoked": "The user's secret is no longer valid.",
    "upstream_failed": "The server that runs the model has failed; try again.",
    "upstream_busy": "The server that runs the model has too many requests; try again later.",
    "upstream_unavailable": "No server that runs the model can be reached; try again later.",
}
CLIENT_FAILURES = ("format_failed", "upstream_refused", "context_length_exceeded")
UNUSUAL = ("top_k", "min_p", "repetition_penalty", "stop", "seed", "logit_bias")  # options that OpenAI does not tell
DEFAULTS: Mapping[str, Any] = {  # what a response tells of a request that names none of these
    "background": False,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "truncation": "disabled",
    "user": None,
}


def render_response(models: ModelList, conversation: str | None, reply: Item, status: str | None = None) -> Json:
    """A response, as far as it is. `status` is told instead of its own, if it is given."""
    details = reply.request or {}
    model = models.of(details.get("model"))
    options = model.defaults.updated(reply.options or {})
    failed, usage, reason = reply.status == Status.FAILED, reply.usage, str(reply.reason)
    return {
        "id": reply.id,
        "object": "response",
        "created_at": int(reply.created),
        "completed_at": int(reply.ended) if reply.ended and reply.status == Status.COMPLETED else None,
        "status": status or reply.status,
        "error": _error(reply) if failed else None,
        "incomplete_details": {"reason": INCOMPLETE.get(reason, reason)} if reply.status == Status.INCOMPLETE else None,
        "model": model.name,
        "output": render_output(reply),
        "usage": _usage(usage) if usage and reply.status != Status.IN_PROGRESS else None,
        "previous_response_id": reply.previous,
        "conversation": {"id": conversation} if conversation else None,
        "instructions": options.instructions,
        "max_output_tokens": options.max_output_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "frequency_penalty": options.frequency_penalty,
        "presence_penalty": options.presence_penalty,
        "reasoning": {"effort": options.reasoning_effort, "summary": None},
        **DEFAULTS,
        **details,
        **{name: value for name, value in (reply.options or {}).items() if name in UNUSUAL},
    }


def render_details(node: Item) -> Json:
    """What a chat page wants to know of a node, beside what OpenAI's API tells. `parent` is the node before it."""
    if not node.is_reply:
        return {"parent": node.parent}
    return {
        "parent": node.parent,
        "reason": node.reason,
        "options": node.options,
        "left_out": node.left_out,
        "decode_seconds": node.decode_seconds,
    }


def render_output(reply: Item) -> list[Json]:
    """The parts of a reply, as far as they are, but for deleted ones."""
    return [_output_item(reply, index, item) for index, item in enumerate(reply.output) if not item.is_deleted]


def _output_item(reply: Item, index: int, item: OutputItem) -> Json:
    is_open = reply.status == Status.IN_PROGRESS and index + 1 == len(reply.output)
    return render_part(part_id(reply.id, item.type, index), item, "in_progress" if is_open else None)


def render_part(id: str, item: OutputItem, status: str | None = None, is_empty: bool = False) -> Json:
    """One part of a reply, with its text, or before it has any. `status` is told instead of its own, if it is given."""
    head: Json = {"id": id, "type": item.type, "status": status or ("completed" if item.complete else "incomplete")}
    if item.type == "function_call":
        return head | {"call_id": item.call_id, "name": item.name, "arguments": "" if is_empty else item.text}
    content = [] if is_empty else [render_content(item)]
    if item.type == "reasoning":
        return head | {"summary": [], "content": content, "encrypted_content": None}
    return head | {"role": "assistant", "content": content}


def render_content(item: OutputItem, is_empty: bool = False) -> Json:
    """The content part of a message or of reasoning, with its text, or before it has any."""
    text = "" if is_empty else item.text
    if item.type == "reasoning":
        return {"type": "reasoning_text", "text": text}
    logprobs = [] if is_empty else render_logprobs(chain.from_iterable(item.logprobs or ()))
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(usage: Mapping[str, int]) -> Json:
    return {
        "input_tokens": usage["input_tokens"],
        "input_tokens_details": {"cached_tokens": usage["cached_tokens"], "cache_write_tokens": 0},
        "output_tokens": usage["output_tokens"],
        "output_tokens_details": {"reasoning_tokens": usage.get("reasoning_tokens", 0)},
        "total_tokens": usage["total_tokens"],
    }


def _error(reply: Item) -> Json:
    """Why the reply has failed. The standard has no type here, but the AI SDK needs one."""
    message = reply.failure or FAILURES.get(reply.reason, "The server could not finish the reply; try again.")
    if reply.reason in CLIENT_FAILURES:  # of the few codes of the standard, the one for what the client can change
        return {"type": "invalid_request_error", "code": "invalid_prompt", "message": message}
    return {"type": "server_error", "code": "server_error", "message": message}
