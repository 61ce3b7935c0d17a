from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from models.errors import (
    ConversationFullError,
    ConversationLockedError,
    ConversationNotFoundError,
    DatabaseUnavailableError,
    ItemNotFoundError,
    StorageFullError,
)
from models.messages import ToolCall
from models.output_item import OutputItem
from models.protocols.conversations import MAX_QUERY
from models.store.branches import Fork
from models.store.conversations import Conversation, Conversations, ItemPage, Listing, Placed
from models.store.database import conversations_table, items_table, texts_table
from models.store.item import Edge, Item, Status, linked
from models.store.storage_limits import MAX_CONVERSATION_BYTES, MAX_ITEMS, MAX_PAGE, PAGE_BYTES, StorageLimits
from models.store.versions import Version
from tests.support.owners import owned_store, remove_owner
from tests.support.trees import (
    ANSWER,
    QUESTION,
    SYSTEM,
    begin,
    contents,
    contents_of,
    fork,
    go_on,
    growing,
    ids_of,
    message,
    reply,
    set_updated,
)

pytestmark = pytest.mark.anyio

CALL: ToolCall = {"id": "call_1", "name": "look", "arguments": "{}"}

ALL = Listing(limit=100)


async def listed_ids(
    store: Conversations, user: str = "ann", limit: int = 100, after: str | None = None, query: str = ""
) -> list[str]:
    found, _ = await store.list_page(user, Listing(limit, after, query))
    return [conversation.id for conversation in found]


async def whole(store: Conversations, user: str, id: str) -> tuple[Conversation, Any]:
    """A conversation and the items of its current branch."""
    return await store.find(user, id), (await store.path(user, id)).items


# Conversations


async def test_a_conversation_can_be_created_empty(store: Conversations) -> None:
    created = await store.create("ann", metadata={"topic": "demo"})
    assert (created.title, created.leaf, created.metadata) == ("", None, {"topic": "demo"})
    assert created.id.startswith("conv_")
    assert await store.list_page("ann", ALL) == ([created], False)
    assert await store.path("ann", created.id) == ([], None, True)


async def test_a_conversation_can_be_created_with_items(store: Conversations) -> None:
    created = await store.create("ann", [SYSTEM, QUESTION])
    assert (created.title, created.leaf, created.metadata) == ("How are you?", "msg_1", {})
    path = await store.path("ann", created.id)
    assert path == (linked([SYSTEM, QUESTION], None), "msg_1", True)
    titled = await store.create("ann", [message("msg_2", "Hello")], title="A greeting")
    assert titled.title == "A greeting"


async def test_the_title_and_the_metadata_can_be_changed(anns_store: Conversations, empty_tables: AsyncEngine) -> None:
    await begin(anns_store, "conv_2", message("msg_2", "Another"), reply("resp_2"))
    await set_updated(empty_tables, {"conv_1": 5.0})
    before = await whole(anns_store, "ann", "conv_2")
    renamed = await anns_store.update("ann", "conv_1", title="广州 👩\u200d👧\0")
    conversation, items = await whole(anns_store, "ann", "conv_1")
    assert renamed == conversation
    assert (renamed.title, renamed.updated, renamed.metadata) == ("广州 👩\u200d👧\ufffd", 5.0, {})
    assert contents_of(items) == ["Be brief.", "How are you?", "Well."]
    changed = await anns_store.update("ann", "conv_1", metadata={"a": "1\0", "é": "州"})
    assert changed == replace(renamed, metadata={"a": "1\0", "é": "州"})
    assert await anns_store.update("ann", "conv_1", metadata={}) == renamed
    assert await anns_store.update("ann", "conv_1") == renamed
    assert await whole(anns_store, "ann", "conv_2") == before


async def test_to_delete_a_conversation_deletes_its_items_and_no_others(
    anns_store: Conversations, empty_tables: AsyncEngine
) -> None:
    await fork(anns_store, "conv_1", "msg_1", reply("resp_9", "Fine.", options={"instructions": "x"}))
    await begin(anns_store, "conv_2", message("msg_2", "Stays"), growing("resp_2"))
    await begin(anns_store, "conv_3", message("msg_3", "Stays too"), reply("resp_3"), user="bob")
    kept = [await whole(anns_store, "ann", "conv_2"), await whole(anns_store, "bob", "conv_3")]
    await anns_store.delete("ann", "conv_1")
    assert await listed_ids(anns_store) == ["conv_2"]
    assert await anns_store.path("ann", "conv_1") == ([], None, False)
    with pytest.raises(ConversationNotFoundError):
        await anns_store.delete("ann", "conv_1")
    assert [await whole(anns_store, "ann", "conv_2"), await whole(anns_store, "bob", "conv_3")] == kept
    async with empty_tables.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(items_table))).scalar() == 4
        assert (await connection.execute(select(func.count()).select_from(texts_table))).scalar() == 0


def test_each_new_id_is_different() -> None:
    ids = {Conversations.new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(id.startswith("conv_") and len(id) == 37 for id in ids)


async def test_a_process_that_is_no_owner_any_more_changes_nothing(anns_store: Conversations) -> None:
    own, new = [await owned_store(anns_store._database, name) for name in ("own", "new")]
    await fork(own, "conv_1", "resp_1", growing("resp_2"))
    await remove_owner(anns_store._database, "own")
    before = await whole(anns_store, "ann", "conv_1")
    for write in (
        begin(own, "conv_9", message("msg_9", "Mine"), reply("resp_9")),
        fork(own, "conv_1", "resp_1", message("msg_9", "Mine"), reply("resp_9")),
        own.update_replies([growing("resp_2", "Mine")]),
        own.fail_replies(["resp_2"]),
        own.create("ann", [message("msg_9", "Mine")]),
        own.update("ann", "conv_1", "Mine"),
        own.delete_item("ann", "conv_1", "msg_1"),
        own.set_leaf("ann", "conv_1", "msg_1"),
        own.delete_response("ann", "resp_1"),
        own.delete("ann", "conv_1"),
    ):
        with pytest.raises(DatabaseUnavailableError, match="another process has taken over from this one"):
            await write
    assert await whole(anns_store, "ann", "conv_1") == before
    assert await listed_ids(anns_store) == ["conv_1"]
    await new.update("ann", "conv_1", "Ours")


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


async def read_pages(store: Conversations, user: str, id: str) -> list[Any]:
    return [page async for page in store.pages(user, id)]


LOOKUPS: list[Callable[[Conversations, str, str], Awaitable[Any]]] = [
    Conversations.find,
    Conversations.delete,
    read_pages,
    lambda store, user, id: store.update(user, id, "Stolen", {}),
    lambda store, user, id: store.set_leaf(user, id, "msg_1"),
    lambda store, user, id: store.list_page(user, Listing(100, id, "")),
    lambda store, user, id: store.read_page(user, id, 10),
    lambda store, user, id: store.list_items(user, id, 10),
    lambda store, user, id: store.find_item(user, id, "msg_1"),
    lambda store, user, id: store.append_items(user, id, [message("msg_9")]),
    lambda store, user, id: store.delete_item(user, id, "msg_1"),
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
    assert await anns_store.path(user, id) == ([], None, False)
    with pytest.raises(ItemNotFoundError):
        await anns_store.path(user, id, "msg_1")
    assert await whole(anns_store, "ann", "conv_1") == before
    assert await listed_ids(anns_store) == ["conv_1"]


async def test_each_user_sees_only_their_own_conversations(anns_store: Conversations) -> None:
    await begin(anns_store, "conv_2", message("msg_2", "How are you?"), reply("resp_2"), user="bob")
    assert [await listed_ids(anns_store, user) for user in ("ann", "bob", "eve")] == [["conv_1"], ["conv_2"], []]
    assert await listed_ids(anns_store, "bob", query="Well") == []
    assert await listed_ids(anns_store, "bob", query="how") == ["conv_2"]


async def test_a_tree_that_is_not_listed_is_not_a_conversation(anns_store: Conversations) -> None:
    await begin(anns_store, "conv_2", message("msg_2", "How are you?"), reply("resp_2"), listed=False)
    assert await listed_ids(anns_store) == await listed_ids(anns_store, query="How are you?") == ["conv_1"]
    for look_up in LOOKUPS:
        with pytest.raises(ConversationNotFoundError):
            await look_up(anns_store, "ann", "conv_2")
    assert await anns_store.path("ann", "conv_2") == ([], None, False)


# Paths


async def test_the_path_to_an_item_has_all_items_before_it_on_its_branch(anns_store: Conversations) -> None:
    await fork(anns_store, "conv_1", "item_0", message("msg_2", "Edited"), reply("resp_2", "Oh"))
    for after, expected in (
        (Edge.START, []),
        ("item_0", ["item_0"]),
        ("msg_1", ["item_0", "msg_1"]),
        ("resp_1", ["item_0", "msg_1", "resp_1"]),
        ("msg_1_0", ["item_0", "msg_1", "resp_1"]),
        ("resp_2", ["item_0", "msg_2", "resp_2"]),
        (Edge.END, ["item_0", "msg_1", "resp_1"]),
    ):
        items, leaf, exists = await anns_store.path("ann", "conv_1", after)
        assert (ids_of(items), leaf, exists) == (expected, "resp_1", True)


@pytest.mark.parametrize(
    "after", ["msg_9", "", "None", "MSG_1", "msg_", "item_", "0", "start", "end", "msg_2", "resp_2"]
)
async def test_an_item_that_is_not_in_the_conversation_is_refused(anns_store: Conversations, after: str) -> None:
    await begin(anns_store, "conv_2", message("msg_2"), reply("resp_2", "Oh"))
    with pytest.raises(ItemNotFoundError, match="no such item") as raised:
        await anns_store.path("ann", "conv_1", after)
    error = raised.value
    assert (error.type, error.code, error.param, error.status) == (
        "invalid_request_error",
        "item_not_found",
        "after",
        404,
    )


async def test_a_path_has_each_part_of_a_reply_in_one_piece(anns_store: Conversations) -> None:
    output = [OutputItem("reasoning", ["h", "m"]), OutputItem("message", ["a", "b"]), OutputItem("message", ["c"])]
    await go_on(anns_store, "conv_1", Item.of_reply("resp_2", 1.0, output))
    item = (await anns_store.path("ann", "conv_1")).items[-1]
    assert [part.pieces for part in item.output] == [["hm"], ["ab"], ["c"]]
    assert (item.content, item.message) == ("abc", {"role": "assistant", "content": "abc", "reasoning": "hm"})


async def test_a_parent_that_is_wrong_does_not_make_a_path_endless(
    anns_store: Conversations, empty_tables: AsyncEngine
) -> None:
    async with empty_tables.begin() as connection:
        await connection.execute(update(items_table).where(items_table.c.id == "item_0").values(parent="resp_1"))
    assert ids_of((await anns_store.path("ann", "conv_1")).items) == ["item_0", "msg_1", "resp_1"]


# The leaf


async def test_another_branch_can_become_the_current_one(anns_store: Conversations) -> None:
    await fork(anns_store, "conv_1", "item_0", message("msg_2", "Edited"), reply("resp_2", "Oh"))
    before = await anns_store.find("ann", "conv_1")
    changed = await anns_store.set_leaf("ann", "conv_1", "resp_2")
    assert changed == replace(before, leaf="resp_2")
    assert await contents(anns_store, "conv_1") == ["Be brief.", "Edited", "Oh"]
    assert (await anns_store.set_leaf("ann", "conv_1", "msg_1_0")).leaf == "resp_1"
    for item in ("msg_9", "", "conv_1"):
        with pytest.raises(ItemNotFoundError):
            await anns_store.set_leaf("ann", "conv_1", item)
    assert (await anns_store.find("ann", "conv_1")).leaf == "resp_1"


# Items


async def test_items_are_appended_behind_the_leaf(anns_store: Conversations) -> None:
    new = [message("msg_2", "And you?"), message("msg_3", "Well?")]
    added = await anns_store.append_items("ann", "conv_1", new)
    assert added == linked(new, "resp_1")
    assert await contents(anns_store, "conv_1") == ["Be brief.", "How are you?", "Well.", "And you?", "Well?"]
    assert (await anns_store.find("ann", "conv_1")).leaf == "msg_3"
    assert await anns_store.append_items("ann", "conv_1", []) == []
    assert (await anns_store.find("ann", "conv_1")).leaf == "msg_3"


async def test_nothing_is_appended_while_a_reply_runs(anns_store: Conversations) -> None:
    await go_on(anns_store, "conv_1", message("msg_2", "And you?"), growing("resp_2"))
    with pytest.raises(ConversationLockedError) as raised:
        await anns_store.append_items("ann", "conv_1", [message("msg_3")])
    assert (raised.value.status, raised.value.code) == (409, "conversation_locked")
    await anns_store.update_replies([reply("resp_2", "Fine")])
    await anns_store.append_items("ann", "conv_1", [message("msg_3")])
    assert (await anns_store.find("ann", "conv_1")).leaf == "msg_3"


async def test_items_that_are_appended_at_once_are_all_kept(anns_store: Conversations) -> None:
    ids = [f"msg_{letter}" for letter in "abcdefgh"]
    await asyncio.gather(*(anns_store.append_items("ann", "conv_1", [message(id, id)]) for id in ids))
    assert sorted((await contents(anns_store, "conv_1"))[3:]) == ids


async def test_an_item_is_found_on_any_branch(anns_store: Conversations) -> None:
    output = [OutputItem("reasoning", ["h", "m"]), OutputItem("function_call", ["{", "}"], "look", "call_1")]
    await fork(anns_store, "conv_1", "item_0", message("msg_2", "Edited"), Item.of_reply("resp_2", 1.0, output))
    assert (await anns_store.find_item("ann", "conv_1", "msg_2")).content == "Edited"
    for id in ("rs_2_0", "fc_2_1"):
        assert (await anns_store.find_item("ann", "conv_1", id)).output == output
    for id in ("msg_9", "resp_2", "rs_2_1", "fc_2_2", "msg_2_0", ""):
        with pytest.raises(ItemNotFoundError):
            await anns_store.find_item("ann", "conv_1", id)


async def test_a_deleted_message_is_gone_and_what_comes_after_it_stays(
    anns_store: Conversations, empty_tables: AsyncEngine
) -> None:
    called = Item.of_message({"role": "assistant", "content": "x" * 1000, "tool_calls": [CALL]}, 1.0)
    await go_on(anns_store, "conv_1", called, reply("resp_2", "Oh"))
    await anns_store.delete_item("ann", "conv_1", called.id)
    path = (await anns_store.path("ann", "conv_1")).items
    assert contents_of(path) == ["Be brief.", "How are you?", "Well.", "", "Oh"]
    assert (path[3].status, path[3].tool_calls) == (Status.DELETED, None)
    assert await listed_ids(anns_store, query="xxx") == []
    assert called.id not in ids_of((await anns_store.list_items("ann", "conv_1", 100))[0])
    for ask in (anns_store.find_item, anns_store.delete_item):
        with pytest.raises(ItemNotFoundError):
            await ask("ann", "conv_1", called.id)
    async with empty_tables.connect() as connection:
        assert ((await connection.execute(select(conversations_table.c.bytes))).scalar() or 0) < 500


async def test_a_deleted_part_of_a_reply_leaves_the_other_parts_and_their_ids(anns_store: Conversations) -> None:
    output = [
        OutputItem("reasoning", ["h", "m"], complete=True),
        OutputItem("message", ["a", "b"], complete=True),
        OutputItem("function_call", ["{", "}"], "look", "call_1", complete=True),
        OutputItem("message", ["c", "d"], complete=True),
    ]
    item = Item.of_reply("resp_2", 1.0, output, status=Status.COMPLETED, options={"seed": 1}, usage={"n": 1})
    await go_on(anns_store, "conv_1", item)
    await anns_store.delete_item("ann", "conv_1", "msg_2_1")
    left = (await anns_store.find_response("ann", "resp_2")).item
    assert left.output == [output[0], OutputItem("message"), *output[2:]]
    assert (left.content, left.status, left.options, left.usage) == ("cd", Status.COMPLETED, {"seed": 1}, {"n": 1})
    await anns_store.delete_item("ann", "conv_1", "fc_2_2")
    left = (await anns_store.find_response("ann", "resp_2")).item
    assert left.message == {"role": "assistant", "content": "cd", "reasoning": "hm"}
    with pytest.raises(ItemNotFoundError):
        await anns_store.find_item("ann", "conv_1", "msg_2_1")
    assert (await anns_store.find_item("ann", "conv_1", "msg_2_3")).content == "cd"


async def test_a_part_of_a_reply_in_progress_cannot_be_deleted(anns_store: Conversations) -> None:
    await go_on(anns_store, "conv_1", growing("resp_2", "Oh"))
    with pytest.raises(ConversationLockedError):
        await anns_store.delete_item("ann", "conv_1", "msg_2_0")
    assert (await contents(anns_store, "conv_1"))[-1] == "Oh"


# Limits


async def test_a_user_has_at_most_some_conversations(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables, limits=StorageLimits(conversations=2))
    for number in (1, 2):
        await begin(store, f"conv_{number}", message(f"msg_{number}"), reply(f"resp_{number}"))
    with pytest.raises(StorageFullError, match="delete some conversations") as raised:
        await begin(store, "conv_3", message("msg_3"), reply("resp_3"))
    assert (raised.value.status, raised.value.code) == (409, "storage_full")
    with pytest.raises(StorageFullError):
        await store.create("ann")
    await go_on(store, "conv_2", message("msg_4"), reply("resp_4"))
    await begin(store, "conv_4", message("msg_5"), reply("resp_5"), user="bob")
    await store.delete("ann", "conv_1")
    await begin(store, "conv_3", message("msg_3"), reply("resp_3"))
    assert await listed_ids(store) == ["conv_3", "conv_2"]


async def test_a_user_has_at_most_some_bytes(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables, limits=StorageLimits(bytes=1000))
    await begin(store, "conv_1", message("msg_1", "é" * 300), reply("resp_1"))
    with pytest.raises(StorageFullError):
        await go_on(store, "conv_1", message("msg_2", "é" * 300), reply("resp_2"))
    with pytest.raises(StorageFullError):
        await store.append_items("ann", "conv_1", [message("msg_2", "é" * 300)])
    with pytest.raises(StorageFullError):
        await begin(store, "conv_2", message("msg_2", "é" * 300), reply("resp_2"))
    assert await listed_ids(store) == ["conv_1"]
    assert len(await contents(store, "conv_1")) == 2
    await store.append_items("ann", "conv_1", [message("msg_2", "é" * 100)])


async def test_a_conversation_has_at_most_some_items_and_bytes(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables)
    full = await store.create("ann", [message(f"msg_{number}") for number in range(MAX_ITEMS)])
    with pytest.raises(ConversationFullError, match="begin a new one") as raised:
        await store.append_items("ann", full.id, [message("msg_more")])
    assert (raised.value.status, raised.value.code) == (409, "conversation_full")
    with pytest.raises(ConversationFullError):
        await fork(store, full.id, "msg_5", reply("resp_more"))
    assert len(await contents(store, full.id)) == MAX_ITEMS
    with pytest.raises(ConversationFullError):
        await store.create("ann", [message("msg_large", "x" * (MAX_CONVERSATION_BYTES + 1))])
    assert await listed_ids(store) == [full.id]


# Pages of items


async def test_items_are_read_in_pages_from_the_leaf_back(store: Conversations) -> None:
    conversation = (await store.create("ann", [message(f"msg_{number}", f"{number}") for number in range(7)])).id
    items = linked([message(f"msg_{number}", f"{number}") for number in range(7)], None)
    await fork(store, conversation, "msg_2", reply("resp_1", "aside"))
    versions = {item.id: Version(1, 1, None, None) for item in items} | {"msg_3": Version(1, 2, None, "resp_1")}

    def page(start: int, end: int) -> ItemPage:
        part = items[start:end]
        return ItemPage(part, start, {item.id: versions[item.id] for item in part})

    assert await store.read_page("ann", conversation, 7) == page(0, 7)
    assert await store.read_page("ann", conversation, 3) == page(4, 7)
    assert await store.read_page("ann", conversation, 3, "msg_4") == page(1, 4)
    assert await store.read_page("ann", conversation, 3, "msg_1") == page(0, 1)
    assert await store.read_page("ann", conversation, 3, "msg_0") == page(0, 0)
    assert await store.read_page("ann", conversation, 2, "msg_1_0") == page(1, 3), "of another branch"
    for user, before in (("ann", "unknown"), ("bob", "msg_4")):
        with pytest.raises(ItemNotFoundError) as raised:
            await store.read_page(user, conversation, 3, before)
        assert raised.value.param == "before"


async def test_a_page_has_each_piece_of_a_reply(anns_store: Conversations) -> None:
    assert (await anns_store.read_page("ann", "conv_1", 1)).items[0].output == ANSWER.output


async def test_a_page_has_at_most_some_bytes_but_at_least_a_question_and_its_reply(store: Conversations) -> None:
    items = [message(f"msg_{number}", "x" * (PAGE_BYTES // 3 + 1)) for number in range(4)]
    conversation = (await store.create("ann", [message("msg_large", "x" * (PAGE_BYTES + 1)), *items])).id
    page = await store.read_page("ann", conversation, 100)
    assert (page.items, page.earlier) == (linked(items, "msg_large")[2:], 3)
    page = await store.read_page("ann", conversation, 100, "msg_0")
    assert (ids_of(page.items), page.earlier) == (["msg_large"], 0)


@pytest.mark.parametrize("field", ["options", "request"])
async def test_a_page_counts_the_bytes_of_texts_that_are_stored_once(store: Conversations, field: str) -> None:
    fields: dict[str, Any] = {field: {"instructions": "x" * (PAGE_BYTES // 2)}}
    await begin(store, "conv_1", message("msg_0"), reply("resp_0", **fields))
    for number in range(1, 4):
        await go_on(store, "conv_1", reply(f"resp_{number}", **fields))
    page = await store.read_page("ann", "conv_1", 100)
    assert (ids_of(page.items), page.earlier) == (["resp_2", "resp_3"], 3)


async def test_all_items_of_a_conversation_are_read_some_at_a_time(store: Conversations) -> None:
    short = [message(f"msg_{number}") for number in range(2 * MAX_PAGE)]
    items = [*short, *(message(f"long_{number}", "x" * (PAGE_BYTES // 3)) for number in range(4))]
    conversation = (await store.create("ann", items)).id
    await fork(store, conversation, "msg_2", reply("resp_1", "aside"))
    pages = await read_pages(store, "ann", conversation)
    assert [len(page) for page in pages] == [MAX_PAGE, MAX_PAGE, 3, 2]
    *current, aside = (placed for page in pages for placed in page)
    assert current == [Placed(item) for item in linked(items, None)]
    assert (aside.item.id, aside.fork) == ("resp_1", Fork("msg_2", "msg_3"))
    assert await read_pages(store, "ann", (await store.create("ann")).id) == []


# Versions


async def versions(store: Conversations, id: str = "conv_1") -> dict[str, Version]:
    """The versions of the items on the current branch that have more than one."""
    found = (await store.read_page("ann", id, 100)).versions
    return {id: version for id, version in found.items() if version.count > 1}


async def test_the_versions_of_an_item_are_those_with_the_same_parent_in_the_order_of_creation(
    anns_store: Conversations,
) -> None:
    assert await versions(anns_store) == {}
    await begin(anns_store, "conv_2", message("msg_other"), reply("resp_other"))
    for created, id in ((3.0, "resp_4"), (2.0, "resp_3"), (2.0, "resp_2")):
        await fork(anns_store, "conv_1", "msg_1", replace(reply(id), created=created))
    assert await versions(anns_store) == {"resp_1": Version(1, 4, None, "resp_2")}
    await anns_store.set_leaf("ann", "conv_1", "resp_3")
    assert await versions(anns_store) == {"resp_3": Version(3, 4, "resp_2", "resp_4")}


async def test_the_first_items_of_a_conversation_are_versions_too(anns_store: Conversations) -> None:
    await begin(anns_store, "conv_2", message("msg_other"), reply("resp_other"))
    await fork(anns_store, "conv_1", None, message("msg_2", "Edited"), reply("resp_2"))
    assert await versions(anns_store) == {"item_0": Version(2, 2, "msg_2", None)}


async def test_a_deleted_version_counts_and_leads_to_what_comes_after_it(anns_store: Conversations) -> None:
    await fork(anns_store, "conv_1", "msg_1", reply("resp_2", "Gone"), replace(reply("resp_3", "On"), created=3.0))
    await anns_store.delete_response("ann", "resp_2")
    page = await anns_store.read_page("ann", "conv_1", 1)
    assert page.versions["resp_1"] == Version(1, 2, None, "resp_2")
    assert (await anns_store.set_leaf("ann", "conv_1", "resp_2")).leaf == "resp_3"


async def test_the_branch_of_an_item_goes_on_to_the_newest_leaf_below_it(anns_store: Conversations) -> None:
    await go_on(anns_store, "conv_1", message("msg_2"), replace(reply("resp_2"), created=5.0))
    await fork(anns_store, "conv_1", "resp_1", message("msg_3"), replace(reply("resp_3"), created=9.0))
    await fork(anns_store, "conv_1", "msg_3", replace(reply("resp_4"), created=7.0))
    await fork(anns_store, "conv_1", "item_0", replace(reply("resp_5"), created=8.0))
    for item, leaf in (
        ("item_0", "resp_3"),
        ("resp_1", "resp_3"),
        ("msg_1_0", "resp_3"),
        ("msg_2", "resp_2"),
        ("msg_3", "resp_3"),
        ("resp_4", "resp_4"),
        ("resp_5", "resp_5"),
    ):
        before = (await anns_store.find("ann", "conv_1")).updated
        shown = await anns_store.set_leaf("ann", "conv_1", item)
        assert (shown.leaf, shown.updated) == (leaf, before)


async def test_another_branch_is_not_shown_while_a_reply_runs_at_the_leaf(anns_store: Conversations) -> None:
    await fork(anns_store, "conv_1", "resp_1", growing("resp_2"))
    assert (await anns_store.find("ann", "conv_1")).response_id is None, "it runs elsewhere"
    assert (await anns_store.set_leaf("ann", "conv_1", "resp_1")).response_id == "resp_2"
    assert [found.response_id for found in (await anns_store.list_page("ann", ALL))[0]] == ["resp_2"]
    with pytest.raises(ConversationLockedError):
        await anns_store.set_leaf("ann", "conv_1", "msg_1")
    await anns_store.update_replies([reply("resp_2", "Done")])
    assert (await anns_store.set_leaf("ann", "conv_1", "msg_1")).response_id is None


async def test_the_search_finds_text_on_every_branch(anns_store: Conversations) -> None:
    await fork(anns_store, "conv_1", "item_0", message("msg_2", "A needle"), reply("resp_2", "In the hay"))
    await fork(anns_store, "conv_1", None, message("msg_3", "Another root"))
    for words in ("needle", "the hay", "another root", "How are"):
        assert await listed_ids(anns_store, query=words) == ["conv_1"]


# Lists of items


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("ascending", [True, False])
async def test_lists_have_each_item_of_the_current_branch_once(
    store: Conversations, limit: int, ascending: bool
) -> None:
    conversation = (await store.create("ann", [message(f"msg_{number}") for number in range(7)])).id
    await fork(store, conversation, "msg_2", reply("resp_1", "aside"))
    expected = [f"msg_{number}" for number in range(7)][:: 1 if ascending else -1]
    seen, after, has_more = list[str](), None, True
    while has_more:
        items, has_more = await store.list_items("ann", conversation, limit, after, ascending)
        assert len(items) <= limit
        seen += ids_of(items)
        after = seen[-1]
    assert seen == expected
    assert await store.list_items("ann", conversation, limit, after, ascending) == ([], False)


async def test_a_list_behind_a_part_of_a_reply_begins_with_the_reply(anns_store: Conversations) -> None:
    await go_on(anns_store, "conv_1", message("msg_2"), reply("resp_2", "Oh"))
    items, has_more = await anns_store.list_items("ann", "conv_1", 1, "msg_1_0", ascending=True)
    assert (ids_of(items), has_more) == (["resp_1", "msg_2"], True)
    items, has_more = await anns_store.list_items("ann", "conv_1", 2, "msg_1_0")
    assert (ids_of(items), has_more) == (["resp_1", "msg_1", "item_0"], False)
    for after in ("msg_9", "msg_9_0", ""):
        with pytest.raises(ItemNotFoundError):
            await anns_store.list_items("ann", "conv_1", 2, after)


async def test_a_list_leaves_deleted_items_out(anns_store: Conversations) -> None:
    await go_on(anns_store, "conv_1", message("msg_2"), reply("resp_2", "Oh"))
    await anns_store.delete_response("ann", "resp_1")
    await anns_store.delete_item("ann", "conv_1", "item_0")
    items, _ = await anns_store.list_items("ann", "conv_1", 100, ascending=True)
    assert ids_of(items) == ["msg_1", "msg_2", "resp_2"]


# Lists


@pytest.fixture
async def nine_ids(empty_tables: AsyncEngine) -> list[str]:
    """The ids of nine conversations of ann's, in the order of a list. Nine of bob's have the same times."""
    times = {f"conv_{letter}": float(index // 3) for index, letter in enumerate("gcaeibdfh")}
    summaries, rows = list[dict[str, Any]](), list[dict[str, Any]]()
    for user, suffix in (("ann", ""), ("bob", "_bob")):
        for id, time in times.items():
            key, title = id + suffix, f"Title of {id}"
            summary = {"id": key, "user_id": user, "title": title, "created": 0.0, "updated": time}
            summaries.append(summary | {"leaf": f"item_1_{key}", "listed": True})
            for position, content in enumerate([title, "title, once more"]):
                values = {"role": "user", "content": content, "created": 1.0, "depth": position, "bytes": len(content)}
                rows.append(values | {"id": f"item_{position}_{key}", "conversation_id": key})
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
    await store.append_items("ann", last, [message("item_9", "Again")])
    assert await listed_ids(store) == [last, *nine_ids[:-1]]


async def test_a_page_can_begin_after_a_conversation_that_the_query_does_not_find(
    store: Conversations, nine_ids: list[str]
) -> None:
    await store.update("ann", nine_ids[5], "Unlike the others")
    for position in (0, 1):
        await store.delete_item("ann", nine_ids[5], f"item_{position}_{nine_ids[5]}")
    assert await listed_ids(store, query="title") == [*nine_ids[:5], *nine_ids[6:]]
    assert await listed_ids(store, query="title", after=nine_ids[5]) == nine_ids[6:]


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
    answer = reply("resp_1", "Sunny, 30 degrees in 广州 👩\u200d👧")
    await begin(store, "conv_1", SYSTEM, message("msg_1", "Hello"), answer)
    await store.update("ann", "conv_1", "Weather in Guangzhou")
    await begin(store, "conv_2", message("msg_2", "Something else"), reply("resp_2"))
    assert await listed_ids(store, query=query) == ["conv_1"] * found


@pytest.mark.parametrize("sign", ["%", "_", "\\", "/", "'", '"', "[a]", "*", "?", "^", "\\%", "/_", "\\\\", "%%", "--"])
async def test_a_sign_in_a_query_has_no_special_meaning(store: Conversations, sign: str) -> None:
    first = await store.create("ann", [message("msg_1", f"before{sign}after")])
    second = await store.create("ann", [message("msg_2"), message("msg_3", f"said {sign}")], title="A title")
    await store.create("ann", [message("msg_4", "before or after, a, b"), message("msg_5", "beforexafter")])
    assert await listed_ids(store, query=sign) == [second.id, first.id]
    assert await listed_ids(store, query=f"before{sign}after") == [first.id]


async def test_a_query_with_a_nul_finds_only_text_that_had_one(anns_store: Conversations) -> None:
    other = await anns_store.create("ann", [message("msg_2", "with\0nul")])
    assert await listed_ids(anns_store, query="h\0n") == [other.id]
    assert await listed_ids(anns_store, query="\0\0") == []


async def test_a_query_finds_messages_on_all_branches_but_no_deleted_ones(anns_store: Conversations) -> None:
    await anns_store.update("ann", "conv_1", "A title")
    await fork(anns_store, "conv_1", "item_0", message("msg_2", "Edited"), reply("resp_2", "Oh"))
    assert await listed_ids(anns_store, query="edited") == ["conv_1"]
    await anns_store.delete_item("ann", "conv_1", "msg_1")
    await anns_store.delete_response("ann", "resp_2")
    assert await listed_ids(anns_store, query="how are you") == await listed_ids(anns_store, query="edited") == []


@pytest.mark.parametrize("sign", ["x", "%", pytest.param("\U0010ffff", id="last-character")])
async def test_a_query_of_the_greatest_length_is_searched(store: Conversations, sign: str) -> None:
    first = await store.create("ann", [message("msg_1", f"It is {sign * MAX_QUERY}.")])
    await store.create("ann", [message("msg_2", f"It is {sign * (MAX_QUERY - 1)}.")])
    assert await listed_ids(store, query=sign * MAX_QUERY) == [first.id]
