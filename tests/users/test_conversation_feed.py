from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from models.store.conversations import Conversation, Conversations
from models.users.connections import ConnectionRegistry
from models.users.conversation_feed import WAITING, ConversationFeed
from tests.support.trees import begin, message, reply

pytestmark = pytest.mark.anyio


class Reader(Conversations):
    """The store as the feed reads it: `asked` has each id. It waits while `may_find` is clear, or fails if `broken`."""

    def __init__(self, database: AsyncEngine) -> None:
        super().__init__(database)
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self.may_find = asyncio.Event()
        self.may_find.set()
        self.broken = False

    async def find(self, user: str, id: str) -> Conversation:
        self.asked.put_nowait(id)
        await self.may_find.wait()
        if self.broken:
            raise OSError("the database is away")
        return await super().find(user, id)


class Window:
    """A connection that keeps what it is told of conversations: the id and the title, which is None after the end."""

    login_session = None

    def __init__(self) -> None:
        self.told: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()

    def presence_changed(self, change: str, user: str) -> None:
        raise NotImplementedError

    def close(self, code: int, reason: str) -> None:
        raise NotImplementedError

    def conversation_changed(self, id: str, conversation: Conversation | None) -> None:
        self.told.put_nowait((id, conversation.title if conversation else None))

    async def next(self, count: int) -> list[tuple[str, str | None]]:
        """What it is told next; nothing more has come by then."""
        told = [await self.told.get() for _ in range(count)]
        assert self.told.empty()
        return told


@pytest.fixture
async def reader(conversations: Conversations) -> Reader:
    return Reader(conversations._database)


@pytest.fixture
def registry() -> ConnectionRegistry:
    return ConnectionRegistry(announce=False, per_user=9)


@pytest.fixture
async def feed(reader: Reader, registry: ConnectionRegistry) -> AsyncIterator[ConversationFeed]:
    async with ConversationFeed.opened(reader, registry) as feed:
        yield feed


def join(registry: ConnectionRegistry, user: str = "ann") -> Window:
    """A new connection of a user."""
    window = Window()
    registry.add(user, window)
    return window


async def test_each_connection_of_the_user_hears_of_changes_and_nobody_else(
    conversations: Conversations, registry: ConnectionRegistry, feed: ConversationFeed
) -> None:
    one, two, other = join(registry), join(registry), join(registry, "bob")
    first, second = await conversations.create("ann", title="one"), await conversations.create("ann", title="two")
    for conversation in (first, second):
        feed.changed("ann", conversation.id)
    feed.changed("bob", first.id)  # which is not his
    for window in (one, two):
        assert await window.next(2) == [(first.id, "one"), (second.id, "two")]
    await conversations.delete("ann", first.id)
    feed.deleted("ann", first.id)
    assert await one.next(1) == [(first.id, None)]
    assert other.told.empty()


async def test_many_changes_in_a_row_are_told_as_one_with_the_last_state(
    conversations: Conversations, reader: Reader, registry: ConnectionRegistry, feed: ConversationFeed
) -> None:
    window = join(registry)
    ids = [(await conversations.create("ann", title="old")).id for _ in range(2)]
    reader.may_find.clear()
    for id in ids:
        feed.changed("ann", id)
    await reader.asked.get()
    for number in range(100):  # while the first one is being read
        await conversations.update("ann", ids[number % 2], f"{number}")
        feed.changed("ann", ids[number % 2])
    reader.may_find.set()
    assert await window.next(3) == [(ids[0], "98"), (ids[1], "99"), (ids[0], "98")]


async def test_a_conversation_that_is_gone_by_the_time_it_is_read_is_told_once_as_deleted(
    conversations: Conversations, registry: ConnectionRegistry, feed: ConversationFeed
) -> None:
    window = join(registry)
    gone, kept = await conversations.create("ann", title="gone"), await conversations.create("ann", title="kept")
    await conversations.delete("ann", gone.id)
    feed.changed("ann", gone.id)
    feed.deleted("ann", gone.id)
    feed.changed("ann", gone.id)
    feed.deleted("ann", kept.id)  # and begun again with the same id
    assert await window.next(2) == [(gone.id, None), (kept.id, "kept")]


async def test_nothing_is_told_of_a_tree_that_is_not_listed(
    conversations: Conversations, registry: ConnectionRegistry, feed: ConversationFeed
) -> None:
    window = join(registry)
    await begin(conversations, "conv_1", message("msg_1"), reply("resp_1"), listed=False)
    feed.changed("ann", "conv_1")
    feed.changed("ann", (await conversations.create("ann", title="listed")).id)
    assert [title for _, title in await window.next(1)] == ["listed"]


async def test_a_user_without_a_connection_costs_no_read(
    conversations: Conversations, reader: Reader, registry: ConnectionRegistry, feed: ConversationFeed
) -> None:
    window = join(registry)
    feed.changed("bob", "conv_1")
    id = (await conversations.create("ann", title="one")).id
    feed.changed("ann", id)
    await window.next(1)
    assert (reader.asked.get_nowait(), reader.asked.empty()) == (id, True)


async def test_a_database_that_fails_is_logged_once_and_later_changes_are_told(
    conversations: Conversations,
    reader: Reader,
    registry: ConnectionRegistry,
    feed: ConversationFeed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    window = join(registry)
    id = (await conversations.create("ann", title="one")).id
    reader.broken = True
    for _ in range(3):
        feed.changed("ann", id)
        await reader.asked.get()
    reader.broken = False
    feed.changed("ann", id)
    assert await window.next(1) == [(id, "one")]
    told = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert told == ["changes of conversations cannot be told: OSError: the database is away"]


async def test_the_oldest_changes_are_dropped_if_too_many_wait(
    conversations: Conversations, reader: Reader, registry: ConnectionRegistry, feed: ConversationFeed
) -> None:
    join(registry)
    for number in range(WAITING + 10):
        feed.changed("ann", f"conv_{number}")
    assert list(feed._waiting) == [("ann", f"conv_{number}") for number in range(10, WAITING + 10)]
    feed._waiting.clear()
