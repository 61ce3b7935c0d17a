"""Two hosts with one database: what they do at once to one conversation."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from itertools import cycle
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from models.errors import (
    APIError,
    ConversationLockedError,
    ConversationNotFoundError,
    ItemNotFoundError,
    ResponseNotFoundError,
)
from models.settings import Settings
from models.store.conversations import Conversations
from models.store.database import conversations_table, items_table, open_database, texts_table
from models.store.item import Item, Status
from models.store.place import Place
from models.store.storage_limits import StorageLimits
from tests.support.owners import owned_store, write_owner
from tests.support.trees import ANSWER, QUESTION, SYSTEM, begin, fork, go_on, growing, ids_of, message, reply

pytestmark = pytest.mark.anyio

MANY = 200
Hosts = tuple[Conversations, Conversations]


@pytest.fixture
async def hosts(empty_postgresql: str) -> AsyncIterator[Hosts]:
    """The stores of two hosts, each with connections of its own, and conv_1, whose leaf is resp_1."""
    settings = Settings(database_url=empty_postgresql)
    async with open_database(settings) as first, open_database(settings) as second:
        stores = await owned_store(first, "first"), await owned_store(second, "second")
        await begin(stores[0], "conv_1", SYSTEM, QUESTION, ANSWER)
        yield stores


async def at_once(*actions: Awaitable[Any]) -> Counter[type | None]:
    """How often actions that run at once end with each error; None: without one. Raises what is no APIError."""
    results = await asyncio.gather(*actions, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, APIError):
            raise result
    return Counter(type(result) if isinstance(result, APIError) else None for result in results)


async def count(database: AsyncEngine, table: Any = items_table) -> int:
    async with database.connect() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar() or 0


async def counted_bytes(database: AsyncEngine, id: str) -> tuple[int, int]:
    """The bytes of a conversation as they are counted, and as they are."""
    stored = select(conversations_table.c.bytes).where(conversations_table.c.id == id)
    actual = select(func.sum(items_table.c.bytes)).where(items_table.c.conversation_id == id)
    texts = select(func.coalesce(func.sum(texts_table.c.bytes), 0)).where(texts_table.c.conversation_id == id)
    async with database.connect() as connection:
        values = [(await connection.execute(query)).scalar_one() for query in (stored, actual, texts)]
    return int(values[0]), int(values[1] + values[2])


def turn(number: int, **options: Any) -> list[Item]:
    return [message(f"msg_t{number}", f"{number}"), growing(f"resp_t{number}", options=options)]


async def test_of_many_turns_of_two_hosts_at_one_leaf_exactly_one_begins(hosts: Hosts) -> None:
    place = Place("resp_1", "resp_1")
    ended = await at_once(
        *(
            store.begin_turn("ann", "conv_1", place, [message(f"msg_t{number}")], growing(f"resp_t{number}"))
            for number, store in zip(range(MANY), cycle(hosts), strict=False)
        )
    )
    assert ended == {None: 1, ConversationLockedError: MANY - 1}
    leaf = (await hosts[0].find("ann", "conv_1")).leaf or ""
    number = leaf.removeprefix("resp_t")
    path = (await hosts[1].path("ann", "conv_1")).items
    assert ids_of(path) == ["item_0", "msg_1", "resp_1", f"msg_t{number}", leaf]
    assert await count(hosts[0]._database) == 5, "the others leave nothing"


async def test_of_many_turns_of_two_hosts_exactly_one_begins_a_conversation(hosts: Hosts) -> None:
    ended = await at_once(
        *(begin(store, "conv_2", *turn(number)) for number, store in zip(range(MANY), cycle(hosts), strict=False))
    )
    assert ended == {None: 1, ConversationLockedError: MANY - 1}
    assert len((await hosts[0].path("ann", "conv_2")).items) == 2
    assert await count(hosts[0]._database) == 3 + 2


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not listed"])
async def test_many_branches_of_one_response_by_two_hosts_are_all_kept(hosts: Hosts, listed: bool) -> None:
    await begin(hosts[0], "conv_2", message("msg_2"), reply("resp_2", "Well."), listed=listed)
    ended = await at_once(
        *(
            fork(store, "conv_2", "resp_2", *turn(number, instructions="Be brief."))
            for number, store in zip(range(MANY), cycle(hosts), strict=False)
        )
    )
    assert ended == {None: MANY}
    for number, store in zip(range(MANY), cycle(reversed(hosts)), strict=False):
        found = await store.path_of_response("ann", f"resp_t{number}")
        assert ids_of(found.items) == ["msg_2", "resp_2", f"msg_t{number}", f"resp_t{number}"]
    assert await count(hosts[0]._database) == 3 + 2 + 2 * MANY
    counted, actual = await counted_bytes(hosts[0]._database, "conv_2")
    assert counted == actual
    if listed:
        assert (await hosts[0].find("ann", "conv_2")).leaf == "resp_2"


async def test_replies_of_two_hosts_grow_side_by_side_in_one_conversation(hosts: Hosts) -> None:
    numbers = range(20)
    for number, store in zip(numbers, cycle(hosts), strict=False):
        await fork(store, "conv_1", "resp_1", *turn(number))

    async def grow(number: int, store: Conversations) -> None:
        for length in range(1, 6):
            await store.update_replies([growing(f"resp_t{number}", *["x"] * length)])
        await store.update_replies([reply(f"resp_t{number}", f"{number}")])

    ended = await at_once(*(grow(number, store) for number, store in zip(numbers, cycle(hosts), strict=False)))
    assert ended == {None: 20}
    for number, store in zip(numbers, cycle(reversed(hosts)), strict=False):
        found = (await store.find_response("ann", f"resp_t{number}")).item
        assert (found.content, found.status) == (f"{number}", Status.COMPLETED)
    counted, actual = await counted_bytes(hosts[0]._database, "conv_1")
    assert counted == actual


async def test_a_host_cannot_write_the_reply_of_another_one(hosts: Hosts) -> None:
    await go_on(hosts[0], "conv_1", growing("resp_2", "mine"))
    await hosts[1].update_replies([reply("resp_2", "theirs")])
    await hosts[1].fail_replies(["resp_2"])
    found = (await hosts[1].find_response("ann", "resp_2")).item
    assert (found.content, found.status) == ("mine", Status.IN_PROGRESS)


async def test_a_host_knows_which_replies_run_on_others_and_where(empty_postgresql: str) -> None:
    settings = Settings(database_url=empty_postgresql)
    async with open_database(settings) as database, open_database(settings) as other:
        await write_owner(database, id="first", address="10.0.0.1:7778")
        first, second = Conversations(database, "first"), await owned_store(other, "second")
        await begin(first, "conv_1", *turn(1))
        await begin(second, "conv_2", *turn(2))
        await begin(first, "conv_3", message("msg_3"), reply("resp_3"))
        assert await second.replies_elsewhere("ann", id="resp_t1") == [("resp_t1", "10.0.0.1:7778")]
        assert await second.replies_elsewhere("ann", conversation="conv_1") == [("resp_t1", "10.0.0.1:7778")]
        assert await first.replies_elsewhere("ann", id="resp_t2") == [("resp_t2", None)]
        for nothing in ("resp_t1", "resp_3", "resp_none"):
            assert await first.replies_elsewhere("ann", id=nothing) == []
        assert await second.replies_elsewhere("bob", id="resp_t1") == []
        assert await second.replies_elsewhere("bob", conversation="conv_1") == []
        assert await second.replies_elsewhere("ann", id="resp_3") == []


# One host changes a conversation in which a reply of the other one runs


async def test_the_leaf_cannot_be_changed_while_a_reply_of_another_host_runs_there(hosts: Hosts) -> None:
    await fork(hosts[0], "conv_1", "msg_1", reply("resp_9"))
    await go_on(hosts[0], "conv_1", *turn(1))
    for change in (
        hosts[1].set_leaf("ann", "conv_1", "resp_9"),
        hosts[1].append_items("ann", "conv_1", [message("msg_9")]),
        hosts[1].delete_item("ann", "conv_1", "msg_t1_0"),
        go_on(hosts[1], "conv_1", *turn(2)),
    ):
        with pytest.raises((ConversationLockedError, ItemNotFoundError)):
            await change
    await hosts[0].update_replies([reply("resp_t1", "Done.")])
    assert (await hosts[1].set_leaf("ann", "conv_1", "resp_9")).leaf == "resp_9"


async def test_of_a_new_leaf_and_a_turn_of_another_host_one_comes_first(hosts: Hosts) -> None:
    first, second = hosts
    for number in range(50):
        id = f"conv_r{number}"
        await begin(first, id, message(f"msg_a{number}"), reply(f"resp_a{number}"))
        await fork(first, id, f"msg_a{number}", reply(f"resp_b{number}"))
        place = Place(f"resp_a{number}", f"resp_a{number}")
        turned, moved = await asyncio.gather(
            first.begin_turn("ann", id, place, [], growing(f"resp_c{number}")),
            second.set_leaf("ann", id, f"resp_b{number}"),
            return_exceptions=True,
        )
        refused = [result for result in (turned, moved) if isinstance(result, BaseException)]
        assert [type(error) for error in refused] == [ConversationLockedError]
        leaf = (await second.find("ann", id)).leaf
        assert leaf == (f"resp_b{number}" if refused == [turned] else f"resp_c{number}")


async def test_a_conversation_that_another_host_deletes_does_not_come_back(hosts: Hosts) -> None:
    first, second = hosts
    for number in range(30):
        id = f"conv_d{number}"
        await begin(first, id, *turn(number, instructions="Be brief."))
        updates = [first.update_replies([growing(f"resp_t{number}", *"abc"[:length])]) for length in range(1, 4)]
        ended = await at_once(
            *updates,
            fork(first, id, f"resp_t{number}", message(f"msg_x{number}"), growing(f"resp_x{number}")),
            second.delete("ann", id),
            first.update_replies([reply(f"resp_t{number}", "Done.")]),
        )
        assert ended[None] >= 5
        assert {*ended} <= {None, ConversationNotFoundError}
        await first.update_replies([reply(f"resp_t{number}", "Done."), reply(f"resp_x{number}", "Done.")])
        assert not (await first.path("ann", id)).exists
    assert await count(first._database) == 3
    assert await count(first._database, texts_table) == 0
    assert await count(first._database, conversations_table) == 1


async def test_a_response_that_another_host_deletes_does_not_come_back(hosts: Hosts) -> None:
    first, second = hosts
    for number in range(30):
        await fork(first, "conv_1", "resp_1", *turn(number))
        following = [message(f"msg_x{number}"), growing(f"resp_x{number}")]
        ended = await at_once(
            first.update_replies([growing(f"resp_t{number}", "a")]),
            second.delete_response("ann", f"resp_t{number}"),
            fork(first, "conv_1", f"resp_t{number}", *following),
            first.update_replies([reply(f"resp_t{number}", "Done.")]),
        )
        assert {*ended} <= {None, ItemNotFoundError}
        await first.update_replies([reply(f"resp_t{number}", "Done."), reply(f"resp_x{number}", "Done.")])
        with pytest.raises(ResponseNotFoundError):
            await first.find_response("ann", f"resp_t{number}")
        if ended == {None: 4}:  # the other turn came first, and stands below a deleted response
            path = (await first.path_of_response("ann", f"resp_x{number}")).items
            assert [item.content for item in path][2:] == ["Well.", f"{number}", "", "Hi", "Done."]
    counted, actual = await counted_bytes(first._database, "conv_1")
    assert counted == actual


async def test_a_tree_that_another_host_uses_is_not_deleted_to_make_room(empty_postgresql: str) -> None:
    settings = Settings(database_url=empty_postgresql)
    async with open_database(settings) as database, open_database(settings) as other:
        await owned_store(database, "first")
        first = Conversations(database, "first", StorageLimits(conversations=2))
        second = await owned_store(other, "second")
        for number in (1, 2):
            await begin(first, f"conv_{number}", message(f"msg_{number}"), reply(f"resp_{number}"), listed=False)
        async with second._transaction() as connection:
            await second._lock(connection, conversations_table.c.id == "conv_1")
            await begin(first, "conv_3", message("msg_3"), reply("resp_3"))
            await second._insert_items(connection, "conv_1", "resp_1", turn(4))
        found = await first.path_of_response("ann", "resp_t4")
        assert ids_of(found.items) == ["msg_1", "resp_1", "msg_t4", "resp_t4"]


async def test_two_hosts_that_do_everything_at_once_disturb_nobody(hosts: Hosts) -> None:
    actions = list[Awaitable[Any]]()
    for number, store in zip(range(40), cycle(hosts), strict=False):
        await fork(store, "conv_1", "resp_1", *turn(number))
        other = hosts[number % 2 == 0]
        actions += [
            store.update_replies([reply(f"resp_t{number}", "Done.")]),
            store.fail_unfinished(),
            other.set_leaf("ann", "conv_1", f"resp_t{number}"),
            other.update("ann", "conv_1", f"Title {number}"),
            other.delete_item("ann", "conv_1", f"msg_t{number}"),
            other.find_response("ann", f"resp_t{number}"),
        ]
        if number % 4 == 0:
            actions.append(other.delete_response("ann", f"resp_t{number}"))
    ended = await at_once(*actions)
    assert {*ended} <= {None, ItemNotFoundError, ConversationLockedError, ResponseNotFoundError}
    for number in range(40):
        if number % 4:
            found = (await hosts[0].find_response("ann", f"resp_t{number}")).item
            assert (found.content, found.status) == ("Done.", Status.COMPLETED)
    counted, actual = await counted_bytes(hosts[0]._database, "conv_1")
    assert counted == actual
