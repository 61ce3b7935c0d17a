"""Presence on two hosts with one Redis: each has a link, and registers the windows of its users."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from models.shared.redis_link import RedisLink
from models.shared.redis_presence import HOSTS, MISSED_BEATS, RedisPresence
from models.users.connections import Change, ConnectionRegistry
from tests.support.fake_clock import FakeClock
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.anyio

PATIENCE = 20  # seconds, for what takes less than one
BEAT = 10.0  # seconds; the tests beat themselves


class Window:
    """A connection that keeps what it is told of other users."""

    login_session = None

    def __init__(self) -> None:
        self.changes: list[tuple[Change, str]] = []

    def presence_changed(self, change: Change, user: str) -> None:
        self.changes.append((change, user))

    def conversation_changed(self, id: str, conversation: object) -> None:
        raise NotImplementedError

    def close(self, code: int, reason: str) -> None:
        raise NotImplementedError


class Host:
    """A host that beats when a test wants it. `nudges` counts how often the others should look."""

    def __init__(self, url: str, name: str, clock: FakeClock, seconds: float) -> None:
        self.link = RedisLink(url)
        self.presence = RedisPresence(self.link, name, self._nudge, seconds, clock)
        self.registry = ConnectionRegistry(announce=True, per_user=9, presence=self.presence)
        self.nudges = 0
        self.watcher = Window()  # of a user of its own
        self.registry.add(f"watcher of {name}", self.watcher)

    def join(self, user: str) -> Window:
        """Open a window of a user."""
        window = Window()
        self.registry.add(user, window)
        return window

    def told(self) -> list[tuple[Change, str]]:
        """What the watcher was told since the last call."""
        told, self.watcher.changes = self.watcher.changes, []
        return told

    def _nudge(self) -> None:
        self.nudges += 1


class Hosts:
    """Two hosts with one Redis, and a clock; `seconds` is how soon the first one has to beat."""

    def __init__(self, url: str, seconds: float = BEAT) -> None:
        self.clock = FakeClock()
        self.first = Host(url, "first", self.clock, seconds)
        self.second = Host(url, "second", self.clock, BEAT)

    async def beat(self) -> None:
        """Let both hosts write, then both read."""
        for host in (self.first, self.second, self.first):
            await host.presence.beat()

    async def close(self) -> None:
        for host in (self.first, self.second):
            await host.link.close()

    def told(self) -> list[list[tuple[Change, str]]]:
        """What the watchers of both hosts were told since the last call."""
        return [self.first.told(), self.second.told()]


@pytest.fixture
async def hosts(redis_server: RedisServer) -> AsyncIterator[Hosts]:
    """Two hosts that know each other's watchers."""
    hosts = Hosts(redis_server.url)
    await hosts.beat()
    hosts.told()
    yield hosts
    await hosts.close()


async def test_users_hear_who_joins_and_leaves_on_another_host(hosts: Hosts) -> None:
    window = hosts.first.join("ann")
    await hosts.beat()
    assert hosts.told() == [[("joined", "ann")]] * 2
    hosts.first.registry.leave("ann", window)
    await hosts.beat()
    assert hosts.told() == [[("left", "ann")]] * 2


async def test_a_user_with_windows_on_two_hosts_joins_and_leaves_once(hosts: Hosts) -> None:
    first = hosts.first.join("ann")
    await hosts.beat()
    second = hosts.second.join("ann")
    await hosts.beat()
    assert hosts.told() == [[("joined", "ann")]] * 2
    hosts.first.registry.leave("ann", first)
    await hosts.beat()
    assert hosts.told() == [[], []]
    hosts.second.registry.leave("ann", second)
    await hosts.beat()
    assert hosts.told() == [[("left", "ann")]] * 2
    assert first.changes == second.changes == []


async def test_the_others_look_only_after_a_change(hosts: Hosts) -> None:
    before = hosts.first.nudges
    await hosts.beat()
    assert hosts.first.nudges == before
    window = hosts.first.join("ann")
    hosts.first.join("ann")
    await hosts.beat()
    assert hosts.first.nudges == before + 1
    hosts.first.registry.leave("ann", window)
    await hosts.beat()
    assert hosts.first.nudges == before + 1


async def test_a_host_that_starts_later_announces_nobody_who_was_there_before(
    hosts: Hosts, redis_server: RedisServer
) -> None:
    hosts.first.join("ann")
    await hosts.beat()
    presence = RedisPresence(link := RedisLink(redis_server.url), "third", lambda: None)
    await presence.beat()
    registry = ConnectionRegistry(announce=True, per_user=9, presence=presence)
    watcher = Window()
    registry.add("bob", watcher)
    registry.add("ann", Window())
    assert watcher.changes == []
    await link.close()


async def test_the_users_of_a_host_that_ends_leave_at_once(hosts: Hosts) -> None:
    hosts.first.join("ann")
    await hosts.beat()
    hosts.told()
    await hosts.first.presence.leave()
    await hosts.second.presence.beat()
    assert hosts.second.told() == [("left", "ann"), ("left", "watcher of first")]
    await hosts.second.presence.beat()
    assert await hosts.second.link.client.smembers(HOSTS) == {b"second"}


async def test_the_users_of_a_host_that_does_not_beat_are_gone_after_a_while(redis_server: RedisServer) -> None:
    hosts = Hosts(redis_server.url, seconds=0.05)
    hosts.first.join("ann")
    await hosts.beat()
    hosts.told()
    async with asyncio.timeout(PATIENCE):
        while "ann" in hosts.second.presence.elsewhere:
            await hosts.second.presence.beat()
    assert hosts.second.told() == [("left", "ann"), ("left", "watcher of first")]
    await hosts.beat()  # it was only frozen
    assert hosts.second.told() == [("joined", "ann"), ("joined", "watcher of first")]
    await hosts.close()


async def test_nobody_leaves_because_redis_is_away_for_a_moment(hosts: Hosts, redis_server: RedisServer) -> None:
    hosts.first.join("ann")
    await hosts.beat()
    hosts.told()
    redis_server.kill()
    await hosts.beat()
    redis_server.start()
    await hosts.beat()  # the first host is back, and finds no other one
    assert hosts.told() == [[], []]
    hosts.clock.now += MISSED_BEATS * BEAT
    await hosts.beat()
    hosts.second.join("bob")
    await hosts.beat()
    assert hosts.told() == [[("joined", "bob")]] * 2


async def test_a_host_is_alone_while_redis_is_away_for_long(hosts: Hosts, redis_server: RedisServer) -> None:
    hosts.first.join("ann")
    await hosts.beat()
    hosts.told()
    redis_server.kill()
    await hosts.beat()
    hosts.clock.now += MISSED_BEATS * BEAT
    await hosts.beat()
    assert hosts.told() == [[("left", "watcher of second")], [("left", "ann"), ("left", "watcher of first")]]
    hosts.second.join("bob")
    assert hosts.told() == [[], [("joined", "bob")]]
    redis_server.start()
    await hosts.beat()
    assert hosts.first.told() == [("joined", "bob"), ("joined", "watcher of second")]
    assert hosts.second.told() == [("joined", "ann"), ("joined", "watcher of first")]
