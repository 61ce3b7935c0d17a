"""The replies to a request of Chat Completions, or of the older Completions, as one object or as a stream of chunks."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, ClassVar

from models.errors import (
    APIError,
    ContextLengthExceededError,
    FormatFailedError,
    MessagesRejectedError,
    ServerError,
    ServerStoppingError,
    UpstreamBusyError,
    UpstreamFailedError,
    UpstreamRefusedError,
    UpstreamUnavailableError,
    WrongCredentialsError,
)
from models.generation.events import Finished, OutputDelta, OutputItemAdded, Queued, Rejected, ResponseEvent
from models.generation.interface import ResponseRequest, ResponseService, Stateless
from models.protocols.completion_request import CompletionRequest
from models.protocols.error_object import render_error
from models.store.item import Item, Status
from models.validation import Json

FINISH_REASONS = {
    "stop": "stop",
    "max_output_tokens": "length",
    "context_length": "length",
    "content_filter": "content_filter",
}
INPUT_ERRORS = (MessagesRejectedError, ContextLengthExceededError)  # their param has another name in each API
FAILURES: Mapping[str | None, Callable[[str | None], APIError]] = {
    "format_failed": FormatFailedError,
    "server_shutdown": ServerStoppingError,
    "revoked": WrongCredentialsError,
    "context_length_exceeded": ContextLengthExceededError,
    "upstream_refused": UpstreamRefusedError,
    "upstream_failed": UpstreamFailedError,
    "upstream_busy": UpstreamBusyError,
    "upstream_unavailable": UpstreamUnavailableError,
}


class Choice(ABC):
    """One reply of a completion, as an API renders it."""

    object: ClassVar[str]  # the type of a completion
    chunk_object: ClassVar[str]  # the type of a chunk
    id_prefix: ClassVar[str]
    input_param: ClassVar[str]  # the name of what the model answers

    def __init__(self, index: int, has_logprobs: bool) -> None:
        self.index = index
        self.has_logprobs = has_logprobs

    @abstractmethod
    def whole(self, reply: Item) -> Json:
        """The choice of a completion."""

    @abstractmethod
    def first(self) -> Json | None:
        """The choice of the first chunk, before there is any text."""

    @abstractmethod
    def next(self, event: OutputItemAdded | OutputDelta) -> Json | None:
        """The choice of the chunk for an event; None if there is none."""

    @abstractmethod
    def last(self, reply: Item) -> Json:
        """The choice of the last chunk, with the finish reason."""


class _Listener:
    """Passes the events of one choice on: all of them, or only those that end it."""

    def __init__(self, index: int, events: asyncio.Queue[tuple[int, ResponseEvent]], everything: bool) -> None:
        self._index = index
        self._events = events
        self._everything = everything

    def on_event(self, event: ResponseEvent) -> None:
        if self._everything or isinstance(event, Rejected | Finished):
            self._events.put_nowait((self._index, event))


class Completion:
    """The replies to one request, each from a response of its own."""

    def __init__(self, responses: ResponseService, request: CompletionRequest, choice: type[Choice]) -> None:
        self._responses = responses
        self._request = request
        self._id = f"{choice.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._choices = [choice(index, request.chat.top_logprobs is not None) for index in range(request.choices)]
        self._events: asyncio.Queue[tuple[int, ResponseEvent]] = asyncio.Queue()
        self._early: deque[tuple[int, ResponseEvent]] = deque()  # came while `wait_started` waited
        asked = [ResponseRequest(chat, Stateless()) for chat in request.chats]
        self.response_ids = [one.id for one in asked]
        for index, one in enumerate(asked):
            responses.create(one, _Listener(index, self._events, request.stream))

    def cancel(self) -> None:
        """End all responses that are still running, for example since the client has disconnected."""
        for id in self.response_ids:
            self._responses.abandon(self._request.chat.user, id)

    async def result(self) -> Json:
        """The completion as one object. Raises APIError if one of the replies fails or is rejected."""
        replies: dict[int, Item] = {}
        while len(replies) < len(self._choices):
            index, event = await self._events.get()
            replies[index] = self._reply_of(event)
        in_order = [replies[choice.index] for choice in self._choices]
        return await asyncio.to_thread(self._whole, in_order)  # probabilities of many tokens take seconds

    def _whole(self, replies: Sequence[Item]) -> Json:
        choices = [choice.whole(reply) for choice, reply in zip(self._choices, replies, strict=True)]
        return self._object(self._choices[0].object, choices) | {"usage": _usage(replies)}

    async def wait_started(self) -> None:
        """Wait until all responses of a stream are accepted. Raises APIError if one is rejected."""
        started: set[int] = set()
        while len(started) < len(self._choices):
            index, event = await self._events.get()
            if isinstance(event, Rejected):
                self._reply_of(event)
            started.add(index)
            self._early.append((index, event))

    async def frames(self) -> AsyncGenerator[str, None]:
        """The server-sent events of a stream, after all responses are accepted."""
        for choice in self._choices:
            if first := choice.first():
                yield self._chunk(first)
        try:
            replies: list[Item] = []
            while len(replies) < len(self._choices):
                index, event = await self._next_event()
                match event:
                    case Queued(position=position):
                        yield f": position {position} in the wait queue\n\n"  # a comment
                    case OutputItemAdded() | OutputDelta():
                        if delta := self._choices[index].next(event):
                            yield self._chunk(delta, event)
                    case Rejected() | Finished():
                        replies.append(self._reply_of(event))
                        yield self._chunk(self._choices[index].last(replies[-1]))
        except APIError as error:
            yield _frame({"error": render_error(error)})
        else:
            if self._request.include_usage:
                yield _frame(self._object(self._choices[0].chunk_object, []) | {"usage": _usage(replies)})
        yield "data: [DONE]\n\n"

    async def _next_event(self) -> tuple[int, ResponseEvent]:
        return self._early.popleft() if self._early else await self._events.get()

    def _reply_of(self, event: ResponseEvent) -> Item:
        """The reply of the last event of a response. Raises APIError, and ends the other responses, if it failed."""
        assert isinstance(event, Rejected | Finished)
        if isinstance(event, Finished) and event.reply.status != Status.FAILED:
            return event.reply
        self.cancel()
        error = event.error if isinstance(event, Rejected) else _error_of(event.reply)
        if isinstance(error, INPUT_ERRORS):
            error.param = self._choices[0].input_param
        raise error

    def _chunk(self, choice: Json, event: OutputItemAdded | OutputDelta | None = None) -> str:
        chunk = self._object(self._choices[0].chunk_object, [choice])
        if self._request.include_usage:
            counts = event.usage if isinstance(event, OutputDelta) and self._request.continuous_usage else None
            chunk["usage"] = _rendered_usage(counts.counts()) if counts else None
        return _frame(chunk)

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._request.model,
            "choices": choices,
        }


def _error_of(reply: Item) -> APIError:
    """Why a reply has failed."""
    return FAILURES.get(reply.reason, ServerError)(reply.failure)


def finish_reason(reply: Item) -> str | None:
    """Why a reply has ended, in the words of OpenAI's API."""
    return FINISH_REASONS.get(str(reply.reason))


def _usage(replies: Sequence[Item]) -> Json:
    """The tokens of all replies; those of the prompt count once."""
    counts = [reply.usage or {} for reply in replies]
    sums = {name: sum(one.get(name, 0) for one in counts) for name in ("output_tokens", "reasoning_tokens")}
    return _rendered_usage({**counts[0], **sums})


def _rendered_usage(counts: Mapping[str, int]) -> Json:
    return {
        "prompt_tokens": counts["input_tokens"],
        "completion_tokens": counts["output_tokens"],
        "total_tokens": counts["input_tokens"] + counts["output_tokens"],
        "prompt_tokens_details": {"cached_tokens": counts["cached_tokens"]},
        "completion_tokens_details": {"reasoning_tokens": counts.get("reasoning_tokens", 0)},
    }


def _frame(data: Any) -> str:
    """A server-sent event, in ASCII: many clients take U+2028 for the end of a line."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"
