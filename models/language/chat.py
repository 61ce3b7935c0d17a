"""The interface of a model that answers messages: messages in, events out. It imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

from models.chat_request import ChatRequest
from models.language.events import Event
from models.messages import Usage
from models.model_info import ModelList


class PreparedReply(Protocol):
    """A reply whose prompt is ready. No text is generated yet."""

    @property
    def usage(self) -> Usage:
        """The tokens of the prompt, and of the reply while it grows."""

    @property
    def left_out(self) -> int:
        """How many of the oldest messages after the system prompt had no room in the context.

        It can grow until the first event.
        """

    def events(self) -> AsyncGenerator[Event, None]:
        """Generate the reply. Closing the generator cancels it: its slot is free within one step.

        Call it once, after the response has got its slot. Raises EngineError, and APIError: FormatFailedError if the
        reply cannot go on in its format, and what an upstream may raise.
        """


class Chat(Protocol):
    """One or several language models that answer messages."""

    @property
    def models(self) -> ModelList:
        """The models that requests may name."""

    @property
    def trouble(self) -> str | None:
        """Why no model can answer at the moment; None if one can."""

    @property
    def warning(self) -> str | None:
        """What else is wrong, though a model can answer; None if all is well."""

    @property
    def died(self) -> asyncio.Event:
        """Set when the model can never answer again."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The values in effect for the models, ready for JSON."""

    @property
    def cache_usage(self) -> float:
        """The share of the key-value cache in use, from 0 to 1."""

    async def prepare(self, request: ChatRequest) -> PreparedReply:
        """Make the prompt of a reply.

        Nothing that other users can see or measure depends on the messages of the request's user. Raises
        InvalidRequestError: MessagesRejectedError, ContextLengthExceededError, UnsupportedParameterError for what this
        model cannot do, and InvalidValueError for a schema or a grammar that cannot be honoured.
        """
