"""What has gone wrong with an upstream, and what it means for a reply."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from models.errors import (
    APIError,
    ContextLengthExceededError,
    UpstreamBusyError,
    UpstreamFailedError,
    UpstreamRefusedError,
)
from models.validation import printable

MESSAGE_LENGTH = 500
MAX_RETRY_SECONDS = 3600
TOO_LONG = re.compile(  # vLLM, SGLang, llama-server, OpenAI, Parley
    r"context (length|size|window)|context_length_exceeded|exceed_context|too long|longer than the model",
    re.IGNORECASE,
)
PROMPT_TOKENS = (  # how many tokens the prompt has, in the words of vLLM, llama-server, OpenAI and Parley
    re.compile(r"\((\d+) in the messages"),
    re.compile(r"(?:has|contains)(?: at least)? (\d+) (?:input )?tokens"),
    re.compile(r"passed (\d+) input tokens"),
    re.compile(r"request \((\d+) tokens\)"),
)


def failure_of(status: int, body: bytes, retry_after: str | None = None) -> APIError:
    """The error for a request that an upstream has answered with an HTTP status other than 200."""
    return _failure(status, _decoded(body), retry_after)


def failure_in_stream(error: Any) -> APIError:
    """The error for a stream that says itself that it has failed."""
    code = error.get("code") if isinstance(error, dict) else None
    return _failure(code if isinstance(code, int) else 500, {"error": error})


def _failure(status: int, body: Any, retry_after: str | None = None) -> APIError:
    error = body.get("error", body) if isinstance(body, dict) else {}
    error = error if isinstance(error, dict) else {"message": str(error)}
    message = printable(error.get("message") or error.get("detail") or "", MESSAGE_LENGTH)
    told = f"it answers with status {status}"
    if message and status not in (401, 403):  # they may repeat the key
        told += f": {message}"
    if status in (429, 503):
        return UpstreamBusyError(told, _seconds(retry_after))
    if status not in (400, 409, 413, 415, 422):
        return UpstreamFailedError(told)
    if TOO_LONG.search(f"{error.get('type')} {error.get('code')} {message}"):
        return ContextLengthExceededError(message, _prompt_tokens(error, message))
    param = error.get("param")
    return UpstreamRefusedError(message or told, param if isinstance(param, str) else None)


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None


def _prompt_tokens(error: dict[str, Any], message: str) -> int:
    """How many tokens the prompt has, as far as the upstream tells; else 0."""
    told = error.get("n_prompt_tokens")
    if isinstance(told, int):
        return told
    found = next((match for pattern in PROMPT_TOKENS if (match := pattern.search(message))), None)
    return int(found.group(1)[:9]) if found else 0


def _seconds(retry_after: str | None) -> int | None:
    """`Retry-After` in seconds; a date counts as absent."""
    return min(int(retry_after[:9]), MAX_RETRY_SECONDS) if retry_after and retry_after.isdecimal() else None
