"""The metrics of the server for Prometheus. Their names are vLLM's, with the prefix `parley_`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from models.messages import Usage

MEDIA_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

GAUGES = {
    "num_requests_running": "Replies that have a slot",
    "num_requests_waiting": "Replies that wait for a slot",
    "num_slots": "Replies that can run at once",
    "kv_cache_usage_perc": "The share of the key-value cache in use",
    "sockets_open": "Connections of users",
}


class Metrics:
    """The counters, gauges and histograms of one server; times are in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        self.first_token = self._histogram("time_to_first_token", "From a request to the first text of the reply")
        self.inter_token = self._histogram("inter_token_latency", "From one piece of a reply's text to the next")
        self.queue = self._histogram("request_queue_time", "How long a reply waited for its slot")
        self.end_to_end = self._histogram("e2e_request_latency", "From a request to the end of the reply")
        self.step = self._histogram("engine_step", "One step of the engine")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = self._counter("prompt_tokens_cached", "Tokens of prompts that were in the prefix cache")
        self.generated_tokens = self._counter("generation_tokens", "Tokens of replies")
        self.responses = self._counter("responses", "Replies by how they ended", "status", "reason")
        self.upstream_running = Gauge(
            "parley_upstream_requests_running", "Replies that an upstream makes", ["upstream"], registry=self._registry
        )
        self.upstream_failures = self._counter("upstream_failures", "Failures of an upstream", "upstream")
        self.upstream_first_token = self._histogram(
            "upstream_time_to_first_token", "From a request to an upstream to its first text", "upstream"
        )
        self.login_failures = self._counter("login_failures", "Logins that failed")
        self.slow_clients = self._counter("slow_clients_closed", "Connections closed because the client did not read")

    def add_gauges(self, values: Mapping[str, Callable[[], float]]) -> None:
        """Add the gauges; `values` has a function for each name in `GAUGES`."""
        for name, description in GAUGES.items():
            Gauge(f"parley_{name}", description, registry=self._registry).set_function(values[name])

    def time_response(self) -> ResponseTimer:
        """Start to measure a response."""
        return ResponseTimer(self, self._clock)

    def text(self) -> bytes:
        """All metrics in Prometheus' format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"parley_{name}", description, labels, registry=self._registry)

    def _histogram(self, name: str, description: str, *labels: str) -> Histogram:
        return Histogram(f"parley_{name}_seconds", description, labels, registry=self._registry, buckets=SECONDS)


class ResponseTimer:
    """Measures one response, from its request on."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._started = clock()
        self._last_delta: float | None = None

    def delta(self) -> None:
        """Note that a text delta has arrived."""
        now = self._clock()
        if self._last_delta is None:
            self._metrics.first_token.observe(now - self._started)
        else:
            self._metrics.inter_token.observe(now - self._last_delta)
        self._last_delta = now

    def end(self, waited: float | None, usage: Usage) -> None:
        """Note that the response has ended; `waited` is how long it waited for its slot, None if it never got one."""
        self._metrics.end_to_end.observe(self._clock() - self._started)
        if waited is not None:
            self._metrics.queue.observe(waited)
            self._metrics.prompt_tokens.inc(usage.input_tokens)
            self._metrics.cached_tokens.inc(usage.cached_tokens)
            self._metrics.generated_tokens.inc(usage.output_tokens)
