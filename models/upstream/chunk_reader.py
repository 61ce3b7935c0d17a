"""Turns the chunks of an upstream's stream into the events of a reply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from models.errors import UpstreamFailedError
from models.language.events import ArgumentsDelta, Done, Event, ReasoningDelta, TextDelta, ToolCallStarted
from models.messages import FinishReason, Usage
from models.output_item import TokenLogprob
from models.upstream.failures import failure_in_stream
from models.upstream.wire import (
    CalledFunction,
    Choice,
    Chunk,
    Delta,
    Logprob,
    Logprobs,
    ToolCall,
    TopLogprob,
    decode_chunk,
)

SMALLEST_LOGPROB = -9999.0
MOST_TOKENS = 2**31 - 1  # that an upstream can tell
MOST_CHARACTERS = 2**22  # of a reply


class ChunkReader:
    """Reads one stream. `usage` grows with it: the upstream's counts, or else one token for each chunk.

    `max_tokens` is how many tokens the request allows, if it says so.
    """

    def __init__(self, usage: Usage, max_tokens: int | None) -> None:
        self._usage = usage
        self._max_tokens = max_tokens
        self._index = -1  # of the tool call that has begun last
        self._id: str | None = None
        self._in_call = False  # whether its pieces may go on
        self._characters = 0
        self._finish_reason: str | None = None
        self._counted = False  # whether the upstream tells how much of the output is reasoning

    @property
    def has_finished(self) -> bool:
        """Whether the model has ended the reply."""
        return self._finish_reason is not None

    def read(self, data: str) -> Iterator[Event]:
        """The events of one chunk. Raises APIError if the upstream says that it has failed, or says nonsense."""
        try:
            chunk = decode_chunk(data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise UpstreamFailedError(f"it sends what is no chunk: {error}") from error
        if chunk.error:
            raise failure_in_stream(chunk.error)
        for choice in chunk.choices or ():
            if choice.index:
                continue  # of several replies, which nobody asked for
            for event in self._events_of(choice):
                self._usage.output_tokens += 1
                if isinstance(event, ReasoningDelta) and not self._counted:
                    self._usage.reasoning_tokens += 1
                self._characters += _length(event)
                if self._characters > MOST_CHARACTERS:
                    raise UpstreamFailedError(f"its reply has more than {MOST_CHARACTERS} characters")
                yield event
            self._finish_reason = choice.finish_reason or self._finish_reason
        self._count(chunk)

    def done(self) -> Done:
        """The end of the reply. Raises UpstreamFailedError if the stream has ended before the reply did."""
        match self._finish_reason:
            case None | "abort" | "error":
                raise UpstreamFailedError("its stream has ended before the reply")
            case "length":
                return Done(self._limit())
            case "content_filter":
                return Done("content_filter")
        return Done("stop")

    def _limit(self) -> FinishReason:
        """Which limit has ended the reply."""
        reached = self._max_tokens is not None and self._usage.output_tokens >= self._max_tokens
        return "max_output_tokens" if reached else "context_length"

    def _events_of(self, choice: Choice) -> Iterator[Event]:
        logprobs = None if choice.logprobs is None else list(_logprobs(choice.logprobs))
        if choice.text:
            yield TextDelta(choice.text, logprobs)
        if choice.delta is not None:
            yield from self._events_of_delta(choice.delta, logprobs)

    def _events_of_delta(self, delta: Delta, logprobs: Sequence[TokenLogprob] | None) -> Iterator[Event]:
        if reasoning := delta.reasoning_content or delta.reasoning:
            self._in_call = False
            yield ReasoningDelta(reasoning)
        text = delta.content or delta.refusal
        if text and not (self._in_call and text.isspace()):
            self._in_call = False
            yield TextDelta(text, logprobs)
        for call in delta.tool_calls or ():
            yield from self._events_of_call(call)

    def _events_of_call(self, call: ToolCall) -> Iterator[Event]:
        """A new call has another index or another id: some servers leave out one of them."""
        index = max(self._index, 0) if call.index is None else call.index
        function = call.function or CalledFunction()
        is_new = index > self._index or call.id not in (None, self._id)
        if is_new and function.name:
            self._index, self._id, self._in_call = index, call.id, True
            yield ToolCallStarted(function.name)
        elif index != self._index or not self._in_call:
            raise UpstreamFailedError("it sends pieces of a tool call that has not begun, or has ended")
        if function.arguments:
            yield ArgumentsDelta(function.arguments)

    def _count(self, chunk: Chunk) -> None:
        """Take over the counts of the upstream."""
        usage = self._usage
        if chunk.timings:
            usage.input_tokens = _possible(chunk.timings.cache_n + chunk.timings.prompt_n)
            usage.cached_tokens = _possible(chunk.timings.cache_n)
            usage.output_tokens = _possible(chunk.timings.predicted_n)
        if told := chunk.usage:
            if told.prompt_tokens is not None:
                usage.input_tokens = _possible(told.prompt_tokens)
            if told.completion_tokens is not None:
                usage.output_tokens = _possible(told.completion_tokens)
            if told.prompt_tokens_details:
                usage.cached_tokens = _possible(told.prompt_tokens_details.cached_tokens or 0)
            details = told.completion_tokens_details
            if details and details.reasoning_tokens is not None:
                usage.reasoning_tokens, self._counted = _possible(details.reasoning_tokens), True


def _length(event: Event) -> int:
    match event:
        case TextDelta(text) | ReasoningDelta(text) | ArgumentsDelta(text) | ToolCallStarted(text):
            return len(text)
    return 0


def _possible(tokens: int) -> int:
    """A count that metrics, limits and databases can take."""
    return min(max(tokens, 0), MOST_TOKENS)


def _logprobs(logprobs: Logprobs) -> Iterator[TokenLogprob]:
    for one in logprobs.content or ():
        yield _logprob(one)
    tops = logprobs.top_logprobs or []
    for index, (token, logprob) in enumerate(zip(logprobs.tokens or (), logprobs.token_logprobs or (), strict=False)):
        top = tops[index] if index < len(tops) else None
        others = [(other.encode(), _bounded(one)) for other, one in (top or {}).items()]
        yield TokenLogprob(token.encode(), _bounded(logprob or 0.0), others)


def _logprob(told: Logprob) -> TokenLogprob:
    others = [(_bytes_of(other), _bounded(other.logprob)) for other in told.top_logprobs or ()]
    return TokenLogprob(_bytes_of(told), _bounded(told.logprob), others)


def _bytes_of(told: TopLogprob) -> bytes:
    try:
        return told.token.encode() if told.bytes is None else bytes(told.bytes)
    except ValueError:
        raise UpstreamFailedError("it sends numbers that are no bytes") from None


def _bounded(logprob: float | None) -> float:
    return SMALLEST_LOGPROB if logprob is None else max(logprob, SMALLEST_LOGPROB)
