from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings, strategies
from limits.storage import MemoryStorage

from models.errors import TooManyLoginsError
from models.users.login_limiter import Guesser, LoginLimiter

PATIENCE = 10  # seconds, for what takes one


def is_blocked(limiter: LoginLimiter, address: str) -> bool:
    try:
        limiter.check(Guesser(address))
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
        limiter.check(Guesser("10.0.0.1"))
        limiter.count_failure(Guesser("10.0.0.1"))
    with pytest.raises(TooManyLoginsError):
        limiter.check(Guesser("10.0.0.1"))


def test_a_block_is_for_one_address_only() -> None:
    limiter = LoginLimiter("3/minute")
    for _ in range(2):
        limiter.count_failure(Guesser("10.0.0.1"))
    assert not is_blocked(limiter, "10.0.0.1")
    limiter.count_failure(Guesser("10.0.0.1"))
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
    limiter.count_failure(Guesser(first))
    assert is_blocked(limiter, second) == blocked


def is_blocked_as(limiter: LoginLimiter, user_id: str | None, address: str = "10.0.0.1") -> bool:
    try:
        limiter.check(Guesser(address, user_id))
    except TooManyLoginsError:
        return True
    return False


def test_failures_with_a_user_id_block_only_this_id_from_this_address() -> None:
    limiter = LoginLimiter("2/minute")
    for _ in range(2):
        limiter.count_failure(Guesser("10.0.0.1", "ann"))
    assert is_blocked_as(limiter, "ann")
    assert not is_blocked_as(limiter, "bob")
    assert not is_blocked_as(limiter, None)
    assert not is_blocked_as(limiter, "ann", "10.0.0.2")


def test_failures_without_a_user_id_block_no_id() -> None:
    limiter = LoginLimiter("2/minute")
    for _ in range(2):
        limiter.count_failure(Guesser("10.0.0.1"))
    assert is_blocked_as(limiter, None)
    assert not is_blocked_as(limiter, "ann")


def test_an_address_is_blocked_when_it_fails_with_many_ids() -> None:
    limiter = LoginLimiter("2/minute", "5/minute")
    for number in range(5):
        assert not is_blocked_as(limiter, "ann")
        limiter.count_failure(Guesser("10.0.0.1", f"user{number}"))
    assert is_blocked_as(limiter, "ann")
    assert is_blocked_as(limiter, None)
    assert not is_blocked_as(limiter, "ann", "10.0.0.2")


def test_a_long_user_id_takes_little_memory() -> None:
    limiter = LoginLimiter("1/minute")
    limiter.count_failure(Guesser("10.0.0.1", "x" * 60_000))
    assert all(len(key) < 200 for key in keys_in_memory(limiter))


def test_devices_of_a_user_have_their_own_count() -> None:
    limiter = LoginLimiter("2/minute")
    for address in ("10.0.0.1", "10.0.0.2"):
        limiter.check_device(Guesser(address, device_of="ann"))
        limiter.count_failure(Guesser(address, device_of="ann"))
    with pytest.raises(TooManyLoginsError):
        limiter.check_device(Guesser("10.0.0.3", device_of="ann"))
    limiter.check_device(Guesser("10.0.0.3", device_of="bob"))
    assert not is_blocked(limiter, "10.0.0.1")


def test_who_shows_no_device_has_no_count_of_devices() -> None:
    with pytest.raises(TooManyLoginsError):
        LoginLimiter().check_device(Guesser("10.0.0.1"))


def test_a_block_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    limiter = LoginLimiter("2/minute")
    for _ in range(4):
        limiter.count_failure(Guesser("10.0.0.1"))
    assert caplog.messages == ["logins blocked address=10.0.0.1"]


def test_a_check_does_not_count_as_a_failure() -> None:
    limiter = LoginLimiter("1/minute")
    assert not any(is_blocked(limiter, "10.0.0.1") for _ in range(3))


@pytest.mark.anyio
async def test_a_block_ends_with_its_window_although_failures_go_on() -> None:
    limiter = LoginLimiter("2/second", "1000/second")
    for _ in range(2):
        limiter.count_failure(Guesser("10.0.0.1"))
    async with asyncio.timeout(PATIENCE):
        while is_blocked(limiter, "10.0.0.1"):
            limiter.count_failure(Guesser("10.0.0.1"))
            await asyncio.sleep(0.01)
    limiter.count_failure(Guesser("10.0.0.1"))
    assert not is_blocked(limiter, "10.0.0.1")
    limiter.count_failure(Guesser("10.0.0.1"))
    assert is_blocked(limiter, "10.0.0.1")


def test_each_limiter_counts_for_itself() -> None:
    first, second = LoginLimiter("1/minute"), LoginLimiter("1/minute")
    first.count_failure(Guesser("10.0.0.1"))
    assert (is_blocked(first, "10.0.0.1"), is_blocked(second, "10.0.0.1")) == (True, False)


def test_a_block_tells_to_wait_and_nothing_else() -> None:
    error = TooManyLoginsError()
    assert (error.status, error.type, error.code, error.param) == (429, "rate_limit_error", "too_many_failures", None)
    assert error.retry_after == 60
    assert str(error) == "too many failed logins from your address: wait up to a minute"


@pytest.mark.anyio
async def test_addresses_whose_failures_expired_are_forgotten() -> None:
    limiter = LoginLimiter("1/second", "1/second")
    for number in range(1000):
        limiter.count_failure(Guesser(f"10.0.{number // 250}.{number % 250}"))
    async with asyncio.timeout(PATIENCE):
        while len(keys_in_memory(limiter)) > 2:  # a failure starts a search for expired ones, in another thread
            limiter.count_failure(Guesser("10.9.9.9"))
            await asyncio.sleep(0.01)
    assert all("10.9.9.9" in key for key in keys_in_memory(limiter))


@settings(max_examples=50, deadline=None)
@given(strategies.lists(strategies.sampled_from("abc"), max_size=20), strategies.integers(1, 4))
def test_an_address_is_blocked_from_the_limit_on(failures: list[str], limit: int) -> None:
    limiter = LoginLimiter(f"{limit}/hour")
    counts: Counter[str] = Counter()
    for failed in failures:
        limiter.count_failure(Guesser(failed))
        counts[failed] += 1
        assert {address: is_blocked(limiter, address) for address in "abc"} == {
            address: counts[address] >= limit for address in "abc"
        }
