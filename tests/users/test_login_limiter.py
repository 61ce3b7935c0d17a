from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings, strategies
from limits.aio.storage import MemoryStorage

from models.errors import TooManyLoginsError
from models.users.login_limiter import Guesser, LoginLimiter

pytestmark = pytest.mark.anyio

PATIENCE = 10  # seconds, for what takes one


async def is_blocked(limiter: LoginLimiter, address: str) -> bool:
    try:
        await limiter.check(Guesser(address))
    except TooManyLoginsError:
        return True
    return False


def keys_in_memory(limiter: LoginLimiter) -> set[str]:
    """What is kept in memory, by keys that name an address."""
    storage = limiter._limiter.storage
    assert isinstance(storage, MemoryStorage)
    return {*storage.storage, *storage.expirations, *storage.locks, *storage.events}


async def test_the_tenth_failure_blocks_an_address() -> None:
    limiter = LoginLimiter()
    for _ in range(10):
        await limiter.check(Guesser("10.0.0.1"))
        await limiter.count_failure(Guesser("10.0.0.1"))
    with pytest.raises(TooManyLoginsError):
        await limiter.check(Guesser("10.0.0.1"))


async def test_no_failure_over_the_limit_is_allowed_however_many_come_at_once() -> None:
    limiter = LoginLimiter()
    assert sum(await asyncio.gather(*[limiter.count_failure(Guesser("10.0.0.1")) for _ in range(50)])) == 10


async def test_a_failure_over_the_limit_of_an_address_is_allowed_to_the_device_of_a_user() -> None:
    limiter = LoginLimiter("2/minute")
    stranger, ann = Guesser("10.0.0.1"), Guesser("10.0.0.1", device_of="ann")
    assert [await limiter.count_failure(stranger) for _ in range(3)] == [True, True, False]
    assert [await limiter.count_failure(ann) for _ in range(3)] == [True, True, False]


async def test_a_block_is_for_one_address_only() -> None:
    limiter = LoginLimiter("3/minute")
    for _ in range(2):
        await limiter.count_failure(Guesser("10.0.0.1"))
    assert not await is_blocked(limiter, "10.0.0.1")
    await limiter.count_failure(Guesser("10.0.0.1"))
    assert await is_blocked(limiter, "10.0.0.1")
    assert not await is_blocked(limiter, "10.0.0.2")


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
async def test_an_ipv6_address_counts_by_its_network(first: str, second: str, blocked: bool) -> None:
    limiter = LoginLimiter("1/minute")
    await limiter.count_failure(Guesser(first))
    assert await is_blocked(limiter, second) == blocked


async def is_blocked_as(limiter: LoginLimiter, user_id: str | None, address: str = "10.0.0.1") -> bool:
    try:
        await limiter.check(Guesser(address, user_id))
    except TooManyLoginsError:
        return True
    return False


async def test_failures_with_a_user_id_block_only_this_id_from_this_address() -> None:
    limiter = LoginLimiter("2/minute")
    for _ in range(2):
        await limiter.count_failure(Guesser("10.0.0.1", "ann"))
    assert await is_blocked_as(limiter, "ann")
    assert not await is_blocked_as(limiter, "bob")
    assert not await is_blocked_as(limiter, None)
    assert not await is_blocked_as(limiter, "ann", "10.0.0.2")


async def test_failures_without_a_user_id_block_no_id() -> None:
    limiter = LoginLimiter("2/minute")
    for _ in range(2):
        await limiter.count_failure(Guesser("10.0.0.1"))
    assert await is_blocked_as(limiter, None)
    assert not await is_blocked_as(limiter, "ann")


async def test_an_address_is_blocked_when_it_fails_with_many_ids() -> None:
    limiter = LoginLimiter("2/minute", "5/minute")
    for number in range(5):
        assert not await is_blocked_as(limiter, "ann")
        await limiter.count_failure(Guesser("10.0.0.1", f"user{number}"))
    assert await is_blocked_as(limiter, "ann")
    assert await is_blocked_as(limiter, None)
    assert not await is_blocked_as(limiter, "ann", "10.0.0.2")


async def test_a_long_user_id_takes_little_memory() -> None:
    limiter = LoginLimiter("1/minute")
    await limiter.count_failure(Guesser("10.0.0.1", "x" * 60_000))
    assert all(len(key) < 200 for key in keys_in_memory(limiter))


async def test_devices_of_a_user_have_their_own_count() -> None:
    limiter = LoginLimiter("2/minute")
    for address in ("10.0.0.1", "10.0.0.2"):
        await limiter.check_device(Guesser(address, device_of="ann"))
        await limiter.count_failure(Guesser(address, device_of="ann"))
    with pytest.raises(TooManyLoginsError):
        await limiter.check_device(Guesser("10.0.0.3", device_of="ann"))
    await limiter.check_device(Guesser("10.0.0.3", device_of="bob"))
    assert not await is_blocked(limiter, "10.0.0.1")


async def test_who_shows_no_device_has_no_count_of_devices() -> None:
    with pytest.raises(TooManyLoginsError):
        await LoginLimiter().check_device(Guesser("10.0.0.1"))


async def test_a_block_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    limiter = LoginLimiter("2/minute")
    for _ in range(4):
        await limiter.count_failure(Guesser("10.0.0.1"))
    assert caplog.messages == ["logins blocked address=10.0.0.1"]


async def test_a_check_does_not_count_as_a_failure() -> None:
    limiter = LoginLimiter("1/minute")
    assert not any([await is_blocked(limiter, "10.0.0.1") for _ in range(3)])


async def test_a_block_ends_with_its_window_although_failures_go_on() -> None:
    limiter = LoginLimiter("2/second", "1000/second")
    for _ in range(2):
        await limiter.count_failure(Guesser("10.0.0.1"))
    async with asyncio.timeout(PATIENCE):
        while await is_blocked(limiter, "10.0.0.1"):
            await limiter.count_failure(Guesser("10.0.0.1"))
            await asyncio.sleep(0.01)
    await limiter.count_failure(Guesser("10.0.0.1"))
    assert not await is_blocked(limiter, "10.0.0.1")
    await limiter.count_failure(Guesser("10.0.0.1"))
    assert await is_blocked(limiter, "10.0.0.1")


async def test_each_limiter_counts_for_itself() -> None:
    first, second = LoginLimiter("1/minute"), LoginLimiter("1/minute")
    await first.count_failure(Guesser("10.0.0.1"))
    assert (await is_blocked(first, "10.0.0.1"), await is_blocked(second, "10.0.0.1")) == (True, False)


def test_a_block_tells_to_wait_and_nothing_else() -> None:
    error = TooManyLoginsError()
    assert (error.status, error.type, error.code, error.param) == (429, "rate_limit_error", "too_many_failures", None)
    assert error.retry_after == 60
    assert str(error) == "too many failed logins from your address: wait up to a minute"


async def test_addresses_whose_failures_expired_are_forgotten() -> None:
    limiter = LoginLimiter("1/second", "1/second")
    for number in range(1000):
        await limiter.count_failure(Guesser(f"10.0.{number // 250}.{number % 250}"))
    async with asyncio.timeout(PATIENCE):
        while len(keys_in_memory(limiter)) > 2:  # a failure starts a search for expired ones
            await limiter.count_failure(Guesser("10.9.9.9"))
            await asyncio.sleep(0.01)
    assert all("10.9.9.9" in key for key in keys_in_memory(limiter))


@settings(max_examples=50, deadline=None)
@given(strategies.lists(strategies.sampled_from("abc"), max_size=20), strategies.integers(1, 4))
async def test_an_address_is_blocked_from_the_limit_on(failures: list[str], limit: int) -> None:
    limiter = LoginLimiter(f"{limit}/hour")
    counts: Counter[str] = Counter()
    for failed in failures:
        await limiter.count_failure(Guesser(failed))
        counts[failed] += 1
        assert {address: await is_blocked(limiter, address) for address in "abc"} == {
            address: counts[address] >= limit for address in "abc"
        }
