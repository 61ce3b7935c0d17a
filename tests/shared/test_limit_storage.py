"""Limits that two hosts share: each has a link to Redis of its own."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from limits import parse
from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter

from models.shared.limit_storage import LimitStorage
from models.shared.redis_link import RedisLink
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0  # seconds, for what takes none
LIMIT = parse("5/hour")
STRATEGIES = pytest.mark.parametrize("strategy", [FixedWindowRateLimiter, MovingWindowRateLimiter])
PROCESS = """
import asyncio, sys
from limits import parse
from limits.aio.strategies import MovingWindowRateLimiter
from models.shared.limit_storage import LimitStorage
from models.shared.redis_link import RedisLink

async def main():
    link = RedisLink(sys.argv[1], 20.0)
    limiter = MovingWindowRateLimiter(LimitStorage(link))
    print("ready", flush=True)
    sys.stdin.readline()
    hits = await asyncio.gather(*[limiter.hit(parse("5/hour"), "ann") for _ in range(100)])
    print(sum(hits))
    await link.close()

asyncio.run(main())
"""

Strategy = type[FixedWindowRateLimiter] | type[MovingWindowRateLimiter]


class Host:
    """A host with a link to Redis of its own."""

    def __init__(self, url: str) -> None:
        self.link = RedisLink(url, PATIENCE)
        self.storage = LimitStorage(self.link)

    async def count_allowed(self, strategy: Strategy, hits: int = 9, key: str = "ann") -> int:
        """How many of some simultaneous hits are allowed."""
        limiter = strategy(self.storage)
        return sum(await asyncio.gather(*[limiter.hit(LIMIT, key) for _ in range(hits)]))


@pytest.fixture
async def hosts(redis_server: RedisServer) -> AsyncIterator[tuple[Host, Host]]:
    """Two hosts with one Redis."""
    first, second = Host(redis_server.url), Host(redis_server.url)
    yield first, second
    await first.link.close()
    await second.link.close()


@STRATEGIES
async def test_simultaneous_hits_on_two_hosts_are_allowed_exactly_up_to_the_limit(
    hosts: tuple[Host, Host], strategy: Strategy
) -> None:
    allowed = await asyncio.gather(*[host.count_allowed(strategy, 100) for host in hosts])
    assert sum(allowed) == 5
    assert [host.link.trouble for host in hosts] == [None, None]


@STRATEGIES
async def test_a_host_knows_what_another_one_has_counted(hosts: tuple[Host, Host], strategy: Strategy) -> None:
    first, second = hosts
    await first.count_allowed(strategy, 3)
    limiter = strategy(second.storage)
    window = await limiter.get_window_stats(LIMIT, "ann")
    assert window.remaining == 2
    assert await limiter.test(LIMIT, "ann")
    await first.count_allowed(strategy, 2)
    assert not await limiter.test(LIMIT, "ann")
    assert await limiter.test(LIMIT, "bob")


@STRATEGIES
async def test_each_host_counts_for_itself_while_redis_is_away(
    hosts: tuple[Host, Host], redis_server: RedisServer, strategy: Strategy
) -> None:
    redis_server.kill()
    assert [await host.count_allowed(strategy) for host in hosts] == [5, 5]
    assert [await host.count_allowed(strategy) for host in hosts] == [0, 0]
    assert [await host.count_allowed(strategy, key="bob") for host in hosts] == [5, 5]


@STRATEGIES
async def test_hosts_count_together_again_when_redis_is_back(
    hosts: tuple[Host, Host], redis_server: RedisServer, strategy: Strategy
) -> None:
    redis_server.kill()
    assert [await host.count_allowed(strategy) for host in hosts] == [5, 5]
    redis_server.start()
    for host in hosts:
        host.link.recovered()
    assert sum([await host.count_allowed(strategy) for host in hosts]) == 5


async def test_two_processes_count_together(redis_server: RedisServer) -> None:
    start = partial(asyncio.create_subprocess_exec, cwd=ROOT, stdin=PIPE, stdout=PIPE)
    processes = [await start(sys.executable, "-c", PROCESS, redis_server.url) for _ in range(2)]
    for process in processes:
        assert process.stdout
        assert await process.stdout.readline() == b"ready\n"
    outputs = await asyncio.gather(*[process.communicate(b"\n") for process in processes])
    assert sum(int(output) for output, _ in outputs) == 5
