"""A reply as a chat completion of OpenAI's API, whole or in chunks."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from models.errors import (
    APIError,
    ContextLengthExceededError,
    MessagesRejectedError,
    ServerError,
    ServerStoppingError,
    WrongCredentialsError,
)
from models.generation.events import Finished, Queued, Rejected, ResponseEvent, TextDelta
from models.generation.interface import ModelInfo, ResponseRequest, ResponseService, Stateless
from models.protocols.chat_completions_request import ChatCompletionRequest
from models.store.item import Item, Status
from models.validation import Json

FINISH_REASONS = {"stop": "stop", "max_output_tokens": "length", "context_length": "length"}
INPUT_ERRORS = (MessagesRejectedError, ContextLengthExceededError)  # the domain's input is the messages here
FAILURES: Mapping[str | None, type[APIError]] = {
    "server_shutdown": ServerStoppingError,
    "revoked": WrongCredentialsError,
}


class BaseChatCompletion(ABC):
    """What whole and streamed chat completions have in common: a running response, whose events come to `on_event`."""

    def __init__(self, responses: ResponseService, model: ModelInfo, user: str, request: ChatCompletionRequest) -> None:
        self._responses = responses
        self._model = model
        self._user = user
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        options = model.defaults.updated(request.options)
        self.response_id = responses.create(ResponseRequest(user, request.messages, options, Stateless()), self)

    @abstractmethod
    def on_event(self, event: ResponseEvent) -> None:
        """Handle an event of the response."""

    def cancel(self) -> None:
        """End the response, since the client has disconnected."""
        self._responses.abandon(self._user, self.response_id)

    def _object(self, kind: str, choices: list[Any]) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "choices": choices,
        }


class ChatCompletion(BaseChatCompletion):
    """A reply that is returned as one object, when it has ended."""

    def __init__(self, responses: ResponseService, model: ModelInfo, user: str, request: ChatCompletionRequest) -> None:
        self._last_event: asyncio.Future[Rejected | Finished] = asyncio.get_running_loop().create_future()
        super().__init__(responses, model, user, request)

    def on_event(self, event: ResponseEvent) -> None:
        """Keep the last event, and ignore all others."""
        if isinstance(event, Rejected | Finished) and not self._last_event.cancelled():
            self._last_event.set_result(event)

    async def result(self) -> Json:
        """The completion. Raises APIError if there is none."""
        reply = _reply_of(await self._last_event)
        message = {"role": "assistant", "content": reply.content, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(reply)}
        return self._object("chat.completion", [choice]) | {"usage": _usage(reply)}


class ChatCompletionChunks(BaseChatCompletion):
    """A reply that is sent in chunks, as server-sent events."""

    def __init__(self, responses: ResponseService, model: ModelInfo, user: str, request: ChatCompletionRequest) -> None:
        self._include_usage = request.include_usage
        self._events: asyncio.Queue[ResponseEvent] = asyncio.Queue()
        super().__init__(responses, model, user, request)

    def on_event(self, event: ResponseEvent) -> None:
        """Keep the event for the chunks."""
        self._events.put_nowait(event)

    async def wait_started(self) -> None:
        """Wait until the request is accepted. Raises APIError if it is rejected."""
        event = await self._events.get()
        if isinstance(event, Rejected):
            raise event.error

    async def frames(self) -> AsyncGenerator[str, None]:
        """The server-sent events, after the request is accepted."""
        yield self._chunk({"role": "assistant", "content": ""})
        while True:
            match await self._events.get():
                case Queued(position=position):
                    yield f": position {position} in the wait queue\n\n"  # a comment; it keeps proxies connected
                case TextDelta(text=text):
                    yield self._chunk({"content": text})
                case Finished() as finished:
                    break
        try:
            reply = _reply_of(finished)
        except APIError as error:
            yield _frame({"error": render_error(error)})
        else:
            yield self._chunk({}, _finish_reason(reply))
            if self._include_usage:
                yield _frame(self._object("chat.completion.chunk", []) | {"usage": _usage(reply)})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage: Json = {"usage": None} if self._include_usage else {}
        return _frame(self._object("chat.completion.chunk", [choice]) | usage)


def render_error(error: APIError) -> Json:
    """An error in the format of OpenAI's API."""
    param = "messages" if isinstance(error, INPUT_ERRORS) else error.param
    return {"message": str(error), "type": error.type, "param": param, "code": error.code}


def render_model(model: ModelInfo, created: int) -> Json:
    """The model as OpenAI's API lists it; `created` is in Unix seconds."""
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "parley",
        "max_model_len": model.context,
    }


def _reply_of(event: Rejected | Finished) -> Item:
    """The reply that has ended. Raises APIError if there is none, or if it failed."""
    if isinstance(event, Rejected):
        raise event.error
    if event.reply.status == Status.FAILED:
        raise FAILURES.get(event.reply.reason, ServerError)()
    return event.reply


def _finish_reason(reply: Item) -> str | None:
    return FINISH_REASONS.get(str(reply.reason))


def _usage(reply: Item) -> Json:
    usage = reply.usage
    assert usage
    return {
        "prompt_tokens": usage["input_tokens"],
        "completion_tokens": usage["output_tokens"],
        "total_tokens": usage["total_tokens"],
        "prompt_tokens_details": {"cached_tokens": usage["cached_tokens"]},
    }


def _frame(data: Json) -> str:
    """A server-sent event, in ASCII: many clients take U+2028 for the end of a line."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"
