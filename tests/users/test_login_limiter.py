from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings, strategies
from limits.storage import MemoryStorage

from models.errors import TooManyLoginsError
from models.users.login_limiter import LoginLimiter

PATIENCE = 10  # seconds, for what takes one


def is_blocked(limiter: LoginLimiter, address: str) -> bool:
    try:
        limiter.check(address)
    except TooManyLoginsError:
        return True
    return False


def keys_in_memory(limiter: LoginLimiter) -> set[str]:
    """What is kept in memory, by keys that name an address."""
    storage = limiter._limiter.storage
    assert isinstance(storage, MemoryStorage)
    return {*storage.storage, *storage.expirations, *storage.locks, *storage.events}


def test_the_tenth_failure_blocks_an_address() -> None:
    limiter = LoginLimiter()
    for _ in range(10):
        limiter.check("10.0.0.1")
        limiter.count_failure("10.0.0.1")
    with pytest.raises(TooManyLoginsError):
        limiter.check("10.0.0.1")


def test_a_block_is_for_one_address_only() -> None:
    limiter = LoginLimiter("3/minute")
    for _ in range(2):
        limiter.count_failure("10.0.0.1")
    assert not is_blocked(limiter, "10.0.0.1")
    limiter.count_failure("10.0.0.1")
    assert is_blocked(limiter, "10.0.0.1")
    assert not is_blocked(limiter, "10.0.0.2")


@pytest.mark.parametrize(
    ("first", "second", "blocked"),
    [
        pytest.param("2001:db8::1", "2001:db8::abcd:1", True, id="one /64"),
        pytest.param("2001:db8::1", "2001:db8:0:1::1", False, id="another /64"),
        pytest.param("::ffff:10.0.0.1", "10.0.0.1", True, id="IPv4 as IPv6"),
        pytest.param("::ffff:10.0.0.1", "::ffff:10.0.0.2", False, id="two IPv4 as IPv6"),
        pytest.param("fe80::1%eth0", "fe80::2%eth1", True, id="with zones"),
        pytest.param("local", "unix", False, id="names"),
    ],
)
def test_an_ipv6_address_counts_by_its_network(first: str, second: str, blocked: bool) -> None:
    limiter = LoginLimiter("1/minute")
    limiter.count_failure(first)
    assert is_blocked(limiter, second) == blocked


def test_a_block_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    limiter = LoginLimiter("2/minute")
    for _ in range(2):
        limiter.count_failure("10.0.0.1")
    assert caplog.messages == ["logins blocked address=10.0.0.1"]


def test_a_check_does_not_count_as_a_failure() -> None:
    limiter = LoginLimiter("1/minute")
    assert not any(is_blocked(limiter, "10.0.0.1") for _ in range(3))


@pytest.mark.anyio
async def test_a_block_ends_with_its_window_although_failures_go_on() -> None:
    limiter = LoginLimiter("2/second")
    for _ in range(2):
        limiter.count_failure("10.0.0.1")
    async with asyncio.timeout(PATIENCE):
        while is_blocked(limiter, "10.0.0.1"):
            limiter.count_failure("10.0.0.1")
            await asyncio.sleep(0.01)
    limiter.count_failure("10.0.0.1")
    assert not is_blocked(limiter, "10.0.0.1")
    limiter.count_failure("10.0.0.1")
    assert is_blocked(limiter, "10.0.0.1")


def test_each_limiter_counts_for_itself() -> None:
    first, second = LoginLimiter("1/minute"), LoginLimiter("1/minute")
    first.count_failure("10.0.0.1")
    assert (is_blocked(first, "10.0.0.1"), is_blocked(second, "10.0.0.1")) == (True, False)


def test_a_block_tells_to_wait_and_nothing_else() -> None:
    error = TooManyLoginsError()
    assert (error.status, error.type, error.code, error.param) == (429, "rate_limit_error", "too_many_failures", None)
    assert error.retry_after == 60
    assert str(error) == "too many failed logins from your address: wait up to a minute"


@pytest.mark.anyio
async def test_addresses_whose_failures_expired_are_forgotten() -> None:
    limiter = LoginLimiter("1/second")
    for number in range(1000):
        limiter.count_failure(f"10.0.{number // 250}.{number % 250}")
    async with asyncio.timeout(PATIENCE):
        while len(keys_in_memory(limiter)) > 1:  # a failure starts a search for expired ones, in another thread
            limiter.count_failure("10.9.9.9")
            await asyncio.sleep(0.01)
    assert all("10.9.9.9" in key for key in keys_in_memory(limiter))


@settings(max_examples=50, deadline=None)
@given(strategies.lists(strategies.sampled_from("abc"), max_size=20), strategies.integers(1, 4))
def test_an_address_is_blocked_from_the_limit_on(failures: list[str], limit: int) -> None:
    limiter = LoginLimiter(f"{limit}/hour")
    counts: Counter[str] = Counter()
    for failed in failures:
        limiter.count_failure(failed)
        counts[failed] += 1
        assert {address: is_blocked(limiter, address) for address in "abc"} == {
            address: counts[address] >= limit for address in "abc"
        }
