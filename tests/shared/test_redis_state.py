"""Hosts as they run: each opens the shared state of one Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from models.errors import APIError, RateLimitExceededError, TooManyConnectionsError, TooManyLoginsError
from models.generation.admission import Admission
from models.settings import Settings
from models.shared.redis_state import RedisState
from models.shared.shared_state import OwnState, open_shared_state
from models.store.conversations import Conversation, Conversations
from models.users.connections import CONNECTS, ConnectionRegistry
from models.users.conversation_feed import ConversationFeed
from models.users.users import Users
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.anyio

PATIENCE = 20  # seconds, for what takes one
BEAT, ANSWER = 0.3, 2.0  # seconds


class Window:
    """A connection that keeps what it is told."""

    login_session = None

    def __init__(self) -> None:
        self.told: asyncio.Queue[tuple[str, object]] = asyncio.Queue()

    def presence_changed(self, change: str, user: str) -> None:
        self.told.put_nowait((change, user))

    def conversation_changed(self, id: str, conversation: Conversation | None) -> None:
        self.told.put_nowait((id, conversation))

    def close(self, code: int, reason: str) -> None:
        raise NotImplementedError

    async def next(self) -> tuple[str, object]:
        """What it is told next."""
        async with asyncio.timeout(PATIENCE):
            return await self.told.get()


class Host:
    """A host with users, windows and conversations."""

    def __init__(self, state: RedisState, feed: ConversationFeed, registry: ConnectionRegistry, users: Users) -> None:
        self.state = state
        self.feed = feed
        self.registry = registry
        self.users = users

    @classmethod
    async def opened(cls, url: str, stack: AsyncExitStack, conversations: Conversations, settings: Settings) -> Host:
        """A host with a database, until the end of the stack."""
        state = await stack.enter_async_context(RedisState.opened(url, BEAT, ANSWER))
        registry = ConnectionRegistry(True, 1, state.limits, state.presence)
        feed = await stack.enter_async_context(ConversationFeed.opened(conversations, registry, state.news))
        return cls(state, feed, registry, Users.open(settings, conversations._database, state.limits))

    def join(self, user: str) -> Window:
        """Open a window of a user."""
        window = Window()
        self.registry.add(user, window)
        return window

    async def log_in(self) -> str | None:
        """Try a wrong secret; returns the code of the error."""
        with pytest.raises(APIError) as raised:
            await self.users.log_in("wrong", None, "10.0.0.1")
        return raised.value.code

    async def wait_there(self) -> None:
        """Wait until Redis is there."""
        async with asyncio.timeout(PATIENCE):
            await self.state.link.wait_there()


@pytest.fixture
async def hosts(
    stopped_redis: RedisServer, conversations: Conversations, settings: Settings
) -> AsyncIterator[tuple[Host, Host]]:
    """Two hosts with one database. Redis is there, unless a test starts it later."""
    async with AsyncExitStack() as stack:
        urls = [stopped_redis.url] * 2
        first, second = [await Host.opened(url, stack, conversations, settings) for url in urls]
        yield first, second


@pytest.fixture
async def sharing(redis_server: RedisServer, hosts: tuple[Host, Host]) -> tuple[Host, Host]:
    """Two hosts that know of each other."""
    for host in hosts:
        await host.wait_there()
    return hosts


async def test_without_redis_a_host_is_alone_and_has_no_trouble() -> None:
    async with open_shared_state(None) as state:
        assert isinstance(state, OwnState)
        assert state.trouble is None


# Limits


async def test_ten_wrong_secrets_in_all_are_answered_by_two_hosts(sharing: tuple[Host, Host]) -> None:
    codes = await asyncio.gather(*[host.log_in() for host in sharing for _ in range(30)])
    assert codes.count("invalid_credentials") == 10
    assert codes.count(TooManyLoginsError.code) == 50


async def test_five_of_two_hundred_simultaneous_requests_on_two_hosts_are_allowed(sharing: tuple[Host, Host]) -> None:
    settings = Settings(slots=1, queue=1000, rate="5/minute")
    admissions = [Admission.of(settings, host.state.limits) for host in sharing]
    entered = await asyncio.gather(
        *[admission.enter("ann") for admission in admissions for _ in range(100)], return_exceptions=True
    )
    assert sum(isinstance(one, RateLimitExceededError) for one in entered) == 195
    assert sum(admission.in_flight.total() for admission in admissions) == 5
    assert all(0 <= admission.free <= 1 for admission in admissions)


async def test_tokens_that_are_spent_on_one_host_count_on_the_other(sharing: tuple[Host, Host]) -> None:
    first, second = [Admission.of(Settings(token_rate="10/day"), host.state.limits) for host in sharing]
    await first.count_tokens("ann", 10)
    with pytest.raises(RateLimitExceededError, match="10 tokens per 1 day"):
        await second.enter("ann")


async def test_connections_that_are_opened_on_two_hosts_count_together(sharing: tuple[Host, Host]) -> None:
    for number in range(1 + CONNECTS):
        host, window = sharing[number % 2], Window()
        await host.registry.join("ann", window)
        host.registry.leave("ann", window)
    for host in sharing:
        with pytest.raises(TooManyConnectionsError, match="wait up to a minute"):
            await host.registry.join("ann", Window())


# Presence and news


async def test_a_window_hears_of_users_and_conversations_of_another_host(
    sharing: tuple[Host, Host], conversations: Conversations
) -> None:
    first, second = sharing
    anns = first.join("ann")
    bobs = second.join("bob")
    assert await anns.next() == ("joined", "bob")
    assert await bobs.next() == ("joined", "ann")
    conversation = await conversations.create("bob", title="Hello")
    first.feed.changed("bob", conversation.id)
    assert await bobs.next() == (conversation.id, await conversations.find("bob", conversation.id))
    await conversations.delete("bob", conversation.id)
    first.feed.deleted("bob", conversation.id)
    assert await bobs.next() == (conversation.id, None)
    assert anns.told.empty()


async def test_what_a_host_tells_as_it_ends_is_heard(
    sharing: tuple[Host, Host], conversations: Conversations, redis_server: RedisServer
) -> None:
    window = sharing[0].join("ann")
    conversation = await conversations.create("ann", title="Hello")
    async with RedisState.opened(redis_server.url, BEAT) as state:
        state.news.tell("ann", conversation.id, deleted=False)
    assert (await window.next())[0] == conversation.id


async def test_the_users_of_a_host_that_ends_are_no_longer_written(
    sharing: tuple[Host, Host], redis_server: RedisServer
) -> None:
    async with RedisState.opened(redis_server.url, BEAT):
        assert len(await sharing[0].state.link.client.keys("parley:users:*")) == 3
    assert len(await sharing[0].state.link.client.keys("parley:users:*")) == 2


# Redis away


async def test_hosts_start_without_redis_and_share_once_it_is_there(
    stopped_redis: RedisServer, hosts: tuple[Host, Host], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = hosts
    window = second.join("bob")
    first.join("ann")
    assert [await host.log_in() for host in hosts for _ in range(11)].count("invalid_credentials") == 20
    assert first.state.trouble == "Redis is away: limits and presence are those of this host alone"
    stopped_redis.start()
    assert await window.next() == ("joined", "ann")
    await first.wait_there()
    codes = [await host.log_in() for host in hosts for _ in range(11)]
    assert codes.count("invalid_credentials") == 10
    logged = [record.message for record in (*caplog.get_records("setup"), *caplog.get_records("call"))]
    assert [message.partition(",")[0] for message in logged] == ["Redis is away"] * 2 + ["Redis is back"] * 2


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_hosts_share_again_when_redis_is_back(
    redis_server: RedisServer, sharing: tuple[Host, Host], conversations: Conversations, how: str
) -> None:
    first, second = sharing
    window = second.join("bob")
    redis_server.kill() if how == "killed" else redis_server.freeze()
    for host in sharing:
        await host.state.limits.get("ann")  # finds out that Redis is away
        assert host.state.trouble
    first.join("ann")
    await conversations.create("bob", title="Hello")
    redis_server.start() if how == "killed" else redis_server.thaw()
    assert await window.next() == ("joined", "ann")
    conversation = await conversations.create("bob", title="Hello")
    first.feed.changed("bob", conversation.id)
    assert (await window.next())[0] == conversation.id
