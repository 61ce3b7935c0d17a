from __future__ import annotations

from functools import partial

import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.generation.admission import Admission
from models.messages import Usage
from models.ops.metrics import GAUGES, Metrics
from tests.support.fake_clock import FakeClock
from tests.support.samples import Samples, read_samples

HISTOGRAMS = {"time_to_first_token", "inter_token_latency", "request_queue_time", "e2e_request_latency", "engine_step"}
COUNTERS = {"prompt_tokens", "prompt_tokens_cached", "generation_tokens", "responses", "login_failures"}
COUNTERS |= {"slow_clients_closed", "upstream_failures"}
HISTOGRAMS |= {"upstream_time_to_first_token"}


@pytest.fixture
def clock() -> FakeClock:
    """The clock of metrics and tickets."""
    return FakeClock()


@pytest.fixture
def metrics(clock: FakeClock) -> Metrics:
    return Metrics(clock)


def samples_of(metrics: Metrics) -> Samples:
    """All samples that are not 0."""
    return {name: value for name, value in read_samples(metrics.text().decode()).items() if value}


# Names and values


def test_every_metric_has_a_name_a_type_and_a_description(metrics: Metrics) -> None:
    metrics.add_gauges(dict.fromkeys(GAUGES, lambda: 0))
    families = list(text_string_to_metric_families(metrics.text().decode()))
    types = {f"parley_{name}_seconds": "histogram" for name in HISTOGRAMS}
    types |= {f"parley_{name}": "counter" for name in COUNTERS}
    types |= {f"parley_{name}": "gauge" for name in (*GAUGES, "upstream_requests_running")}
    assert {family.name: family.type for family in families if not family.name.endswith("_created")} == types
    assert all(family.documentation for family in families)


def test_all_samples_begin_with_0(metrics: Metrics) -> None:
    assert samples_of(metrics) == {}


def test_a_gauge_shows_what_its_function_returns(metrics: Metrics) -> None:
    values = {name: float(number) for number, name in enumerate(GAUGES, start=1)}
    metrics.add_gauges({name: partial(values.__getitem__, name) for name in GAUGES})
    assert samples_of(metrics) == values
    values["num_slots"] = 99
    assert samples_of(metrics)["num_slots"] == 99


def test_two_metrics_share_no_numbers(metrics: Metrics) -> None:
    metrics.responses.labels("completed", "stop").inc()
    metrics.step.observe(0.5)
    assert samples_of(metrics) == {
        "responses_total completed stop": 1,
        "engine_step_seconds_count": 1,
        "engine_step_seconds_sum": 0.5,
    }
    assert samples_of(Metrics()) == {}


# The times of a response


def test_the_times_of_a_response_are_measured_from_its_request(metrics: Metrics, clock: FakeClock) -> None:
    clock.now += 5
    timer = metrics.time_response()
    for seconds in (3, 4, 8):
        clock.now += seconds
        timer.delta()
    clock.now += 16
    timer.end(0, Usage(30, cached_tokens=10, output_tokens=3))
    assert samples_of(metrics) == {
        "time_to_first_token_seconds_count": 1,
        "time_to_first_token_seconds_sum": 3,
        "inter_token_latency_seconds_count": 2,
        "inter_token_latency_seconds_sum": 12,
        "request_queue_time_seconds_count": 1,
        "e2e_request_latency_seconds_count": 1,
        "e2e_request_latency_seconds_sum": 31,
        "prompt_tokens_total": 30,
        "prompt_tokens_cached_total": 10,
        "generation_tokens_total": 3,
    }


@pytest.mark.anyio
async def test_the_queue_time_ends_with_the_slot(metrics: Metrics, clock: FakeClock) -> None:
    admission = Admission(slots=1, queue=2, per_user=3, clock=clock)
    first, second, ticket = [await admission.enter(user) for user in ("ann", "bob", "eve")]
    timer = metrics.time_response()
    clock.now += 2
    admission.leave(first)
    assert ticket.position == 1
    clock.now += 5
    admission.leave(second)
    assert ticket.position == 0
    clock.now += 2
    timer.delta()
    clock.now += 1
    timer.end(ticket.waited, Usage(1))
    samples = samples_of(metrics)
    assert samples["request_queue_time_seconds_sum"] == 7
    assert samples["time_to_first_token_seconds_sum"] == 9
    assert samples["e2e_request_latency_seconds_sum"] == 10


@pytest.mark.anyio
async def test_a_response_that_never_had_a_slot_has_only_a_total_time(metrics: Metrics, clock: FakeClock) -> None:
    admission = Admission(slots=1, queue=1, per_user=3, clock=clock)
    await admission.enter("ann")
    ticket = await admission.enter("bob")
    timer = metrics.time_response()
    clock.now += 3
    timer.end(ticket.waited, Usage(50))
    assert samples_of(metrics) == {"e2e_request_latency_seconds_count": 1, "e2e_request_latency_seconds_sum": 3}


def test_a_response_that_ends_early_is_measured_up_to_its_end(metrics: Metrics, clock: FakeClock) -> None:
    timer = metrics.time_response()
    clock.now += 3
    timer.delta()
    clock.now += 4
    timer.end(0, Usage(7, output_tokens=1))
    samples = samples_of(metrics)
    assert (samples["prompt_tokens_total"], samples["generation_tokens_total"]) == (7, 1)
    assert (samples["time_to_first_token_seconds_sum"], samples["e2e_request_latency_seconds_sum"]) == (3, 7)
    assert "inter_token_latency_seconds_count" not in samples


def test_a_response_without_text_has_no_first_token(metrics: Metrics, clock: FakeClock) -> None:
    timer = metrics.time_response()
    clock.now += 3
    timer.end(0, Usage(7))
    samples = samples_of(metrics)
    assert samples["e2e_request_latency_seconds_sum"] == 3
    assert "time_to_first_token_seconds_count" not in samples


def test_responses_at_the_same_time_are_measured_apart(metrics: Metrics, clock: FakeClock) -> None:
    first = metrics.time_response()
    clock.now += 10
    second = metrics.time_response()
    clock.now += 1
    for timer in (second, first):
        timer.delta()
    samples = samples_of(metrics)
    assert (samples["time_to_first_token_seconds_count"], samples["time_to_first_token_seconds_sum"]) == (2, 1 + 11)
    assert "inter_token_latency_seconds_count" not in samples
