"""News that one host tells another; both have a link to one Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from models.shared.redis_link import RedisAwayError, RedisLink
from models.shared.redis_news import SENT_TOGETHER, WAITING, RedisNews
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.anyio


class Host:
    """A host that sends and reads when a test wants it, and keeps what it hears."""

    def __init__(self, url: str, name: str) -> None:
        self.link = RedisLink(url)
        self.news = RedisNews(self.link, name)
        self.news.on_news = lambda *change: self.heard.append(change)
        self.news.on_presence = lambda: self.heard.append("presence")
        self.heard: list[object] = []


@pytest.fixture
async def hosts(redis_server: RedisServer) -> AsyncIterator[tuple[Host, Host]]:
    """Two hosts that read news from now on."""
    hosts = Host(redis_server.url, "first"), Host(redis_server.url, "second")
    for host in hosts:
        await host.news.read()
    yield hosts
    for host in hosts:
        await host.link.close()


async def test_the_other_host_hears_of_each_change_and_the_own_one_of_none(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    first.news.tell("ann", "conv_1", deleted=False)
    first.news.tell("bob", "conv_2", deleted=True)
    first.news.tell_presence()
    await first.news.send()
    for host in hosts:
        await host.news.read()
    assert second.heard == [("ann", "conv_1", False), ("bob", "conv_2", True), "presence"]
    assert first.heard == []


async def test_many_changes_of_a_conversation_are_sent_as_one(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    for deleted in (False, True, False):
        first.news.tell("ann", "conv_1", deleted)
    await first.news.send()
    await second.news.read()
    assert second.heard == [("ann", "conv_1", True)]


async def test_without_changes_nothing_is_sent(hosts: tuple[Host, Host]) -> None:
    first, _ = hosts
    await first.news.send()
    first.news.tell("ann", "conv_1", deleted=False)
    await first.news.send()
    await first.news.send()
    assert await first.link.client.xlen("parley:news") == 1


async def test_more_changes_than_are_sent_together_all_arrive(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    for number in range(SENT_TOGETHER + 1):
        first.news.tell("ann", f"conv_{number}", deleted=False)
    await first.news.send()
    await first.news.send()
    await second.news.read()
    assert len(second.heard) == SENT_TOGETHER + 1


async def test_a_host_that_starts_hears_nothing_old(hosts: tuple[Host, Host], redis_server: RedisServer) -> None:
    first, _ = hosts
    first.news.tell("ann", "conv_1", deleted=False)
    await first.news.send()
    third = Host(redis_server.url, "third")
    await third.news.read()
    first.news.tell("ann", "conv_2", deleted=False)
    await first.news.send()
    await third.news.read()
    assert third.heard == [("ann", "conv_2", False)]
    await third.link.close()


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_changes_while_redis_is_away_are_told_when_it_is_back(
    hosts: tuple[Host, Host], redis_server: RedisServer, how: str
) -> None:
    first, second = hosts
    redis_server.kill() if how == "killed" else redis_server.freeze()
    first.news.tell("ann", "conv_1", deleted=False)
    first.news.tell_presence()
    await first.news.send()
    first.news.tell("ann", "conv_2", deleted=False)
    await first.news.send()
    with pytest.raises(RedisAwayError):
        await second.news.read()
    redis_server.start() if how == "killed" else redis_server.thaw()
    for host in hosts:
        host.link.recovered()
    await first.news.send()
    await second.news.read()
    assert {*second.heard} == {("ann", "conv_1", False), ("ann", "conv_2", False), "presence"}


async def test_the_oldest_changes_are_dropped_if_too_many_wait(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    for number in range(WAITING + 1):
        first.news.tell("ann", f"conv_{number}", deleted=False)
    await first.news.send()
    await second.news.read()
    assert second.heard[0] == ("ann", "conv_1", False)
