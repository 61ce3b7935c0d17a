from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from models.errors import (
    ConversationNotFoundError,
    ItemNotFoundError,
    ServerUnavailableError,
    TooManyConnectionsError,
    TooManyLoginsError,
    WrongCredentialsError,
)
from models.generation.parts import Readiness
from models.hub.remote_parts import RemoteConnections, RemoteConversations, RemoteFeed, RemoteStatus, RemoteUsers
from models.hub.service import Opened
from models.settings import Settings
from models.store.conversations import Conversations
from models.store.item import Item
from models.users.connections import Connection, ConnectionRegistry
from tests.support.client import ANN
from tests.support.hubs import (
    MODEL,
    STARTED,
    BreakableHub,
    FakeConnection,
    FakeWorker,
    connected,
    listening,
    opened_worker,
    parts_of,
)
from tests.support.samples import read_samples

pytestmark = pytest.mark.anyio

ADDRESS = "192.0.2.1"
RESTARTS = (1012, "the server restarts")


@dataclass
class Setup:
    """A hub, its parts, and those of one worker."""

    hub: BreakableHub
    there: Any
    here: Any
    worker: Any

    async def answered(self) -> None:
        """Wait until the hub has acted on everything, and until what it has said about that is here."""
        await self.here.status.ready()


@pytest.fixture
def there(settings: Settings, conversations: Conversations) -> Any:
    """The parts of the hub."""
    return parts_of(settings, conversations)


@pytest.fixture
async def setup(settings: Settings, there: Any) -> AsyncIterator[Setup]:
    async with listening(settings, there) as hub, opened_worker(settings) as (worker, here):
        yield Setup(hub, there, here, worker)


async def test_a_worker_knows_the_model_and_the_start_of_the_hub(setup: Setup) -> None:
    assert (setup.here.models.all, setup.here.started) == (MODEL.all, STARTED)


# Connections


@pytest.fixture
def connections(setup: Setup) -> RemoteConnections:
    connections: RemoteConnections = setup.here.connections
    return connections


async def test_a_connection_joins_and_leaves_at_the_hub(setup: Setup, connections: RemoteConnections) -> None:
    connection = FakeConnection()
    await connections.join("ann", connection)
    assert setup.there.connections.count("ann") == 1
    connections.leave("ann", connection)
    await setup.answered()
    assert setup.there.connections.count("ann") == 0


async def test_a_connection_too_many_is_refused_and_not_kept(setup: Setup, connections: RemoteConnections) -> None:
    kept = [FakeConnection(), FakeConnection()]
    for connection in kept:
        await connections.join("ann", connection)
    with pytest.raises(TooManyConnectionsError):
        await connections.join("ann", FakeConnection())
    for connection in kept:
        connections.leave("ann", connection)
    await connections.close_all(*RESTARTS)


async def test_a_connection_that_gives_up_while_it_joins_is_not_kept(
    setup: Setup, connections: RemoteConnections
) -> None:
    joining = asyncio.create_task(connections.join("ann", FakeConnection()))
    await asyncio.sleep(0)  # it has asked
    joining.cancel()
    await asyncio.wait([joining])
    await setup.answered()
    assert setup.there.connections.count("ann") == 0
    await connections.close_all(*RESTARTS)


async def test_a_connection_is_told_what_the_hub_tells_it(setup: Setup, connections: RemoteConnections) -> None:
    ann, bob = FakeConnection("s1"), FakeConnection()
    await connections.join("ann", ann)
    await connections.join("bob", bob)
    conversation = await setup.here.conversations.create("ann", title="Weather")
    setup.there.connections.conversation_changed("ann", conversation.id, conversation)
    setup.there.connections.conversation_changed("ann", "conv_1", None)
    setup.there.connections.close_session("ann", "s1", 4401, "logged out")
    setup.there.connections.close_session("bob", "s1", 4401, "logged out")
    assert [await ann.told.get() for _ in range(4)] == [
        ("joined", "bob"),
        (conversation.id, conversation),
        ("conv_1", None),
        (4401, "logged out"),
    ]
    await setup.answered()
    assert bob.told.empty()


async def test_a_connection_that_has_left_is_told_nothing(setup: Setup, connections: RemoteConnections) -> None:
    connection = FakeConnection()
    await connections.join("ann", connection)
    setup.there.connections.close_user("ann", 4401, "revoked")  # on its way
    setup.there.connections.conversation_changed("ann", "conv_1", None)
    connections.leave("ann", connection)
    setup.worker.presence_changed(1, "left", "bob")
    await setup.answered()
    assert connection.told.empty()


class EventfulRegistry(ConnectionRegistry):
    """Connections that tell when one was added."""

    def __init__(self) -> None:
        super().__init__(announce=True, per_user=2)
        self.added = asyncio.Event()

    def add(self, user: str, connection: Connection, announce: bool = True) -> None:
        super().add(user, connection, announce)
        self.added.set()


async def test_a_worker_brings_its_connections_to_the_next_hub(setup: Setup, connections: RemoteConnections) -> None:
    connection = FakeConnection()
    setup.there.connections = registry = EventfulRegistry()
    await connections.join("ann", connection)
    registry.added.clear()
    setup.hub.lose()
    await registry.added.wait()
    registry.close_user("ann", 4401, "revoked")
    assert await connection.told.get() == (4401, "revoked")


async def test_a_worker_that_ends_does_not_connect_again(settings: Settings, setup: Setup) -> None:
    async with connected(settings):  # so that the hub goes on
        await setup.worker.drain(0)
        setup.hub.links[0].close()
        await setup.hub.wait_present(1)
        async with connected(settings):
            pass
    assert setup.hub.came == 3


class ConnectionsWorker(FakeWorker):
    """A worker that has only connections."""

    connections: RemoteConnections | None = None

    def hub_opened(self, opened: Opened) -> None:
        if self.connections:
            self.connections.rejoin()
        super().hub_opened(opened)


async def test_the_next_hub_gets_the_connections_that_are_left_and_announces_none(
    settings: Settings, there: Any
) -> None:
    staying, leaving, refused, other = [FakeConnection() for _ in range(4)]
    worker = ConnectionsWorker()
    async with listening(settings, there) as hub, connected(settings, worker) as (client, _):
        worker.connections = connections = RemoteConnections(client)
        await connections.join("ann", staying)
        await connections.join("ann", leaving)
        await connections.join("bob", other)
        worker.may_go_on.clear()
        hub.lose()
        await worker.next("hub lost")
        there.connections = ConnectionRegistry(announce=True, per_user=2)
        connections.leave("ann", leaving)
        with pytest.raises(ServerUnavailableError):
            await connections.join("ann", refused)
        worker.may_go_on.set()
        await worker.next("hub opened")
        await RemoteStatus(client).ready()
        assert (there.connections.count("ann"), there.connections.count("bob")) == (1, 1)
        assert "presence" not in [kind for kind, *_ in worker.rest()]
        there.connections.close_user("ann", 4401, "revoked")
        assert (await worker.next("close"))[1:] == (4401, "revoked")
        connections.leave("bob", other)
        assert (await worker.next("presence"))[1:] == ("left", "bob")


async def test_connections_that_join_while_the_worker_ends_are_closed(
    setup: Setup, connections: RemoteConnections
) -> None:
    early, late = FakeConnection(), FakeConnection()
    await connections.join("ann", early)
    await setup.worker.drain(0)
    await connections.join("ann", late)
    assert (early.told.empty(), await late.told.get()) == (True, RESTARTS)


async def test_all_connections_are_closed_and_waited_for(setup: Setup, connections: RemoteConnections) -> None:
    both = FakeConnection(), FakeConnection()
    for connection in both:
        await connections.join("ann", connection)
    closing = asyncio.create_task(connections.close_all(*RESTARTS))
    for connection in both:
        assert await connection.told.get() == RESTARTS
        assert not closing.done()
        connections.leave("ann", connection)
    await closing


# Users


@pytest.fixture
def users(setup: Setup) -> RemoteUsers:
    users: RemoteUsers = setup.here.users
    return users


async def test_a_user_logs_in_at_the_hub_and_has_a_session_here(setup: Setup, users: RemoteUsers) -> None:
    user = await users.log_in(ANN, None, ADDRESS)
    token = users.session_token(user)
    assert user.id == "ann"
    found = users.session(token)
    assert found
    assert found == setup.there.users.session(token)


@pytest.mark.parametrize("secret", ["wrong", "half \ud83d", ""])
async def test_a_wrong_secret_is_refused(users: RemoteUsers, secret: str) -> None:
    with pytest.raises(WrongCredentialsError):
        await users.log_in(secret, None, ADDRESS)


async def test_failed_logins_are_counted_for_all_workers(settings: Settings, setup: Setup, users: RemoteUsers) -> None:
    async with opened_worker(settings) as (_, other):
        for _ in range(10):
            with pytest.raises(WrongCredentialsError):
                await users.log_in("wrong", None, ADDRESS)
        with pytest.raises(TooManyLoginsError):
            await other.users.log_in("wrong", None, ADDRESS)


async def test_a_new_user_and_a_removed_one_are_known_here_as_soon_as_at_the_hub(
    setup: Setup, users: RemoteUsers
) -> None:
    secret = await setup.there.users.create("carol")
    token = users.session_token(await users.log_in(secret, None, ADDRESS))
    assert users.session(token)
    await setup.there.users.remove("carol")
    await setup.answered()
    assert users.session(token) is None


async def test_a_session_that_ends_here_has_ended_everywhere(
    settings: Settings, setup: Setup, users: RemoteUsers
) -> None:
    async with opened_worker(settings) as (_, other):
        token = users.session_token(await users.log_in(ANN, None, ADDRESS))
        found = users.session(token)
        assert found
        await users.end_session(found[1])
        await other.status.ready()
        assert [each.session(token) for each in (users, other.users, setup.there.users)] == [None] * 3


async def test_a_worker_that_comes_later_knows_which_sessions_have_ended(
    settings: Settings, setup: Setup, users: RemoteUsers
) -> None:
    token = users.session_token(await users.log_in(ANN, None, ADDRESS))
    found = users.session(token)
    assert found
    await users.end_session(found[1])
    async with opened_worker(settings) as (_, other):
        assert other.users.session(token) is None


# Conversations


@pytest.fixture
def here(setup: Setup) -> RemoteConversations:
    here: RemoteConversations = setup.here.conversations
    return here


def message(content: str) -> Item:
    return Item.of_message({"role": "user", "content": content}, 1.0)


async def test_what_the_hub_writes_can_be_read_here(here: RemoteConversations) -> None:
    created = await here.create("ann", [message("one")], {"a": "b"}, "Numbers")
    assert (created.title, created.metadata) == ("Numbers", {"a": "b"})
    (added,) = await here.append_items("ann", created.id, [message("two")])
    updated = await here.update("ann", created.id, "Digits", {})
    assert await here.find("ann", created.id) == updated
    assert [item.content for item in (await here.path("ann", created.id)).items] == ["one", "two"]
    await here.delete_item("ann", created.id, added.id)
    assert [item.content for item in (await here.path("ann", created.id)).items] == ["one", ""]
    with pytest.raises(ItemNotFoundError):
        await here.delete_item("ann", created.id, "msg_none")


async def test_an_error_of_the_hub_is_raised_here(here: RemoteConversations) -> None:
    with pytest.raises(ConversationNotFoundError):
        await here.update("ann", "conv_none", "Title")


async def test_a_change_is_passed_on(setup: Setup) -> None:
    feed: RemoteFeed = setup.here.feed
    feed.changed("ann", "conv_1")
    assert await setup.there.feed.noted.get() == ("ann", "conv_1")


# Operators


async def test_what_a_worker_counts_is_in_the_metrics(setup: Setup) -> None:
    setup.here.metrics.login_failures.inc()
    setup.here.metrics.slow_clients.inc()
    setup.here.metrics.slow_clients.inc()
    samples = read_samples((await setup.here.status.metrics()).decode())
    assert (samples["login_failures_total"], samples["slow_clients_closed_total"]) == (1, 2)


async def test_operators_hear_of_the_trouble_of_the_hub(setup: Setup) -> None:
    status: RemoteStatus = setup.here.status
    assert await status.ready() == Readiness()
    setup.there.chat.trouble, setup.there.responses.trouble = "the model is broken", "the disk is full"
    assert await status.ready() == Readiness("the model is broken", "the disk is full")
    arguments = await status.arguments()
    assert (arguments["model"], arguments["slots"]) == ("scripted", 4)


async def test_operators_do_not_wait_for_a_hub_that_does_not_answer(settings: Settings, there: Any) -> None:
    async with listening(settings, there), connected(settings) as (client, _):
        status = RemoteStatus(client, seconds=0)
        stuck = "the process that runs the replies does not answer"
        assert await status.ready() == Readiness(stuck)
        for ask in (status.metrics, status.arguments):
            with pytest.raises(ServerUnavailableError, match=stuck):
                await ask()


async def test_a_worker_without_a_hub_is_not_ready(settings: Settings, there: Any) -> None:
    async with listening(settings, there) as hub, connected(settings) as (client, worker):
        worker.may_go_on.clear()
        hub.lose()
        await worker.next("hub lost")
        status = RemoteStatus(client)
        assert await status.ready() == Readiness(ServerUnavailableError.message)
        with pytest.raises(ServerUnavailableError):
            await status.metrics()
        worker.may_go_on.set()
        await worker.next("hub opened")
