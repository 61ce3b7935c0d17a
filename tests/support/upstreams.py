"""A chat over upstreams that a test answers for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from starlette.applications import Starlette

from models.chat_request import ChatRequest
from models.language.events import Event
from models.messages import Message
from models.ops.metrics import Metrics
from models.settings import Settings
from models.upstream.upstream_chat import UpstreamChat
from server import create_app
from tests.support.client import ANN
from tests.support.fake_upstream import FakeUpstream
from tests.support.serving import Served, serve


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


@dataclass
class ServedInFront(Served):
    """A running server, and the one behind it, whose model says what the test wants."""

    behind: Served

    def in_loop(self, function: Callable[[], Any]) -> None:
        """Call a function in the event loop of the model."""
        self.behind.in_loop(function)


@contextmanager
def serve_in_front(app: Starlette) -> Iterator[Served]:
    """Run a server whose upstream is the server of an app."""
    settings: Settings = app.state.settings
    with serve(app) as behind:
        url = f"{behind.url}/v1"
        own = replace(settings, upstream=(url,), upstream_key=ANN, data=settings.data / "front")
        with serve(create_app(own)) as front:
            yield ServedInFront(front.app, front.address, front.server, behind)
