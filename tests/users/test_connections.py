from __future__ import annotations

import asyncio

import pytest

from models.errors import TooManyConnectionsError
from models.store.conversations import Conversation
from models.users.connections import CONNECTS, Change, ConnectionRegistry
from tests.support.held_storage import HeldStorage

Changes = list[tuple[Change, str]]

REVOKED = (4401, "invalid_credentials")
RESTART = (1012, "the server restarts")


class FakeConnection:
    """Keeps what it is told."""

    def __init__(self, login_session: str | None = None) -> None:
        self.login_session = login_session
        self.changes: Changes = []
        self.conversations: list[tuple[str, Conversation | None]] = []
        self.closed: list[tuple[int, str]] = []

    def presence_changed(self, change: Change, user: str) -> None:
        self.changes.append((change, user))

    def conversation_changed(self, id: str, conversation: Conversation | None) -> None:
        self.conversations.append((id, conversation))

    def close(self, code: int, reason: str) -> None:
        self.closed.append((code, reason))


@pytest.fixture
def registry() -> ConnectionRegistry:
    """A registry that announces, with room for all connections of a test."""
    return ConnectionRegistry(announce=True, per_user=9)


def join(registry: ConnectionRegistry, user: str) -> FakeConnection:
    """A new connection of a user."""
    connection = FakeConnection()
    registry.add(user, connection)
    return connection


def test_the_connections_of_a_session_are_closed_and_no_others(registry: ConnectionRegistry) -> None:
    users: dict[str, list[str | None]] = {"ann": ["one", "one", "two", None], "bob": ["one"]}
    connections = {user: [FakeConnection(session) for session in sessions] for user, sessions in users.items()}
    for user, own in connections.items():
        for connection in own:
            registry.add(user, connection)
    registry.close_session("ann", "one", *REVOKED)
    registry.close_session("eve", "one", *REVOKED)
    assert [bool(connection.closed) for connection in connections["ann"]] == [True, True, False, False]
    assert connections["ann"][0].closed == [REVOKED]
    assert connections["bob"][0].closed == []


class BrokenConnection(FakeConnection):
    """Fails when it is told of a conversation."""

    def conversation_changed(self, id: str, conversation: Conversation | None) -> None:
        raise RuntimeError("a bug")


def test_all_connections_of_a_user_hear_of_a_conversation_also_behind_one_that_fails(
    registry: ConnectionRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    first, broken, last, other = FakeConnection(), BrokenConnection(), FakeConnection(), FakeConnection()
    for connection in (first, broken, last):
        registry.add("ann", connection)
    registry.add("bob", other)
    conversation = Conversation("conv_1", "Title", 1.0, 2.0)
    registry.conversation_changed("ann", "conv_1", conversation)
    registry.conversation_changed("eve", "conv_1", None)
    assert first.conversations == last.conversations == [("conv_1", conversation)]
    assert (broken.conversations, other.conversations) == ([], [])
    assert "a bug" in caplog.text


# Announcements


def test_others_hear_of_a_users_first_and_last_connection(registry: ConnectionRegistry) -> None:
    watchers = [join(registry, "ann"), join(registry, "ann"), join(registry, "bob")]
    for watcher in watchers:
        watcher.changes.clear()
    first, second = join(registry, "eve"), join(registry, "eve")
    registry.leave("eve", first)
    assert [watcher.changes for watcher in watchers] == [[("joined", "eve")]] * 3
    registry.leave("eve", second)
    assert [watcher.changes for watcher in watchers] == [[("joined", "eve"), ("left", "eve")]] * 3


def test_a_user_hears_nothing_about_their_own_connections(registry: ConnectionRegistry) -> None:
    first, second = join(registry, "ann"), join(registry, "ann")
    registry.leave("ann", first)
    registry.leave("ann", second)
    assert first.changes == second.changes == []


def test_a_connection_that_left_hears_nothing_more(registry: ConnectionRegistry) -> None:
    gone, present = join(registry, "ann"), join(registry, "ann")
    registry.leave("ann", gone)
    join(registry, "bob")
    assert (gone.changes, present.changes) == ([], [("joined", "bob")])


def test_a_user_who_comes_back_is_announced_again(registry: ConnectionRegistry) -> None:
    ann = join(registry, "ann")
    registry.leave("bob", join(registry, "bob"))
    join(registry, "bob")
    assert ann.changes == [("joined", "bob"), ("left", "bob"), ("joined", "bob")]


def test_without_announcements_nobody_hears_of_others() -> None:
    registry = ConnectionRegistry(announce=False, per_user=9)
    ann = join(registry, "ann")
    registry.leave("bob", join(registry, "bob"))
    assert ann.changes == []


class TiredConnection(FakeConnection):
    """Fails when it is told of a user."""

    def presence_changed(self, change: Change, user: str) -> None:
        raise RuntimeError("a bug")


def test_others_hear_of_a_user_also_behind_a_connection_that_fails(
    registry: ConnectionRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    registry.add("bob", TiredConnection())
    ann = join(registry, "ann")
    join(registry, "eve")
    assert ann.changes == [("joined", "eve")]
    assert "a bug" in caplog.text


# The limit


@pytest.mark.parametrize("announce", [True, False], ids=["announced", "silent"])
def test_the_connections_of_each_user_are_counted(announce: bool) -> None:
    registry = ConnectionRegistry(announce, per_user=9)
    first, _ = join(registry, "ann"), join(registry, "ann")
    assert (registry.count("ann"), registry.count("bob")) == (2, 0)
    registry.leave("ann", first)
    assert registry.count("ann") == 1


@pytest.mark.anyio
@pytest.mark.parametrize("per_user", [1, 3])
async def test_a_user_has_a_limited_number_of_connections(per_user: int) -> None:
    registry = ConnectionRegistry(announce=True, per_user=per_user)
    for _ in range(per_user):
        await registry.join("ann", last := FakeConnection())
    with pytest.raises(TooManyConnectionsError, match="too many open connections") as raised:
        await registry.join("ann", FakeConnection())
    assert (raised.value.type, raised.value.code) == ("rate_limit_error", "too_many_sockets")
    await registry.join("bob", FakeConnection())
    registry.leave("ann", last)
    await registry.join("ann", FakeConnection())


@pytest.mark.anyio
async def test_a_refused_connection_does_not_count() -> None:
    registry = ConnectionRegistry(announce=True, per_user=1)
    await registry.join("ann", first := FakeConnection())
    for _ in range(3):
        with pytest.raises(TooManyConnectionsError):
            await registry.join("ann", FakeConnection())
    assert registry.count("ann") == 1
    registry.leave("ann", first)
    await registry.join("ann", FakeConnection())


@pytest.mark.anyio
async def test_connections_that_are_opened_at_once_do_not_exceed_the_limit() -> None:
    storage = HeldStorage()
    registry = ConnectionRegistry(announce=True, per_user=2, limits=storage)
    joining = asyncio.gather(*[registry.join("ann", FakeConnection()) for _ in range(9)], return_exceptions=True)
    await storage.asked.wait()
    storage.may_count.set()
    refused = [error for error in await joining if error]
    assert [type(error) for error in refused] == [TooManyConnectionsError] * 7
    assert registry.count("ann") == 2


@pytest.mark.anyio
async def test_a_connection_that_is_given_up_while_it_is_counted_leaves_room() -> None:
    storage = HeldStorage()
    registry = ConnectionRegistry(announce=True, per_user=1, limits=storage)
    joining = asyncio.create_task(registry.join("ann", FakeConnection()))
    await storage.asked.wait()
    joining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await joining
    storage.may_count.set()
    await registry.join("ann", FakeConnection())
    assert registry.count("ann") == 1


# Closing


@pytest.mark.anyio
async def test_a_connection_that_is_being_counted_is_closed_with_the_others_of_its_user_and_session() -> None:
    storage = HeldStorage()
    registry = ConnectionRegistry(announce=True, per_user=9, limits=storage)
    joining = asyncio.create_task(registry.join("ann", connection := FakeConnection("one")))
    await storage.asked.wait()
    registry.close_user("bob", *REVOKED)
    registry.close_user("ann", *REVOKED)
    registry.close_session("ann", "two", *RESTART)
    registry.close_session("ann", "one", *RESTART)
    storage.may_count.set()
    await joining
    assert connection.closed == [REVOKED, RESTART]


def test_only_the_connections_of_one_user_are_closed(registry: ConnectionRegistry) -> None:
    anns, bob = [join(registry, "ann") for _ in range(3)], join(registry, "bob")
    registry.close_user("ann", *REVOKED)
    assert [ann.closed for ann in anns] == [[REVOKED]] * 3
    assert bob.closed == []


def test_a_user_without_connections_can_be_closed(registry: ConnectionRegistry) -> None:
    registry.close_user("ann", *REVOKED)
    assert len(registry) == 0


def test_a_closed_connection_counts_until_it_leaves(registry: ConnectionRegistry) -> None:
    first, _, _ = join(registry, "ann"), join(registry, "ann"), join(registry, "bob")
    registry.close_user("ann", *REVOKED)
    assert (len(registry), registry.count("ann")) == (3, 2)
    registry.leave("ann", first)
    assert (len(registry), registry.count("ann")) == (2, 1)


@pytest.mark.anyio
async def test_close_all_waits_for_the_last_connection_and_announces_nothing(registry: ConnectionRegistry) -> None:
    registry.leave("eve", join(registry, "eve"))  # the registry was empty once before
    connections = [(user, join(registry, user)) for user in ("ann", "ann", "bob")]
    for _, connection in connections:
        connection.changes.clear()
    closing = asyncio.create_task(registry.close_all(*RESTART))
    await asyncio.sleep(0)
    for user, connection in connections:
        assert connection.closed == [RESTART]
        assert not closing.done()
        registry.leave(user, connection)
    await closing
    assert [connection.changes for _, connection in connections] == [[]] * 3


@pytest.mark.anyio
async def test_close_all_does_not_wait_where_nobody_is_connected(registry: ConnectionRegistry) -> None:
    await registry.close_all(*RESTART)
    registry.leave("ann", join(registry, "ann"))
    await registry.close_all(*RESTART)
    assert len(registry) == 0


# Users who come and go all the time


async def pauses_to_end() -> None:
    """Wait until all pauses of no length are over: timers run in the order of their times."""
    ended = asyncio.Event()
    asyncio.get_running_loop().call_later(0, ended.set)
    await ended.wait()


def changes_of_a_flapping_user(stays: bool) -> Changes:
    """What another user hears of one who comes and goes a hundred times, and then may stay."""

    async def flap() -> Changes:
        registry = ConnectionRegistry(announce=True, per_user=9, pause=0)
        watcher = join(registry, "ann")
        for _ in range(100):
            registry.leave("bob", join(registry, "bob"))
        if stays:
            join(registry, "bob")
        await pauses_to_end()
        return watcher.changes

    return asyncio.run(flap())


def test_others_hear_of_a_flapping_user_only_now_and_then() -> None:
    changes = changes_of_a_flapping_user(stays=True)
    assert changes == [("joined", "bob"), ("left", "bob")] * 3 + [("joined", "bob")]


def test_a_flapping_user_who_ends_as_before_is_not_announced() -> None:
    assert changes_of_a_flapping_user(stays=False) == [("joined", "bob"), ("left", "bob")] * 3


@pytest.mark.anyio
async def test_a_user_may_open_only_some_connections_a_minute() -> None:
    registry = ConnectionRegistry(announce=False, per_user=2)
    for _ in range(2 + CONNECTS):
        await registry.join("ann", connection := FakeConnection())
        registry.leave("ann", connection)
    with pytest.raises(TooManyConnectionsError, match="wait up to a minute"):
        await registry.join("ann", FakeConnection())
    await registry.join("bob", FakeConnection())
