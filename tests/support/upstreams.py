"""A chat over upstreams that a test answers for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from models.chat_request import ChatRequest
from models.language.events import Event
from models.messages import Message
from models.ops.metrics import Metrics
from models.settings import Settings
from models.upstream.upstream_chat import UpstreamChat
from tests.support.fake_upstream import FakeUpstream


@asynccontextmanager
async def chat_over(*upstreams: FakeUpstream, patience: float = 5.0, **settings: Any) -> AsyncIterator[UpstreamChat]:
    """A chat over some upstreams."""
    urls = tuple(one.url for one in upstreams)
    async with UpstreamChat.opened(Settings(upstream=urls, **settings), Metrics(), patience) as chat:
        yield chat


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def request_of(chat: UpstreamChat, messages: list[Message] | None = None, **fields: Any) -> ChatRequest:
    """ann's request for a reply to Hi, or to other messages; fields that are options change them."""
    model = chat.models.choose(fields.pop("model", None))
    named = {name: fields.pop(name) for name in [*fields] if name in ChatRequest.__dataclass_fields__}
    options = model.defaults.updated(fields)
    return ChatRequest(
        named.pop("user", "ann"), user("Hi") if messages is None else messages, options, model=model.name, **named
    )


async def reply_of(chat: UpstreamChat, messages: list[Message] | None = None, **fields: Any) -> list[Event]:
    """All events of a reply."""
    reply = await chat.prepare(request_of(chat, messages, **fields))
    return [event async for event in reply.events()]
