from __future__ import annotations

import gc
import weakref

from hypothesis import given, settings, strategies

from models.throttle import Throttle, TooManyFailures


class Clock:
    """Tells the time it is set to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_address_is_blocked_at_the_limit_and_no_other() -> None:
    throttle = Throttle(limit=3, seconds=60, clock=Clock())
    for _ in range(2):
        throttle.failed("10.0.0.1")
    assert not throttle.blocked("10.0.0.1")
    throttle.failed("10.0.0.1")
    assert throttle.blocked("10.0.0.1")
    assert not throttle.blocked("10.0.0.2")


def test_asking_does_not_count() -> None:
    throttle = Throttle(limit=1, seconds=60, clock=Clock())
    assert not any(throttle.blocked("10.0.0.1") for _ in range(3))


def test_a_block_ends_when_its_first_failure_is_too_old() -> None:
    clock = Clock()
    throttle = Throttle(limit=2, seconds=60, clock=clock)
    throttle.failed("10.0.0.1")
    clock.now += 30
    throttle.failed("10.0.0.1")
    clock.now += 29.9
    assert throttle.blocked("10.0.0.1")
    clock.now += 0.1
    assert not throttle.blocked("10.0.0.1")
    throttle.failed("10.0.0.1")
    assert throttle.blocked("10.0.0.1")


def test_whoever_has_to_wait_is_told_so_and_nothing_else() -> None:
    refused = TooManyFailures()
    assert (refused.type, refused.code, refused.param) == ("rate_limit_error", "too_many_failures", None)
    assert str(refused) == "too many failed logins from your address: wait a minute"


class Address(str):
    """An address that can be seen to be forgotten."""


def test_addresses_are_forgotten_with_their_failures() -> None:
    clock = Clock()
    throttle = Throttle(limit=2, seconds=60, clock=clock)
    old, recent = Address("10.0.0.1"), Address("10.0.0.2")
    remembered = [weakref.ref(old), weakref.ref(recent)]
    throttle.failed(recent)
    throttle.failed(old)
    clock.now += 40
    throttle.failed(recent)
    del old, recent
    clock.now += 40
    throttle.blocked("10.0.0.3")
    gc.collect()
    assert [reference() for reference in remembered] == [None, "10.0.0.2"]


steps = strategies.lists(strategies.tuples(strategies.sampled_from("abc"), strategies.integers(0, 40)), max_size=40)


@settings(max_examples=200, deadline=None)
@given(steps, strategies.integers(1, 4))
def test_blocked_means_that_the_limit_was_reached_within_the_seconds(steps: list[tuple[str, int]], limit: int) -> None:
    clock = Clock()
    throttle = Throttle(limit, 60, clock)
    failures: list[tuple[str, float]] = []
    for address, pause in steps:
        clock.now += pause
        throttle.failed(address)
        failures.append((address, clock.now))
        for asked in "abc":
            recent = [at for failed, at in failures if failed == asked and at > clock.now - 60]
            assert throttle.blocked(asked) == (len(recent) >= limit)
