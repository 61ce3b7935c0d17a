"""The load test of `tests/bench/soak.py` in short: a number of actions instead of a time."""

from __future__ import annotations

import asyncio

import pytest

from tests.bench.actions import GOOD, OTHERS
from tests.bench.soak import Plan, Soak, soak

pytestmark = [pytest.mark.slow, pytest.mark.compiler]

PLAN = Plan(users=8, actions=3, pause=0, slots=2, queue=64, linger=1)


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Soak:
    return asyncio.run(soak(PLAN, tmp_path_factory.mktemp("soak")))


def test_each_action_and_each_outcome_occurred(soaked: Soak) -> None:
    assert set(soaked.tally.actions) == {action.__name__ for action in (*GOOD, *OTHERS)}
    assert set(soaked.tally.vanished) == {"request", "queue", "prefill", "reply"}
    assert set(soaked.outcomes) >= {"answered", "cancelled", "abandoned", "too_many_responses"}


def test_nothing_is_lost(soaked: Soak) -> None:
    assert not soaked.tally.lost


def test_nothing_is_left_and_no_error_is_logged(soaked: Soak) -> None:
    assert not soaked.left
    assert not soaked.end.errors
