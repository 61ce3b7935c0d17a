"""What an operator sees of the server; the names are vLLM's, with `parley_` before them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from models.admission import Ticket
from models.chat import Chat
from models.presence import Presence
from models.reply import Delta, Event, Started, Usage

MEDIA_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters, gauges and histograms of one server; times are in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        self._first_token = self._histogram("time_to_first_token", "From a request to the first text of the reply")
        self._inter_token = self._histogram("inter_token_latency", "From one piece of a reply's text to the next")
        self._queue = self._histogram("request_queue_time", "What a reply waited for its slot")
        self._end_to_end = self._histogram("e2e_request_latency", "From a request to the end of the reply")
        self.step = self._histogram("engine_step", "A step of the engine")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._cached = self._counter("prompt_tokens_cached", "Those of them that were in the cache")
        self._generated = self._counter("generation_tokens", "Tokens of replies")
        self.responses = self._counter("responses", "Replies by what became of them", "status", "reason")
        self.login_failures = self._counter("login_failures", "Credentials that were wrong")
        self.slow_clients = self._counter("slow_clients_closed", "Connections closed because nobody read them")

    def watch(self, chat: Chat, presence: Presence) -> None:
        """Show what is in use whenever someone looks."""
        admission = chat.admission
        running = "Replies that have a slot"
        self._gauge("num_requests_running", running, lambda: admission.in_flight.total() - len(admission.waiting))
        self._gauge("num_requests_waiting", "Replies that wait for a slot", lambda: len(admission.waiting))
        self._gauge("num_slots", "Replies that can be made at once", lambda: admission.slots)
        self._gauge("kv_cache_usage_perc", "Of the slots' room for tokens, how much is used", lambda: chat.cache_usage)
        self._gauge("sockets_open", "Connections of users", lambda: len(presence))

    async def observe(self, ticket: Ticket, reply: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """Pass a reply on, and note when what came of it and how many tokens it took."""
        usage, last_at = Usage(0), 0.0
        try:
            async with aclosing(reply):
                async for event in reply:
                    match event:
                        case Started():
                            usage = event.usage
                        case Delta():
                            now = self._clock()
                            times, since = (
                                (self._inter_token, last_at) if last_at else (self._first_token, ticket.entered)
                            )
                            times.observe(now - since)
                            last_at = now
                    yield event
        finally:
            self._end_to_end.observe(self._clock() - ticket.entered)
            if not ticket.position:
                self._queue.observe(ticket.admitted - ticket.entered)
                self._prompt.inc(usage.input_tokens)
                self._cached.inc(usage.cached_tokens)
                self._generated.inc(usage.output_tokens)

    def text(self) -> bytes:
        """All of them as Prometheus reads it."""
        return generate_latest(self._registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"parley_{name}", what, labels, registry=self._registry)

    def _gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        Gauge(f"parley_{name}", what, registry=self._registry).set_function(value)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"parley_{name}_seconds", what, registry=self._registry, buckets=SECONDS)
