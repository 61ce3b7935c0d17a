"""A reply as a chat completion of OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from models.admission import ServerStopping
from models.chat import Chat
from models.completion_request import CompletionRequest
from models.events import Json, ResponseCreate
from models.refused import Refused, ServerFailed
from models.response import Response
from models.users import WrongCredentials

FAILURES: Mapping[str, type[Refused]] = {"server_shutdown": ServerStopping, "revoked": WrongCredentials}
FINISH_REASONS = {"stop": "stop", "max_output_tokens": "length", "context_length": "length"}


class Completion:
    """Hears a reply, and tells it at once or in chunks."""

    def __init__(self, user: str, request: CompletionRequest, chat: Chat) -> None:
        asked = ResponseCreate(None, request.messages, "none")
        options = chat.defaults.updated(request.options)
        self.response = Response(user, asked, None, False, options, completion=True)
        self._model = chat.model_name
        self._include_usage = request.include_usage
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._events: asyncio.Queue[Json] = asyncio.Queue()

    def send(self, event: Json) -> None:
        """Take what comes of the reply."""
        self._events.put_nowait(event)

    def cancel(self) -> None:
        """End the reply, since nobody is there any more."""
        self.response.cancel("cancelled", "client_disconnected")

    async def whole(self) -> Json:
        """The completion. Raises Refused where there is none."""
        await asyncio.wait([self.response.ending])
        if trouble := self._trouble():
            raise trouble
        message = {"role": "assistant", "content": "".join(self.response.deltas), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish_reason}
        return self._object("chat.completion", [choice]) | {"usage": self._usage}

    async def begun(self) -> None:
        """Wait until the reply is on its way. Raises Refused where it is not."""
        await self._events.get()
        if trouble := self._trouble():
            raise trouble

    async def frames(self) -> AsyncGenerator[str, None]:
        """The chunks of the completion as server-sent events, once it has begun."""
        yield self._chunk({"role": "assistant", "content": ""})
        while True:
            match await self._events.get():
                case {"type": "response.queued", "position": position}:
                    yield f": waits, {position} in the queue\n\n"  # a comment, which keeps proxies from giving up
                case {"type": "response.output_text.delta", "delta": str(delta)}:
                    yield self._chunk({"content": delta})
                case {"type": "response.done"}:
                    break
        if trouble := self._trouble():
            yield _frame({"error": error(trouble)})
        else:
            yield self._chunk({}, self._finish_reason)
            if self._include_usage:
                yield _frame(self._object("chat.completion.chunk", []) | {"usage": self._usage})
        yield "data: [DONE]\n\n"

    def _trouble(self) -> Refused | None:
        if refused := self.response.refused:
            if refused.param == "response.input":
                refused.param = "messages"
            return refused
        if self.response.status == "failed":
            return FAILURES.get(str(self.response.reason), ServerFailed)()
        return None

    @property
    def _finish_reason(self) -> str | None:
        return FINISH_REASONS.get(str(self.response.reason))

    @property
    def _usage(self) -> Json:
        usage = self.response.usage
        return {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage: Json = {"usage": None} if self._include_usage else {}
        return _frame(self._object("chat.completion.chunk", [choice]) | usage)

    def _object(self, kind: str, choices: list[Any]) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def error(refused: Refused) -> Json:
    """An error as OpenAI's API has it."""
    return {"message": str(refused), "type": refused.type, "param": refused.param, "code": refused.code}


def model(chat: Chat, created: int) -> Json:
    """The model that answers, as OpenAI's API lists it; `created` is in Unix seconds."""
    name, context = chat.model_name, chat.context
    return {"id": name, "object": "model", "created": created, "owned_by": "parley", "max_model_len": context}


def _frame(data: Json) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"  # in ASCII: to many clients U+2028 ends a line
