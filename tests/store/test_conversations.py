from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from models.errors import (
    ConversationBusyError,
    ConversationFullError,
    ConversationNotFoundError,
    DatabaseUnavailableError,
    ItemNotFoundError,
    StorageFullError,
)
from models.protocols.conversations import MAX_QUERY
from models.store.conversations import Conversation, Conversations, ItemPage, Listing
from models.store.database import conversations_table, instructions_table, items_table, owner_table
from models.store.item import Item, Status
from models.store.storage_limits import MAX_CONVERSATION_BYTES, MAX_ITEMS, MAX_PAGE, PAGE_BYTES, StorageLimits

pytestmark = pytest.mark.anyio

SYSTEM = Item("item_0", "system", "Be brief.", 1.25)
QUESTION = Item("item_1", "user", "How are you?", 1700000000.123456)
ANSWER = Item(
    "resp_1",
    "assistant",
    "Well.",
    1700000000.2,
    Status.COMPLETED,
    "stop",
    {"total_tokens": 9},
    {},
    0,
    "2 3",
    0.5,
)
GROWING = Item("resp_2", "assistant", "", 1700000000.3, Status.IN_PROGRESS, None, {"total_tokens": 0}, {}, 0, "", 0.0)

ALL = Listing(limit=100)


@pytest.fixture
def store(empty_tables: AsyncEngine) -> Conversations:
    return Conversations(empty_tables)


@pytest.fixture
async def anns_store(store: Conversations) -> Conversations:
    """The store with conv_1, which belongs to ann."""
    await store.put_items("ann", "conv_1", 0, [SYSTEM, QUESTION, ANSWER])
    return store


def message(id: str, content: str) -> Item:
    return Item(id, "user", content, 1.0)


async def listed_ids(
    store: Conversations, user: str = "ann", limit: int = 100, after: str | None = None, query: str = ""
) -> list[str]:
    found, _ = await store.list_page(user, Listing(limit, after, query))
    return [conversation.id for conversation in found]


async def whole(store: Conversations, user: str, id: str) -> tuple[Conversation, list[Item]]:
    """A conversation and its items."""
    return await store.find(user, id), await store.items(user, id)


async def set_updated(engine: AsyncEngine, times: dict[str, float]) -> None:
    """Change when conversations were last updated."""
    async with engine.begin() as connection:
        for id, time in times.items():
            change = update(conversations_table).where(conversations_table.c.id == id).values(updated=time)
            await connection.execute(change)


# Put items


async def test_a_conversation_begins_with_its_first_items(store: Conversations) -> None:
    await store.put_items("ann", "conv_1", 0, [QUESTION, GROWING])
    conversation, items = await whole(store, "ann", "conv_1")
    assert items == [QUESTION, GROWING]
    assert (conversation.id, conversation.title) == ("conv_1", "How are you?")
    assert conversation.created == conversation.updated
    assert await store.list_page("ann", ALL) == ([conversation], False)


async def test_items_keep_their_order(store: Conversations) -> None:
    items = [message(f"item_{(index * 7) % 20}", str(index)) for index in range(20)]
    for start in range(0, 20, 4):
        await store.put_items("ann", "conv_1", start, items[start : start + 4])
    assert await store.items("ann", "conv_1") == items


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(SYSTEM, id="message"),
        pytest.param(ANSWER, id="reply"),
        pytest.param(GROWING, id="growing-reply"),
        pytest.param(
            replace(
                ANSWER,
                status=Status.FAILED,
                reason="server_error",
                usage=None,
                options=None,
                left_out=None,
                cuts=None,
            ),
            id="nulls",
        ),
        pytest.param(
            replace(
                ANSWER, usage={"input_tokens": 2**40}, left_out=2**31 - 1, decode_seconds=1e-300, created=0.1 + 0.2
            ),
            id="numbers",
        ),
        pytest.param(
            replace(
                ANSWER, options={"instructions": "é\u2028\"'\\", "temperature": 0.1, "stop": ["a", ""], "seed": None}
            ),
            id="options",
        ),
        pytest.param(
            replace(ANSWER, content="👩\u200d👩\u200d👧 广州 \ufeff\u202e\r\n\t\U0010ffff\x01 e\u0301 é", cuts="30 4"),
            id="unicode",
        ),
        pytest.param(replace(ANSWER, content="x" * 2**20, cuts=None), id="megabyte"),
    ],
)
async def test_an_item_is_read_as_it_was_written(store: Conversations, item: Item) -> None:
    await store.put_items("ann", "conv_1", 0, [item])
    assert await store.items("ann", "conv_1") == [item]


@pytest.mark.parametrize("status", Status)
async def test_a_status_is_read_as_it_was_written(store: Conversations, status: Status) -> None:
    await store.put_items("ann", "conv_1", 0, [replace(ANSWER, status=status)])
    (item,) = await store.items("ann", "conv_1")
    assert item.status is status


async def test_a_reply_of_thousands_of_deltas_keeps_each_of_them(store: Conversations) -> None:
    deltas = [("广 a", "👩\u200d👧", "\n", "word ")[index % 4] for index in range(5000)]
    reply = replace(GROWING, content="".join(deltas), cuts=" ".join(str(len(delta)) for delta in deltas))
    await store.put_items("ann", "conv_1", 0, [GROWING])
    await store.update_replies([reply])
    found = await store.find_reply("ann", "resp_2")
    assert found
    assert found[1].deltas == deltas
    assert found[1].sequence_number == 5000


async def test_a_nul_is_replaced_by_a_character_of_the_same_length(store: Conversations) -> None:
    await store.put_items("ann", "conv_1", 0, [replace(ANSWER, content="a\0b\0c", cuts="2 3")])
    assert (await store.items("ann", "conv_1"))[0].deltas == ["a\ufffd", "b\ufffdc"]


@pytest.mark.parametrize("position", range(5))
async def test_items_put_at_a_position_replace_all_items_from_there(store: Conversations, position: int) -> None:
    before = [message(f"item_{index}", str(index)) for index in range(4)]
    await store.put_items("ann", "conv_1", 0, before)
    await store.put_items("ann", "conv_2", 0, other := [message(f"item_{index}", "other") for index in range(10, 14)])
    new = [message("item_8", "new"), message("item_9", "newer")]
    await store.put_items("ann", "conv_1", position, new)
    assert await store.items("ann", "conv_1") == [*before[:position], *new]
    assert await store.items("ann", "conv_2") == other


async def test_later_items_change_only_the_time_of_the_last_update(
    anns_store: Conversations, empty_tables: AsyncEngine
) -> None:
    before = await anns_store.find("ann", "conv_1")
    await set_updated(empty_tables, {"conv_1": 5.0})
    await anns_store.put_items("ann", "conv_1", 0, [message("item_9", "Something else")])
    after = await anns_store.find("ann", "conv_1")
    assert replace(after, updated=before.updated) == before
    assert after.updated > 5.0


async def test_ten_conversations_can_begin_at_once(store: Conversations) -> None:
    ids = [f"conv_{number}" for number in range(10)]
    await asyncio.gather(*(store.put_items("ann", id, 0, [message(f"item_{id}", id)]) for id in ids))
    assert sorted(await listed_ids(store)) == ids
    assert [await store.items("ann", id) for id in ids] == [[message(f"item_{id}", id)] for id in ids]


def test_each_new_id_is_different() -> None:
    ids = {Conversations.new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(id.startswith("conv_") and len(id) == 37 for id in ids)


# Conversations that do not exist, or belong to somebody else

NOT_ANNS = [
    pytest.param("bob", "conv_1", id="another-user"),
    pytest.param("ANN", "conv_1", id="user-in-capitals"),
    pytest.param("", "conv_1", id="empty-user"),
    pytest.param("ann\0", "conv_1", id="user-with-nul"),
    pytest.param("ann", "conv_9", id="unknown-id"),
    pytest.param("ann", "CONV_1", id="id-in-capitals"),
    pytest.param("ann", "conv%1", id="pattern"),
    pytest.param("ann", "resp_1", id="id-of-a-reply"),
    pytest.param("ann", "", id="empty-id"),
    pytest.param("ann", "\0", id="nul"),
    pytest.param("ann", "conv_1\0", id="id-with-nul"),
    pytest.param("ann", "' OR 1=1 --", id="sql"),
    pytest.param("ann", "x" * 100_000, id="long-id"),
]
LOOKUPS: list[Callable[[Conversations, str, str], Awaitable[Any]]] = [
    Conversations.find,
    Conversations.delete,
    lambda store, user, id: store.rename(user, id, "Stolen"),
    lambda store, user, id: store.list_page(user, Listing(100, id, "")),
]


@pytest.mark.parametrize(("user", "id"), NOT_ANNS)
async def test_a_conversation_of_somebody_else_is_not_found_and_not_changed(
    anns_store: Conversations, user: str, id: str
) -> None:
    before = await whole(anns_store, "ann", "conv_1")
    for look_up in LOOKUPS:
        with pytest.raises(ConversationNotFoundError, match="there is no such conversation") as raised:
            await look_up(anns_store, user, id)
        assert (raised.value.type, raised.value.code) == ("invalid_request_error", "conversation_not_found")
    assert await anns_store.items(user, id) == []
    assert await whole(anns_store, "ann", "conv_1") == before
    assert await listed_ids(anns_store) == ["conv_1"]


@pytest.mark.parametrize(
    ("user", "id"),
    [
        pytest.param("bob", "resp_1", id="another-user"),
        pytest.param("ann", "resp_9", id="unknown-id"),
        pytest.param("ann", "item_1", id="id-of-a-message"),
        pytest.param("ann", "conv_1", id="id-of-a-conversation"),
        pytest.param("ann", "\0", id="nul"),
        pytest.param("ann", "resp_1\0", id="id-with-nul"),
    ],
)
async def test_a_reply_of_somebody_else_is_not_found(anns_store: Conversations, user: str, id: str) -> None:
    assert await anns_store.find_reply(user, id) is None
    assert await anns_store.find_reply("ann", "resp_1") == ("conv_1", ANSWER)


async def test_nothing_can_be_put_into_a_conversation_of_somebody_else(anns_store: Conversations) -> None:
    before = await whole(anns_store, "ann", "conv_1")
    with pytest.raises(ConversationNotFoundError):
        await anns_store.put_items("bob", "conv_1", 1, [message("item_9", "I was here")])
    with pytest.raises(ConversationBusyError):
        await anns_store.put_items("bob", "conv_1", 0, [message("item_9", "I was here")])
    assert await whole(anns_store, "ann", "conv_1") == before
    assert await listed_ids(anns_store, "bob") == []


async def test_each_user_sees_only_their_own_conversations(anns_store: Conversations) -> None:
    await anns_store.put_items("bob", "conv_2", 0, [message("item_2", "How are you?")])
    assert [await listed_ids(anns_store, user) for user in ("ann", "bob", "eve")] == [["conv_1"], ["conv_2"], []]
    assert await listed_ids(anns_store, "bob", query="Well") == []
    assert await listed_ids(anns_store, "bob", query="how") == ["conv_2"]


# Changes


async def test_to_rename_a_conversation_changes_only_its_title(
    anns_store: Conversations, empty_tables: AsyncEngine
) -> None:
    await anns_store.put_items("ann", "conv_2", 0, [message("item_2", "Another")])
    await set_updated(empty_tables, {"conv_1": 5.0})
    before = await whole(anns_store, "ann", "conv_2")
    renamed = await anns_store.rename("ann", "conv_1", "广州 👩\u200d👧\0")
    conversation, items = await whole(anns_store, "ann", "conv_1")
    assert renamed == conversation == Conversation("conv_1", "广州 👩\u200d👧\ufffd", conversation.created, 5.0)
    assert items == [SYSTEM, QUESTION, ANSWER]
    assert await whole(anns_store, "ann", "conv_2") == before


async def test_to_delete_a_conversation_deletes_its_items_and_no_others(
    anns_store: Conversations, empty_tables: AsyncEngine
) -> None:
    await anns_store.put_items("ann", "conv_2", 0, [message("item_2", "Stays"), GROWING])
    await anns_store.put_items("bob", "conv_3", 0, [message("item_3", "Stays too")])
    kept = [await whole(anns_store, "ann", "conv_2"), await whole(anns_store, "bob", "conv_3")]
    await anns_store.delete("ann", "conv_1")
    assert await listed_ids(anns_store) == ["conv_2"]
    assert await anns_store.items("ann", "conv_1") == []
    assert await anns_store.find_reply("ann", "resp_1") is None
    with pytest.raises(ConversationNotFoundError):
        await anns_store.delete("ann", "conv_1")
    assert [await whole(anns_store, "ann", "conv_2"), await whole(anns_store, "bob", "conv_3")] == kept
    async with empty_tables.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(items_table))).scalar() == 3


async def test_an_updated_reply_replaces_its_earlier_state(anns_store: Conversations) -> None:
    await anns_store.put_items("ann", "conv_1", 3, [message("item_2", "And you?"), GROWING])
    await anns_store.put_items("bob", "conv_2", 0, [other := replace(GROWING, id="resp_3")])
    half = replace(GROWING, content="I am", cuts="2 2", decode_seconds=0.1)
    await anns_store.update_replies([half])
    assert await anns_store.items("ann", "conv_1") == [SYSTEM, QUESTION, ANSWER, message("item_2", "And you?"), half]
    assert await anns_store.items("bob", "conv_2") == [other]
    completed = replace(
        half, content="I am.", cuts="2 2 1", status=Status.COMPLETED, reason="stop", usage={"total_tokens": 12}
    )
    cancelled = replace(other, status=Status.CANCELLED, reason="client_cancelled")
    await anns_store.update_replies(iter([completed, cancelled]))
    assert await anns_store.find_reply("ann", "resp_2") == ("conv_1", completed)
    assert await anns_store.find_reply("bob", "resp_3") == ("conv_2", cancelled)


async def test_an_update_of_no_replies_changes_nothing(anns_store: Conversations) -> None:
    await anns_store.update_replies([])
    assert await anns_store.items("ann", "conv_1") == [SYSTEM, QUESTION, ANSWER]


async def test_a_late_update_does_not_restore_a_deleted_reply(anns_store: Conversations) -> None:
    await anns_store.put_items("ann", "conv_1", 3, [GROWING])
    await anns_store.put_items("ann", "conv_2", 0, [deleted := replace(GROWING, id="resp_3")])
    await anns_store.put_items("ann", "conv_1", 3, [message("item_9", "Instead")], accepted=True)
    await anns_store.delete("ann", "conv_2")
    completed = replace(ANSWER, content="Done.")
    late = [replace(GROWING, content="Back"), replace(deleted, content="Back"), completed]
    await anns_store.update_replies(late)
    assert await anns_store.items("ann", "conv_1") == [SYSTEM, QUESTION, completed, message("item_9", "Instead")]
    assert await anns_store.find_reply("ann", "resp_2") is None
    assert await anns_store.find_reply("ann", "resp_3") is None
    assert await listed_ids(anns_store) == ["conv_1"]


async def test_unfinished_replies_are_marked_as_failed_and_keep_their_text(anns_store: Conversations) -> None:
    half = replace(GROWING, content="I am", cuts="2 2")
    other = replace(GROWING, id="resp_3")
    await anns_store.put_items("ann", "conv_1", 3, [half])
    await anns_store.put_items("bob", "conv_2", 0, [other])
    assert await anns_store.fail_unfinished() == 0, "they are its own"
    next_store = Conversations(anns_store._database, "next")
    assert await next_store.fail_unfinished() == 2
    failed = replace(half, status=Status.FAILED, reason="server_error")
    assert await anns_store.items("ann", "conv_1") == [SYSTEM, QUESTION, ANSWER, failed]
    assert await anns_store.items("bob", "conv_2") == [replace(other, status=Status.FAILED, reason="server_error")]
    assert await next_store.fail_unfinished() == 0
    await anns_store.update_replies([replace(half, content="I am too late"), replace(other, status=Status.COMPLETED)])
    assert await anns_store.items("ann", "conv_1") == [SYSTEM, QUESTION, ANSWER, failed]


async def test_a_conversation_has_one_reply_in_progress(anns_store: Conversations) -> None:
    other_process = Conversations(anns_store._database, "other")
    await anns_store.put_items("ann", "conv_1", 3, [message("item_2", "And you?"), GROWING])
    for position in (3, 5):
        with pytest.raises(ConversationBusyError):
            await other_process.put_items("ann", "conv_1", position, [message("item_3", "Me first"), second_reply()])
    assert await anns_store.items("ann", "conv_1") == [SYSTEM, QUESTION, ANSWER, message("item_2", "And you?"), GROWING]
    await anns_store.update_replies([replace(GROWING, status=Status.COMPLETED)])
    await other_process.put_items("ann", "conv_1", 5, [message("item_3", "Now me"), second_reply()])
    assert len(await anns_store.items("ann", "conv_1")) == 7


async def test_a_process_that_has_lost_the_database_changes_nothing(anns_store: Conversations) -> None:
    own = Conversations(anns_store._database, "own")
    await own.put_items("ann", "conv_1", 3, [GROWING])
    async with anns_store._database.begin() as connection:
        await connection.execute(owner_table.insert().values(place=1, id="new", machine="m", pid=1, beats=0))
    before = await whole(anns_store, "ann", "conv_1")
    for write in (
        own.put_items("ann", "conv_1", 0, [message("item_9", "Mine")], accepted=True),
        own.put_items("ann", "conv_9", 0, [message("item_9", "Mine")]),
        own.update_replies([replace(GROWING, content="Mine")]),
        own.fail_replies([GROWING.id]),
        own.rename("ann", "conv_1", "Mine"),
        own.delete("ann", "conv_1"),
    ):
        with pytest.raises(DatabaseUnavailableError, match="another process has taken the database"):
            await write
    assert await whole(anns_store, "ann", "conv_1") == before
    assert await listed_ids(anns_store) == ["conv_1"]
    await Conversations(anns_store._database, "new").rename("ann", "conv_1", "Ours")


async def test_two_processes_cannot_begin_one_conversation(empty_tables: AsyncEngine) -> None:
    stores = [Conversations(empty_tables, owner) for owner in ("one", "two")]
    begun = await asyncio.gather(
        *(
            store.put_items("ann", "conv_1", 0, [message(f"item_{number}", "Hi"), replace(GROWING, id=f"r{number}")])
            for number, store in enumerate(stores)
        ),
        return_exceptions=True,
    )
    assert [type(result) for result in begun if result] == [ConversationBusyError]
    assert len(await stores[0].items("ann", "conv_1")) == 2


def second_reply() -> Item:
    return replace(GROWING, id="resp_other")


# Limits


async def test_long_instructions_are_stored_once_for_a_conversation(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables)
    options = {"instructions": "Be brief. " * 100, "seed": 1}
    for number in range(5):
        reply = replace(ANSWER, id=f"resp_{number}", options=options)
        await store.put_items("ann", "conv_1", 2 * number, [message(f"item_{number}", "Hi"), reply])
    assert [item.options for item in await store.items("ann", "conv_1")][1::2] == [options] * 5
    async with empty_tables.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(instructions_table))).scalar() == 1
        size = (await connection.execute(select(conversations_table.c.bytes))).scalar()
    await store.delete("ann", "conv_1")
    async with empty_tables.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(instructions_table))).scalar() == 0
    assert size == 1000 + 5 * (2 + ANSWER.bytes)


async def test_instructions_that_no_reply_has_any_more_are_deleted(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables)
    for number in range(3):
        reply = replace(ANSWER, id=f"resp_{number}", options={"instructions": f"{number}" * 1000})
        await store.put_items("ann", "conv_1", 0, [message(f"item_{number}", "Hi"), reply])
    async with empty_tables.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(instructions_table))).scalar() == 1
        assert (await connection.execute(select(conversations_table.c.bytes))).scalar() == 1000 + 2 + ANSWER.bytes


async def test_replies_that_were_lost_are_marked_as_failed_and_keep_their_text(anns_store: Conversations) -> None:
    half = replace(GROWING, content="I am", cuts="2 2")
    await anns_store.put_items("ann", "conv_1", 3, [half])
    await Conversations(anns_store._database, "other").fail_replies([half.id])
    assert (await anns_store.items("ann", "conv_1"))[3] == half
    await anns_store.fail_replies([half.id, ANSWER.id, "unknown"])
    failed = replace(half, status=Status.FAILED, reason="server_error")
    assert await anns_store.items("ann", "conv_1") == [SYSTEM, QUESTION, ANSWER, failed]


async def test_a_user_has_at_most_some_conversations(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables, limits=StorageLimits(conversations=2))
    for id in ("conv_1", "conv_2"):
        await store.put_items("ann", id, 0, [message(id, "Hi")])
    with pytest.raises(StorageFullError, match="delete some conversations") as raised:
        await store.put_items("ann", "conv_3", 0, [message("conv_3", "Hi")])
    assert (raised.value.status, raised.value.code) == (409, "storage_full")
    await store.put_items("ann", "conv_2", 1, [message("more", "Hi")])
    await store.put_items("bob", "conv_4", 0, [message("conv_4", "Hi")])
    await store.delete("ann", "conv_1")
    await store.put_items("ann", "conv_3", 0, [message("conv_3", "Hi")])
    assert await listed_ids(store) == ["conv_3", "conv_2"]


async def test_a_user_has_at_most_some_bytes(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables, limits=StorageLimits(bytes=1000))
    await store.put_items("ann", "conv_1", 0, [message("item_1", "é" * 300)])
    for id, position in (("conv_1", 1), ("conv_2", 0)):
        with pytest.raises(StorageFullError):
            await store.put_items("ann", id, position, [message("item_2", "é" * 300)])
    assert await listed_ids(store) == ["conv_1"]
    await store.put_items("ann", "conv_1", 0, [message("item_2", "é" * 400)])
    await store.put_items("ann", "conv_2", 0, [message("item_3", "é" * 300)], accepted=True)
    assert await listed_ids(store) == ["conv_2", "conv_1"]


async def test_a_conversation_has_at_most_some_items_and_bytes(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables)
    await store.put_items("ann", "conv_1", 0, [message(str(number), "Hi") for number in range(MAX_ITEMS)])
    with pytest.raises(ConversationFullError, match="begin a new one") as raised:
        await store.put_items("ann", "conv_1", MAX_ITEMS, [message("more", "Hi")])
    assert (raised.value.status, raised.value.code) == (409, "conversation_full")
    assert len(await store.items("ann", "conv_1")) == MAX_ITEMS
    with pytest.raises(ConversationFullError):
        await store.put_items("ann", "conv_2", 0, [message("large", "x" * (MAX_CONVERSATION_BYTES + 1))])
    assert await listed_ids(store) == ["conv_1"]


# Pages of items


async def test_items_are_read_in_pages_from_the_last_one(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables)
    items = [message(str(number), f"message {number}") for number in range(7)]
    await store.put_items("ann", "conv_1", 0, items)
    assert await store.read_page("ann", "conv_1", 7) == ItemPage(items, 0)
    assert await store.read_page("ann", "conv_1", 3) == ItemPage(items[4:], 4)
    assert await store.read_page("ann", "conv_1", 3, "4") == ItemPage(items[1:4], 1)
    assert await store.read_page("ann", "conv_1", 3, "1") == ItemPage(items[:1], 0)
    assert await store.read_page("ann", "conv_1", 3, "0") == ItemPage([], 0)
    for user, before in (("ann", "unknown"), ("bob", "4")):
        with pytest.raises(ItemNotFoundError) as raised:
            await store.read_page(user, "conv_1", 3, before)
        assert raised.value.param == "before"


async def test_a_page_has_at_most_some_bytes_but_at_least_a_question_and_its_reply(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables)
    items = [message(str(number), "x" * (PAGE_BYTES // 3 + 1)) for number in range(4)]
    await store.put_items("ann", "conv_1", 0, [message("large", "x" * (PAGE_BYTES + 1)), *items])
    assert await store.read_page("ann", "conv_1", 100) == ItemPage(items[2:], 3)
    page = await store.read_page("ann", "conv_1", 100, "0")
    assert ([item.id for item in page.items], page.earlier) == (["large"], 0)


async def test_a_page_counts_the_bytes_of_instructions(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables)
    options = {"instructions": "x" * (PAGE_BYTES // 2)}
    await store.put_items("ann", "conv_1", 0, [replace(ANSWER, id=str(number), options=options) for number in range(4)])
    page = await store.read_page("ann", "conv_1", 100)
    assert ([item.id for item in page.items], page.earlier) == (["2", "3"], 2)


async def test_all_items_are_read_some_at_a_time(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables)
    short = [message(str(number), "Hi") for number in range(2 * MAX_PAGE)]
    items = [*short, *(message(f"long {number}", "x" * (PAGE_BYTES // 3)) for number in range(4))]
    await store.put_items("ann", "conv_1", 0, items)
    pages = [page async for page in store.pages("ann", "conv_1")]
    assert [len(page) for page in pages] == [MAX_PAGE, MAX_PAGE, 3, 1]
    assert [item for page in pages for item in page] == items
    assert [page async for page in store.pages("bob", "conv_1")] == []


# Lists


@pytest.fixture
async def nine_ids(empty_tables: AsyncEngine) -> list[str]:
    """The ids of nine conversations of ann's, in the order of a list. Nine of bob's have the same times."""
    times = {f"conv_{letter}": float(index // 3) for index, letter in enumerate("gcaeibdfh")}
    summaries, rows = list[dict[str, Any]](), list[dict[str, Any]]()
    for user, suffix in (("ann", ""), ("bob", "_bob")):
        for id, time in times.items():
            key, title = id + suffix, f"Title of {id}"
            summaries.append({"id": key, "user_id": user, "title": title, "created": 0.0, "updated": time})
            for position, content in enumerate([title, "title, once more"]):
                item = message(f"item_{position}_{key}", content)
                rows.append(asdict(item) | {"conversation_id": key, "position": position})
    async with empty_tables.begin() as connection:
        await connection.execute(insert(conversations_table), summaries)
        await connection.execute(insert(items_table), rows)
    return sorted(times, key=lambda id: (times[id], id), reverse=True)


async def test_the_latest_conversation_comes_first_then_the_highest_id(
    store: Conversations, nine_ids: list[str]
) -> None:
    assert nine_ids == [f"conv_{letter}" for letter in "hfdiebgca"]
    assert await listed_ids(store) == nine_ids


@pytest.mark.parametrize("query", [pytest.param("", id="no-query"), "title"])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 8, 9, 10, 100])
async def test_pages_contain_each_conversation_once(
    store: Conversations, nine_ids: list[str], limit: int, query: str
) -> None:
    after, seen = None, list[str]()
    for start in range(0, len(nine_ids), limit):
        page, has_more = await store.list_page("ann", Listing(limit, after, query))
        seen += [conversation.id for conversation in page]
        assert seen == nine_ids[: start + limit]
        assert has_more == (len(seen) < len(nine_ids))
        after = seen[-1]
    assert await store.list_page("ann", Listing(limit, after, query)) == ([], False)


async def test_a_conversation_with_new_items_comes_first(store: Conversations, nine_ids: list[str]) -> None:
    last = nine_ids[-1]
    await store.put_items("ann", last, 2, [message("item_9", "Again")])
    assert await listed_ids(store) == [last, *nine_ids[:-1]]


async def test_a_page_can_begin_after_a_conversation_that_the_query_does_not_find(
    store: Conversations, nine_ids: list[str]
) -> None:
    await store.rename("ann", nine_ids[5], "Unlike the others")
    await store.put_items("ann", nine_ids[5], 0, [message("item_9", "Nothing like that")])
    rest = [*nine_ids[:5], *nine_ids[6:]]
    assert await listed_ids(store, query="title") == rest
    assert await listed_ids(store, query="title", after=nine_ids[5]) == rest  # it is the latest one now


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("Weather", True),
        ("wEATHER in Gu", True),
        ("guangzhou", True),
        ("sunny", True),
        ("SUNNY, 30", True),
        ("广州", True),
        ("👩\u200d👧", True),
        ("be brief", True),
        ("rainy", False),
        ("weather  in", False),
        ("sunny weather", False),
        ("assistant", False),
        ("completed", False),
        ("conv_1", False),
    ],
)
async def test_a_query_searches_titles_and_messages_in_any_case(store: Conversations, query: str, found: bool) -> None:
    answer = replace(ANSWER, content="Sunny, 30 degrees in 广州 👩\u200d👧")
    await store.put_items("ann", "conv_1", 0, [SYSTEM, message("item_1", "Hello"), answer])
    await store.rename("ann", "conv_1", "Weather in Guangzhou")
    await store.put_items("ann", "conv_2", 0, [message("item_2", "Something else")])
    assert await listed_ids(store, query=query) == ["conv_1"] * found


@pytest.mark.parametrize("sign", ["%", "_", "\\", "/", "'", '"', "[a]", "*", "?", "^", "\\%", "/_", "\\\\", "%%", "--"])
async def test_a_sign_in_a_query_has_no_special_meaning(store: Conversations, sign: str) -> None:
    await store.put_items("ann", "conv_1", 0, [message("item_1", f"before{sign}after")])
    await store.put_items("ann", "conv_2", 0, [message("item_2", "Hello"), message("item_3", f"said {sign}")])
    await store.rename("ann", "conv_2", "A title")
    others = [message("item_4", "before or after, a, b"), message("item_5", "beforexafter")]
    await store.put_items("ann", "conv_3", 0, others)
    assert sorted(await listed_ids(store, query=sign)) == ["conv_1", "conv_2"]
    assert await listed_ids(store, query=f"before{sign}after") == ["conv_1"]


async def test_a_query_with_a_nul_finds_only_text_that_had_one(anns_store: Conversations) -> None:
    await anns_store.put_items("ann", "conv_2", 0, [message("item_2", "with\0nul")])
    assert await listed_ids(anns_store, query="h\0n") == ["conv_2"]
    assert await listed_ids(anns_store, query="\0\0") == []


async def test_a_query_does_not_find_deleted_messages(anns_store: Conversations) -> None:
    await anns_store.rename("ann", "conv_1", "A title")
    assert await listed_ids(anns_store, query="how are you") == ["conv_1"]
    await anns_store.put_items("ann", "conv_1", 1, [message("item_9", "Instead")])
    assert await listed_ids(anns_store, query="how are you") == []


@pytest.mark.parametrize("sign", ["x", "%", pytest.param("\U0010ffff", id="last-character")])
async def test_a_query_of_the_greatest_length_is_searched(store: Conversations, sign: str) -> None:
    await store.put_items("ann", "conv_1", 0, [message("item_1", f"It is {sign * MAX_QUERY}.")])
    await store.put_items("ann", "conv_2", 0, [message("item_2", f"It is {sign * (MAX_QUERY - 1)}.")])
    assert await listed_ids(store, query=sign * MAX_QUERY) == ["conv_1"]
