"""One reply of an upstream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass

from models.errors import (
    APIError,
    ContextLengthExceededError,
    RateLimitError,
    UpstreamBusyError,
    UpstreamFailedError,
    UpstreamUnavailableError,
    one_line,
)
from models.language.events import Event
from models.messages import Usage
from models.ops.metrics import Metrics
from models.upstream.chunk_reader import ChunkReader
from models.upstream.conversation import BytesPerToken, Conversation
from models.upstream.endpoint import Endpoint
from models.upstream.kinds import Body, Kind
from models.upstream.pool import Pool
from models.upstream.request_body import render_messages

logger = logging.getLogger("parley")

COOL_SECONDS = 10.0  # for which an upstream that has failed comes last
COUNTS_SECONDS = 2.0  # from the end of a reply to the counts of its tokens


@dataclass(frozen=True)
class Asked:
    """What a reply is asked for. `bodies` has the fields of a request for each kind of server that can do it.

    It has a conversation, or a prompt.
    """

    model: str
    context: int | None
    bodies: Mapping[Kind, Body]
    max_tokens: int | None
    conversation: Conversation
    prompt: str | None
    truncate: bool
    has_tools: bool
    beginning: bytes  # of the conversation, see Pool

    @property
    def size(self) -> int:
        """The bytes of text in it."""
        return self.conversation.size if self.prompt is None else len(self.prompt.encode())

    def fits(self, endpoint: Endpoint) -> bool:
        """Whether an upstream with the model can do all that is asked for."""
        return endpoint.kind in self.bodies and (endpoint.models[self.model].tools or not self.has_tools)


class UpstreamReply:
    """A reply that an upstream is about to make. Until its first piece, another upstream can take over."""

    def __init__(self, asked: Asked, pool: Pool, bytes_per_token: BytesPerToken, metrics: Metrics) -> None:
        self.usage = Usage(0)
        self._asked = asked
        self._pool = pool
        self._bytes_per_token = bytes_per_token
        self._metrics = metrics
        self._max_tokens = asked.max_tokens
        self._shortened = False

    @property
    def left_out(self) -> int:
        """How many of the oldest messages after the system prompt had no room in the context."""
        return self._asked.conversation.left_out

    async def events(self) -> AsyncGenerator[Event, None]:
        """Ask upstreams for the reply, one after the other until one begins it. Closing the generator ends it there.

        Raises APIError: UpstreamFailedError also if an upstream fails after it has begun.
        """
        tried: set[Endpoint] = set()
        error: APIError = UpstreamUnavailableError()
        while left := [one for one in self._candidates() if one not in tried]:
            endpoint = self._pool.choose(left, self._asked.beginning)
            begun = False
            try:
                async with aclosing(self._events_of(endpoint)) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except ContextLengthExceededError as too_long:
                if begun or not self._shorten(too_long.tokens):
                    raise
            except (UpstreamFailedError, UpstreamBusyError) as failure:
                self._note(endpoint, failure)
                error = _told(failure)
                if begun:
                    raise error from failure
                tried.add(endpoint)
        raise error

    def _candidates(self) -> list[Endpoint]:
        return [one for one in self._pool.offering(self._asked.model) if self._asked.fits(one)]

    def _note(self, endpoint: Endpoint, failure: APIError) -> None:
        """Log a failure of an upstream, count it, and prefer others for a while."""
        logger.warning("%s failed: %s", endpoint.url, one_line(failure))
        self._metrics.upstream_failures.labels(endpoint.url).inc()
        pause = failure.retry_after if isinstance(failure, RateLimitError) else None
        endpoint.cool(COOL_SECONDS if pause is None else pause)

    async def _events_of(self, endpoint: Endpoint) -> AsyncGenerator[Event, None]:
        reader, started = ChunkReader(self.usage, self._max_tokens), time.monotonic()
        path = "/chat/completions" if self._asked.prompt is None else "/completions"
        # Until the upstream tells: a reply that is cancelled counts too, but not one that never begins.
        self.usage.input_tokens = self._estimate()
        begun = False
        try:
            async with endpoint.stream(path, self._body(endpoint.kind)) as chunks:
                async for data in chunks:
                    for event in reader.read(data):
                        if not begun:
                            begun = True
                            self._metrics.upstream_first_token.labels(endpoint.url).observe(time.monotonic() - started)
                        yield event
                    if reader.has_finished:
                        break
                await _read_counts(chunks, reader)
            done = reader.done()
        except APIError:
            if not begun:
                self.usage.input_tokens = 0
            raise
        self._bytes_per_token.learn(self._asked.size, self.usage.input_tokens)
        yield done

    def _estimate(self) -> int:
        """How many tokens the prompt has, more or less."""
        return int(self._asked.size / self._bytes_per_token.value)

    def _body(self, kind: Kind) -> Body:
        asked = self._asked
        body = {**asked.bodies[kind]}
        name = kind.options["max_output_tokens"]
        if self._max_tokens is not None and (asked.context is None or self._max_tokens < asked.context):
            body[name] = self._max_tokens
        else:
            body.pop(name, None)  # the whole context: some servers refuse a larger number
        if asked.prompt is not None:
            return body | {"prompt": asked.prompt}
        return body | {"messages": render_messages(asked.conversation.messages, kind)}

    def _shorten(self, tokens: int) -> bool:
        """Ask for less, once, of an upstream that has no room; `tokens` are in the prompt, if it has told."""
        if self._shortened:
            return False
        self._shortened = True
        asked = self._asked
        if asked.context and 0 < tokens < asked.context and self._max_tokens:
            self._max_tokens = min(self._max_tokens, asked.context - tokens)
            return True
        if not asked.truncate:
            return False
        size = asked.conversation.size
        self._bytes_per_token.learn(size, tokens)
        fits = asked.context / tokens if asked.context and tokens else 1.0
        return asked.conversation.shorten(size * min(fits, 1.0) / 2)


async def _read_counts(chunks: AsyncIterator[str], reader: ChunkReader) -> None:
    """Read the counts of tokens, which come after the end of a reply. Some upstreams send none, or never end."""
    with suppress(TimeoutError, APIError):
        async with asyncio.timeout(COUNTS_SECONDS):
            async for data in chunks:
                for _ in reader.read(data):
                    pass


def _told(failure: APIError) -> APIError:
    """What the client learns of a failure: nothing of addresses."""
    if isinstance(failure, UpstreamBusyError):
        return UpstreamBusyError(None, failure.retry_after)
    return UpstreamFailedError()
