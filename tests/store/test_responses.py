from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from models.errors import (
    ConversationFullError,
    ConversationLockedError,
    ConversationNotFoundError,
    DatabaseUnavailableError,
    ItemNotFoundError,
    ResponseNotFoundError,
    StorageFullError,
)
from models.messages import ToolCall
from models.output_item import OutputItem, TokenLogprob
from models.store.conversations import Conversations
from models.store.database import conversations_table, items_table, texts_table
from models.store.item import Item, Status, linked
from models.store.place import Place
from models.store.responses import ABANDONED
from models.store.storage_limits import MAX_CONVERSATION_BYTES, UNLISTED_SECONDS, StorageLimits
from tests.support.owners import owned_store, read_owners, remove_owner, write_owner
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

CALL: ToolCall = {"id": "call_1", "name": "look", "arguments": '{"at": "\ud800\0é"}'}


async def count(engine: AsyncEngine, table: Any = items_table) -> int:
    """The number of rows of a table."""
    async with engine.connect() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar() or 0


async def bytes_of(engine: AsyncEngine, id: str) -> int:
    """The bytes of a conversation, as they are counted."""
    async with engine.connect() as connection:
        chosen = select(conversations_table.c.bytes).where(conversations_table.c.id == id)
        return int((await connection.execute(chosen)).scalar_one())


async def leaf(store: Conversations, id: str = "conv_1") -> str | None:
    return (await store.find("ann", id)).leaf


async def is_there(store: Conversations, id: str) -> bool:
    """Whether a response is found."""
    try:
        await store.find_response("ann", id)
    except ResponseNotFoundError:
        return False
    return True


# Turns


async def test_a_conversation_begins_with_its_first_turn(store: Conversations) -> None:
    await store.begin_turn("ann", "conv_1", Place(new=True), [QUESTION], growing("resp_1"))
    conversation = await store.find("ann", "conv_1")
    assert (conversation.title, conversation.leaf, conversation.metadata) == ("How are you?", "resp_1", {})
    assert conversation.created == conversation.updated
    assert (await store.path("ann", "conv_1")).items == linked([QUESTION, growing("resp_1")], None)


async def test_a_turn_goes_on_behind_the_leaf(anns_store: Conversations, empty_tables: AsyncEngine) -> None:
    before = await anns_store.find("ann", "conv_1")
    await set_updated(empty_tables, {"conv_1": 5.0})
    await go_on(anns_store, "conv_1", message("msg_2", "And?"), reply("resp_2", "Fine."))
    after = await anns_store.find("ann", "conv_1")
    assert replace(after, updated=before.updated, leaf="resp_1") == before
    assert (after.leaf, after.updated > 5.0) == ("resp_2", True)
    assert await contents(anns_store, "conv_1") == ["Be brief.", "How are you?", "Well.", "And?", "Fine."]


async def test_a_window_that_shows_an_older_state_adds_a_branch_and_deletes_nothing(anns_store: Conversations) -> None:
    for number in (2, 3, 4):
        await go_on(anns_store, "conv_1", message(f"msg_{number}"), reply(f"resp_{number}", f"a{number}"))
    stale = Place("resp_1", leaf="resp_1")
    with pytest.raises(ConversationLockedError):
        await anns_store.begin_turn("ann", "conv_1", stale, [message("msg_5", "Late")], growing("resp_5"))
    path = await anns_store.path("ann", "conv_1", "resp_1")
    await anns_store.begin_turn(
        "ann", "conv_1", Place("resp_1", path.leaf), [message("msg_5", "Late")], reply("resp_5")
    )
    assert await contents(anns_store, "conv_1") == ["Be brief.", "How are you?", "Well.", "Late", ""]
    found = await anns_store.path_of_response("ann", "resp_4")
    assert ids_of(found.items) == [
        "item_0", "msg_1", "resp_1", "msg_2", "resp_2", "msg_3", "resp_3", "msg_4", "resp_4"
    ]  # fmt: skip


async def test_asking_again_adds_a_reply_beside_the_first_one(anns_store: Conversations) -> None:
    await anns_store.begin_turn("ann", "conv_1", Place("msg_1", "resp_1"), [], reply("resp_2", "Better."))
    assert await contents(anns_store, "conv_1") == ["Be brief.", "How are you?", "Better."]
    assert contents_of((await anns_store.path("ann", "conv_1", "resp_1")).items)[-1] == "Well."


async def test_a_turn_can_begin_a_second_root(anns_store: Conversations) -> None:
    await anns_store.begin_turn("ann", "conv_1", Place(None, "resp_1"), [message("msg_2", "Else")], reply("resp_2"))
    assert await contents(anns_store, "conv_1") == ["Else", ""]
    assert ids_of((await anns_store.path("ann", "conv_1", "resp_1")).items) == ["item_0", "msg_1", "resp_1"]


@pytest.mark.parametrize("parent", ["resp_9", "", "msg_2", "conv_1"])
async def test_a_turn_below_an_item_that_is_not_there_is_refused(anns_store: Conversations, parent: str) -> None:
    await begin(anns_store, "conv_2", message("msg_2"), reply("resp_2"))
    with pytest.raises(ItemNotFoundError):
        await fork(anns_store, "conv_1", parent, message("msg_3"), reply("resp_3"))
    assert not await is_there(anns_store, "resp_3")


async def test_a_turn_of_a_conversation_that_is_not_there_is_refused(anns_store: Conversations) -> None:
    for user, id in (("ann", "conv_9"), ("bob", "conv_1")):
        with pytest.raises(ConversationNotFoundError):
            await fork(anns_store, id, "resp_1", message("msg_3"), reply("resp_3"), user=user)
    with pytest.raises(ConversationLockedError):
        await begin(anns_store, "conv_1", message("msg_3"), reply("resp_3"), user="bob")
    assert await count(anns_store._database) == 3


async def test_ten_conversations_can_begin_at_once(store: Conversations) -> None:
    numbers = range(10)
    await asyncio.gather(*(begin(store, f"c{n}", message(f"msg_{n}", f"{n}"), reply(f"resp_{n}")) for n in numbers))
    assert [await contents(store, f"c{n}") for n in numbers] == [[f"{n}", ""] for n in numbers]


# One at a time in a conversation, by compare-and-set


async def test_a_conversation_is_locked_while_the_reply_at_its_leaf_runs(anns_store: Conversations) -> None:
    other_process = await owned_store(anns_store._database, "other")
    await go_on(anns_store, "conv_1", message("msg_2", "And you?"), growing("resp_2"))
    for place in (Place("resp_2", "resp_2"), Place("resp_1", "resp_2"), Place("resp_1", "resp_1"), Place(new=True)):
        with pytest.raises(ConversationLockedError) as raised:
            await other_process.begin_turn("ann", "conv_1", place, [message("msg_3")], growing("resp_3"))
        assert (raised.value.status, raised.value.code) == (409, "conversation_locked")
    assert not await is_there(anns_store, "resp_3")
    await anns_store.update_replies([reply("resp_2", "Fine.")])
    await go_on(other_process, "conv_1", message("msg_3", "Now me"), growing("resp_3"))
    assert await leaf(anns_store) == "resp_3"


async def race(*stores: Conversations, place: Place, id: str = "conv_1") -> list[BaseException | None]:
    """Begin a turn in each store at once, all at one place. Returns the errors."""
    turns = (
        store.begin_turn("ann", id, place, [message(f"msg_r{number}")], growing(f"resp_r{number}"))
        for number, store in enumerate(stores)
    )
    return await asyncio.gather(*turns, return_exceptions=True)


async def test_of_two_turns_that_race_for_the_leaf_one_is_refused(anns_store: Conversations) -> None:
    other = await owned_store(anns_store._database, "other")
    errors = await race(anns_store, other, anns_store, other, place=Place("resp_1", "resp_1"))
    assert [type(error) for error in errors if error] == [ConversationLockedError] * 3
    winner = f"resp_r{errors.index(None)}"
    assert await leaf(anns_store) == winner
    assert await count(anns_store._database) == 5, "the others leave nothing"


async def test_of_two_turns_that_race_to_begin_a_conversation_one_is_refused(empty_tables: AsyncEngine) -> None:
    stores = [await owned_store(empty_tables, owner) for owner in ("one", "two")]
    errors = await race(*stores, place=Place(new=True))
    assert [type(error) for error in errors if error] == [ConversationLockedError]
    assert await count(empty_tables) == 2


# Branches of a response, in parallel


async def test_many_responses_can_continue_one_response_in_parallel(anns_store: Conversations) -> None:
    numbers = range(2, 8)
    await asyncio.gather(
        *(fork(anns_store, "conv_1", "resp_1", message(f"msg_{n}", f"{n}"), growing(f"resp_{n}")) for n in numbers)
    )
    assert await leaf(anns_store) == "resp_1"
    for n in numbers:
        found = await anns_store.path_of_response("ann", f"resp_{n}")
        assert contents_of(found.items) == ["Be brief.", "How are you?", "Well.", f"{n}", ""]
    await go_on(anns_store, "conv_1", message("msg_8"), growing("resp_8"))
    assert await leaf(anns_store) == "resp_8", "a branch in progress does not lock the conversation"


async def test_a_tree_that_is_not_listed_grows_without_a_check(store: Conversations) -> None:
    await begin(store, "conv_1", message("msg_1", "one"), growing("resp_1"), listed=False)
    for n in (2, 3):
        await fork(store, "conv_1", "resp_1", message(f"msg_{n}", f"{n}"), growing(f"resp_{n}"))
        found = await store.path_of_response("ann", f"resp_{n}")
        assert (found.conversation, found.listed, ids_of(found.items)) == (
            "conv_1",
            False,
            ["msg_1", "resp_1", f"msg_{n}", f"resp_{n}"],
        )


# Responses as they are stored

TOKENS: list[Sequence[TokenLogprob]] = [
    [TokenLogprob(b"\xf0\x9f", -0.25, [(b"a", -1.5)])],
    [TokenLogprob(b" b", -1e-9, [])],
]
OUTPUT = [
    OutputItem("reasoning", ["h\0", "m\u2028"], complete=True),
    OutputItem("message", ["👩\u200d", "👧 广州\r\n"], logprobs=TOKENS, complete=True),
    OutputItem("function_call", ["{", '"a":1}'], "look", "call_1", complete=True),
    OutputItem("message", ["é", "e\u0301"]),
]


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(ANSWER, id="reply"),
        pytest.param(growing("resp_1"), id="growing"),
        pytest.param(
            reply("resp_1", status=Status.FAILED, reason="server_error", usage=None, options=None, left_out=None),
            id="nulls",
        ),
        pytest.param(
            reply("resp_1", usage={"n": 2**40}, left_out=2**31 - 1, decode_seconds=1e-300, ended=0.1 + 0.2),
            id="numbers",
        ),
        pytest.param(
            reply(
                "resp_1", options={"instructions": "é\u2028\"'\\", "temperature": 0.1, "stop": ["a", ""], "seed": None}
            ),
            id="options",
        ),
        pytest.param(
            reply("resp_1", request={"tools": [{"name": "f\ud800\0"}], "metadata": {"é": "州"}, "text": None}),
            id="request",
        ),
        pytest.param(reply("resp_1", previous="resp_0", request={}), id="previous"),
        pytest.param(Item.of_reply("resp_1", 1.0, OUTPUT, status=Status.COMPLETED), id="output"),
        pytest.param(reply("resp_1", "x" * 2**20), id="megabyte"),
        *(pytest.param(reply("resp_1", status=status), id=status) for status in Status if status != "deleted"),
    ],
)
async def test_a_response_is_read_as_it_was_written(store: Conversations, item: Item) -> None:
    await begin(store, "conv_1", QUESTION, item)
    assert await store.find_response("ann", "resp_1") == ("conv_1", True, replace(item, parent="msg_1"))
    await store.update_replies([growing("resp_1", "something else")])
    await store.update_replies([item])
    assert (await store.find_response("ann", "resp_1")).item == replace(item, parent="msg_1")


@pytest.mark.parametrize(
    "item",
    [
        SYSTEM,
        Item("msg_2", "assistant", "", 0.1 + 0.2, reasoning="h\0m", tool_calls=[CALL, CALL]),
        Item("msg_2", "tool", "found", 1.0, tool_call_id="call_\0é"),
        Item("item_1", "user", "👩\u200d👩\u200d👧 广州 \ufeff\u202e\r\n\t\U0010ffff\x01 e\u0301 é", 1.0),
    ],
    ids=["system", "calls", "result", "unicode"],
)
async def test_a_message_is_read_as_it_was_written(store: Conversations, item: Item) -> None:
    await begin(store, "conv_1", item, reply("resp_1"))
    assert (await store.path("ann", "conv_1")).items[0] == item


async def test_a_nul_in_a_message_is_replaced_by_a_character_of_the_same_length(store: Conversations) -> None:
    await begin(store, "conv_1", reply("resp_1", "a\0", "b\0c"))
    assert (await store.find_response("ann", "resp_1")).item.output[0].pieces == ["a\ufffd", "b\ufffdc"]


async def test_a_reply_of_thousands_of_pieces_keeps_each_of_them(store: Conversations) -> None:
    pieces = [("广 a", "👩\u200d👧", "\n", "word ")[index % 4] for index in range(5000)]
    await begin(store, "conv_1", growing("resp_1"))
    await store.update_replies([growing("resp_1", *pieces)])
    assert (await store.find_response("ann", "resp_1")).item.output[0].pieces == pieces


@pytest.mark.parametrize(
    ("user", "id"),
    [
        pytest.param("bob", "resp_1", id="another-user"),
        pytest.param("ann", "resp_9", id="unknown-id"),
        pytest.param("ann", "msg_1", id="id-of-a-message"),
        pytest.param("ann", "msg_1_0", id="id-of-a-part"),
        pytest.param("ann", "conv_1", id="id-of-a-conversation"),
        pytest.param("ann", "\0", id="nul"),
        pytest.param("ann", "resp_1\0", id="id-with-nul"),
    ],
)
async def test_a_response_of_somebody_else_is_not_found(anns_store: Conversations, user: str, id: str) -> None:
    for ask in (anns_store.find_response, anns_store.path_of_response, anns_store.delete_response):
        with pytest.raises(ResponseNotFoundError, match="no such response"):
            await ask(user, id)
    with pytest.raises(ResponseNotFoundError):
        await anns_store.input_items_of(user, id, 10)
    assert (await anns_store.find_response("ann", "resp_1")).item == replace(ANSWER, parent="msg_1")


async def test_the_path_of_a_response_has_each_part_in_one_piece(anns_store: Conversations) -> None:
    await go_on(anns_store, "conv_1", message("msg_2"), reply("resp_2", "a", "b"))
    found = await anns_store.path_of_response("ann", "resp_2")
    assert (found.conversation, found.listed) == ("conv_1", True)
    assert [part.pieces for item in found.items for part in item.output] == [["Well."], ["ab"]]


async def test_a_branch_is_found_by_any_of_its_nodes(store: Conversations) -> None:
    await begin(store, "conv_1", message("msg_1"), reply("resp_1"), listed=False)
    assert ids_of(await store.branch("ann", "resp_1")) == ["msg_1", "resp_1"]
    assert ids_of(await store.branch("ann", "msg_1")) == ["msg_1"]
    for user, node in (("bob", "msg_1"), ("ann", "msg_9")):
        with pytest.raises(ItemNotFoundError):
            await store.branch(user, node)


async def test_one_node_is_found_by_its_id_in_any_conversation(store: Conversations) -> None:
    for number, listed in ((1, True), (2, False)):
        nodes = message(f"msg_{number}", f"q{number}"), reply(f"resp_{number}", "a")
        await begin(store, f"conv_{number}", *nodes, listed=listed)
        assert (await store.find_node("ann", f"msg_{number}")).content == f"q{number}"
    await store.delete_item("ann", "conv_1", "msg_1")
    for user, node in (("bob", "msg_2"), ("ann", "msg_9"), ("ann", "msg_1")):
        with pytest.raises(ItemNotFoundError):
            await store.find_node(user, node)


@pytest.mark.parametrize("ascending", [True, False])
async def test_the_input_of_a_response_comes_in_pages(anns_store: Conversations, ascending: bool) -> None:
    await fork(anns_store, "conv_1", "msg_1", *(message(f"msg_{n}") for n in range(2, 5)), reply("resp_2", "a"))
    expected = ["msg_2", "msg_3", "msg_4"][:: 1 if ascending else -1]
    first, has_more = await anns_store.input_items_of("ann", "resp_2", 2, None, ascending)
    assert (ids_of(first), has_more) == (expected[:2], True)
    second, has_more = await anns_store.input_items_of("ann", "resp_2", 2, expected[1], ascending)
    assert (ids_of(second), has_more) == (expected[2:], False)
    with pytest.raises(ItemNotFoundError):
        await anns_store.input_items_of("ann", "resp_2", 2, "msg_1", ascending)


async def test_a_response_without_input_has_no_input_items(anns_store: Conversations) -> None:
    await fork(anns_store, "conv_1", "msg_1", reply("resp_2", "a"))
    assert await anns_store.input_items_of("ann", "resp_2", 10) == ([], False)


# Texts that are stored once


async def test_long_instructions_and_requests_are_stored_once_for_a_conversation(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables)
    options = {"instructions": "Be brief. " * 100, "seed": 1}
    request = {"tools": [{"name": "look"}] * 100}
    await begin(store, "conv_1", reply("resp_0", options=options, request=request))
    first = await bytes_of(empty_tables, "conv_1")
    for number in range(1, 5):
        await go_on(store, "conv_1", reply(f"resp_{number}", options=options, request=request))
    found = [(await store.find_response("ann", f"resp_{number}")).item for number in range(5)]
    assert all((item.options, item.request) == (options, request) for item in found)
    assert all(
        (item.options, item.request) == ({"seed": 1}, None) for item in (await store.path("ann", "conv_1")).items
    )
    assert await count(empty_tables, texts_table) == 2
    assert 2600 < first < await bytes_of(empty_tables, "conv_1") < first + 100
    for number in range(5):
        await store.delete_response("ann", f"resp_{number}")
    assert (await count(empty_tables, texts_table), await bytes_of(empty_tables, "conv_1")) == (0, 0)


# Deleting responses


async def test_a_deleted_response_without_others_behind_it_goes_with_its_input(anns_store: Conversations) -> None:
    await go_on(anns_store, "conv_1", message("msg_2"), message("msg_3"), reply("resp_2", "secret"))
    await anns_store.delete_response("ann", "resp_2")
    assert not await is_there(anns_store, "resp_2")
    assert (await leaf(anns_store), await count(anns_store._database)) == ("resp_1", 3)
    with pytest.raises(ResponseNotFoundError):
        await anns_store.delete_response("ann", "resp_2")


async def test_a_deleted_response_with_others_behind_it_loses_its_text_only(anns_store: Conversations) -> None:
    options = {"instructions": "secret " * 50, "seed": 1}
    secret = Item.of_reply("resp_2", 1.0, [OutputItem("reasoning", ["secret"]), OutputItem("message", ["secret"])])
    await go_on(
        anns_store, "conv_1", message("msg_2", "Ask"), replace(secret, options=options, request={"a": "secret"})
    )
    await go_on(anns_store, "conv_1", message("msg_3", "Again"), reply("resp_3", "Fine."))
    await anns_store.delete_response("ann", "resp_2")
    assert not await is_there(anns_store, "resp_2")
    path = await anns_store.path("ann", "conv_1")
    assert contents_of(path.items) == ["Be brief.", "How are you?", "Well.", "Ask", "", "Again", "Fine."]
    assert path.items[4] == Item("resp_2", "assistant", "", 1.0, "msg_2", status=Status.DELETED, output=[])
    async with anns_store._database.connect() as connection:
        assert "secret" not in str((await connection.execute(select(items_table))).all())
        assert (await connection.execute(select(texts_table))).all() == []
    with pytest.raises(ResponseNotFoundError):
        await anns_store.delete_response("ann", "resp_2")


async def test_deleted_responses_go_when_nothing_is_behind_them_any_more(anns_store: Conversations) -> None:
    for number in (2, 3, 4):
        await go_on(anns_store, "conv_1", message(f"msg_{number}"), reply(f"resp_{number}", "a"))
    for number in (2, 3):
        await anns_store.delete_response("ann", f"resp_{number}")
    assert await count(anns_store._database) == 9
    await anns_store.delete_response("ann", "resp_4")
    assert (await leaf(anns_store), await count(anns_store._database)) == ("resp_1", 3)


async def test_input_that_others_need_stays(anns_store: Conversations) -> None:
    await go_on(anns_store, "conv_1", message("msg_2", "Ask"), message("msg_3", "More"), reply("resp_2", "a"))
    await fork(anns_store, "conv_1", "msg_2", reply("resp_3", "b"))
    await anns_store.append_items("ann", "conv_1", [message("msg_4", "Mine")])
    await go_on(anns_store, "conv_1", message("msg_5"), reply("resp_4", "c"))
    await anns_store.delete_response("ann", "resp_4")
    assert await leaf(anns_store) == "msg_4", "what was appended is not the input of a response"
    await anns_store.delete_response("ann", "resp_2")
    assert contents_of((await anns_store.path("ann", "conv_1", "resp_3")).items)[-2:] == ["Ask", "b"]
    await anns_store.set_leaf("ann", "conv_1", "resp_3")
    await anns_store.delete_response("ann", "resp_3")
    assert await leaf(anns_store) == "msg_4"


async def test_a_leaf_within_a_branch_moves_to_its_end_when_it_is_deleted(anns_store: Conversations) -> None:
    await fork(anns_store, "conv_1", "resp_1", message("msg_2"), reply("resp_2", "a"))
    await anns_store.delete_response("ann", "resp_1")
    assert await leaf(anns_store) == "resp_2"
    assert not (await anns_store.path_of_response("ann", "resp_2")).items[2].content


async def test_a_tree_that_is_not_listed_goes_with_its_last_response(
    store: Conversations, empty_tables: AsyncEngine
) -> None:
    await begin(store, "conv_1", message("msg_1"), reply("resp_1", options={"instructions": "x"}), listed=False)
    await fork(store, "conv_1", "resp_1", message("msg_2"), reply("resp_2"))
    await store.delete_response("ann", "resp_1")
    assert await count(empty_tables, conversations_table) == 1
    await store.delete_response("ann", "resp_2")
    tables = (conversations_table, items_table, texts_table)
    assert [await count(empty_tables, table) for table in tables] == [0, 0, 0]


async def test_the_newest_branch_that_is_left_is_shown_when_the_current_one_is_deleted(store: Conversations) -> None:
    await begin(store, "conv_1", message("msg_1"), reply("resp_1"))
    for number in (2, 3):
        await fork(store, "conv_1", None, message(f"msg_{number}"), reply(f"resp_{number}"))
    await fork(store, "conv_1", "msg_3", reply("resp_4"))
    for deleted, left in (("resp_1", "resp_4"), ("resp_4", "resp_3"), ("resp_3", "resp_2"), ("resp_2", None)):
        await store.delete_response("ann", deleted)
        assert await leaf(store) == left


async def test_a_conversation_stays_when_its_last_response_is_deleted(store: Conversations) -> None:
    await begin(store, "conv_1", message("msg_1"), reply("resp_1"))
    await store.delete_response("ann", "resp_1")
    assert await store.path("ann", "conv_1") == ([], None, True)
    await go_on(store, "conv_1", message("msg_2"), reply("resp_2"))
    assert await leaf(store) == "resp_2"


# Replies that grow


async def test_an_updated_reply_replaces_its_earlier_state(anns_store: Conversations) -> None:
    await go_on(anns_store, "conv_1", message("msg_2"), growing("resp_2"))
    await begin(anns_store, "conv_2", growing("resp_3"), user="bob")
    half = growing("resp_2", "I ", "am", decode_seconds=0.1)
    await anns_store.update_replies([half])
    assert (await anns_store.find_response("ann", "resp_2")).item == replace(half, parent="msg_2")
    assert (await anns_store.find_response("bob", "resp_3")).item == growing("resp_3")
    completed = reply("resp_2", "I ", "am", ".", reason="stop", usage={"total_tokens": 12}, ended=3.5)
    cancelled = reply("resp_3", status=Status.CANCELLED, reason="client_cancelled")
    await anns_store.update_replies(iter([completed, cancelled]))
    assert (await anns_store.find_response("ann", "resp_2")).item == replace(completed, parent="msg_2")
    assert (await anns_store.find_response("bob", "resp_3")).item == cancelled
    await anns_store.update_replies([])


async def test_probabilities_are_stored_when_the_reply_has_ended(store: Conversations) -> None:
    part = OutputItem("message", ["a"], logprobs=[[TokenLogprob(b"a", -0.5, [(b"b", -1.5)])]])
    running = Item.of_reply("resp_1", 2.0, [part], status=Status.IN_PROGRESS)
    await begin(store, "conv_1", growing("resp_1"))
    for state, stored in ((running, None), (replace(running, status=Status.COMPLETED), part.logprobs)):
        await store.update_replies([state])
        (found,) = (await store.find_response("ann", "resp_1")).item.output
        assert (found.pieces, found.logprobs) == (["a"], stored)


async def test_the_bytes_of_a_reply_count_when_it_ends(anns_store: Conversations, empty_tables: AsyncEngine) -> None:
    await go_on(anns_store, "conv_1", growing("resp_2"))
    before = await bytes_of(empty_tables, "conv_1")
    logprobs = [[TokenLogprob(b"word ", -0.5, [(b"other", -2.5)] * 20)]] * 100
    await anns_store.update_replies([reply("resp_2", *["word "] * 100)])
    assert before + 500 < await bytes_of(empty_tables, "conv_1") < before + 1000
    parts = [OutputItem("message", ["word "] * 100, logprobs=[*logprobs])]
    await anns_store.update_replies([Item.of_reply("resp_2", 1.0, parts, status=Status.COMPLETED)])
    assert await bytes_of(empty_tables, "conv_1") > before + 20_000


async def test_a_late_update_does_not_restore_a_deleted_reply(anns_store: Conversations) -> None:
    await go_on(anns_store, "conv_1", message("msg_2"), growing("resp_2"))
    await fork(anns_store, "conv_1", "resp_2", message("msg_3"), growing("resp_3"))
    await begin(anns_store, "conv_2", growing("resp_4"))
    await anns_store.delete_response("ann", "resp_2")
    await anns_store.delete_response("ann", "resp_3")
    await anns_store.delete("ann", "conv_2")
    await anns_store.update_replies([growing(f"resp_{number}", "Back") for number in (2, 3, 4)])
    assert [await is_there(anns_store, f"resp_{number}") for number in (1, 2, 3, 4)] == [True, False, False, False]
    assert await contents(anns_store, "conv_1") == ["Be brief.", "How are you?", "Well."]


async def test_a_late_update_does_not_restore_a_deleted_reply_that_others_continue(anns_store: Conversations) -> None:
    await go_on(anns_store, "conv_1", message("msg_2"), growing("resp_2"))
    await fork(anns_store, "conv_1", "resp_2", message("msg_3"), reply("resp_3"))
    await anns_store.delete_response("ann", "resp_2")
    await anns_store.update_replies([reply("resp_2", "Back"), reply("resp_1", "Done.")])
    assert contents_of((await anns_store.path("ann", "conv_1", "resp_3")).items)[2:] == ["Done.", "Hi", "", "Hi", ""]


async def test_replies_without_an_owner_are_marked_as_failed_and_keep_their_text(anns_store: Conversations) -> None:
    half = growing("resp_2", "I ", "am")
    first, other, last = [await owned_store(anns_store._database, name) for name in ("first", "other", "last")]
    await go_on(first, "conv_1", half)
    await fork(first, "conv_1", "resp_1", growing("resp_3"))
    await fork(other, "conv_1", "resp_1", growing("resp_4"))
    assert await last.fail_unfinished() == [], "their owners may run"
    await remove_owner(anns_store._database, "first")
    assert await last.fail_unfinished() == [("ann", "conv_1")] * 2
    failed = replace(half, parent="resp_1", status=Status.FAILED, reason="server_error")
    assert (await last.find_response("ann", "resp_2")).item == failed
    assert (await last.find_response("ann", "resp_3")).item.status is Status.FAILED
    assert (await last.find_response("ann", "resp_4")).item.status is Status.IN_PROGRESS
    assert await last.fail_unfinished() == []


async def test_an_owner_that_was_removed_meanwhile_does_not_change_failed_replies(anns_store: Conversations) -> None:
    await go_on(anns_store, "conv_1", growing("resp_2", "half"))
    assert await anns_store.fail_unfinished() == [("ann", "conv_1")]
    await anns_store.update_replies([reply("resp_2", "too late")])
    found = (await anns_store.find_response("ann", "resp_2")).item
    assert (found.content, found.status) == ("half", Status.FAILED)


async def test_an_owner_is_removed_with_its_replies_unless_it_has_beaten(anns_store: Conversations) -> None:
    database = anns_store._database
    ended, alive = await write_owner(database, id="ended"), await write_owner(database, id="lives", beats=8)
    await go_on(Conversations(database, "ended"), "conv_1", growing("resp_2"))
    await fork(Conversations(database, "lives"), "conv_1", "resp_1", growing("resp_3"))
    assert await anns_store.fail_unfinished([ended, alive._replace(beats=7)]) == [("ann", "conv_1")]
    assert await read_owners(database) == [alive]
    assert (await anns_store.find_response("ann", "resp_2")).item.status is Status.FAILED
    assert (await anns_store.find_response("ann", "resp_3")).item.status is Status.IN_PROGRESS


async def test_an_owner_that_is_none_any_more_removes_no_other(anns_store: Conversations) -> None:
    database = anns_store._database
    other = await write_owner(database, id="other")
    await go_on(Conversations(database, "other"), "conv_1", growing("resp_2"))
    with pytest.raises(DatabaseUnavailableError):
        await Conversations(database, "removed").fail_unfinished([other])
    assert await read_owners(database) == [other]
    assert (await anns_store.find_response("ann", "resp_2")).item.status is Status.IN_PROGRESS


async def test_replies_without_an_owner_are_found_by_an_index(anns_store: Conversations) -> None:
    chosen = select(items_table.c.id).where(ABANDONED)
    async with anns_store._database.connect() as connection:
        explain = "EXPLAIN QUERY PLAN"
        if connection.dialect.name == "postgresql":  # it does without an index where there are few rows, if it may
            explain = "EXPLAIN"
            await connection.exec_driver_sql("SET enable_seqscan = off")
        plan = (await connection.exec_driver_sql(f"{explain} {chosen.compile(connection.sync_connection)}")).all()
    assert "replies_in_progress" in str(plan)


async def test_replies_that_were_lost_are_marked_as_failed_and_keep_their_text(anns_store: Conversations) -> None:
    half = growing("resp_2", "I ", "am")
    await go_on(anns_store, "conv_1", half)
    other = await owned_store(anns_store._database, "other")
    await other.fail_replies(["resp_2"])
    assert (await anns_store.find_response("ann", "resp_2")).item.status is Status.IN_PROGRESS
    await anns_store.fail_replies(["resp_2", "resp_1", "unknown"])
    failed = replace(half, parent="resp_1", status=Status.FAILED, reason="server_error")
    assert (await anns_store.find_response("ann", "resp_2")).item == failed
    assert (await anns_store.find_response("ann", "resp_1")).item.status is Status.COMPLETED


# Turns that were accepted before


async def test_an_accepted_turn_becomes_a_branch_if_the_leaf_has_changed(anns_store: Conversations) -> None:
    late = Place("resp_1", "resp_1")
    await go_on(anns_store, "conv_1", message("msg_2"), reply("resp_2", "first"))
    await anns_store.begin_turn(
        "ann", "conv_1", late, [message("msg_3", "Late")], reply("resp_3", "kept"), accepted=True
    )
    assert await leaf(anns_store) == "resp_2"
    found = await anns_store.path_of_response("ann", "resp_3")
    assert contents_of(found.items) == ["Be brief.", "How are you?", "Well.", "Late", "kept"]


async def test_an_accepted_turn_that_is_there_already_only_updates_its_reply(anns_store: Conversations) -> None:
    turn = ("ann", "conv_1", Place("resp_1", "resp_1"), [message("msg_2")])
    await anns_store.begin_turn(*turn, growing("resp_2"))
    await go_on_later(anns_store)
    for text in ("a", "ab"):
        await anns_store.begin_turn(*turn, reply("resp_2", text), accepted=True)
    assert await contents(anns_store, "conv_1") == ["Be brief.", "How are you?", "Well.", "Hi", "ab", "Later", "b"]


async def go_on_later(store: Conversations) -> None:
    """Add a turn behind resp_2, which then has ended."""
    await store.update_replies([reply("resp_2", "a")])
    await go_on(store, "conv_1", message("msg_3", "Later"), reply("resp_3", "b"))


async def test_an_accepted_turn_is_stored_although_a_limit_is_reached(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables, limits=StorageLimits(conversations=1, bytes=10))
    for number in (1, 2):
        turn = ([message(f"msg_{number}", "x" * 100)], reply(f"resp_{number}"))
        await store.begin_turn("ann", f"conv_{number}", Place(new=True), *turn, accepted=True)
    assert await count(empty_tables, conversations_table) == 2


# Trees that are not listed


async def test_trees_that_are_not_listed_expire_after_their_last_use(
    anns_store: Conversations, empty_tables: AsyncEngine
) -> None:
    for number in range(2, 6):
        item = growing(f"resp_{number}") if number == 5 else reply(f"resp_{number}")
        await begin(anns_store, f"conv_{number}", message(f"msg_{number}"), item, listed=False)
    old = time.time() - UNLISTED_SECONDS
    await set_updated(
        empty_tables, {"conv_1": 1.0, "conv_2": old - 60, "conv_3": old + 60, "conv_4": 1.0, "conv_5": 1.0}
    )
    await fork(anns_store, "conv_4", "resp_4", message("msg_9"), reply("resp_9"))
    assert await anns_store.delete_expired() == 1
    there = [await is_there(anns_store, f"resp_{number}") for number in range(1, 6)]
    assert there == [True, False, True, True, True], "listed, expired, young, used, and in progress"
    assert await anns_store.delete_expired() == 0


async def test_many_trees_can_expire_at_once(store: Conversations, empty_tables: AsyncEngine) -> None:
    rows = [{"id": f"c{n}", "user_id": "ann", "title": "", "created": 1.0, "updated": 1.0} for n in range(250)]
    async with empty_tables.begin() as connection:
        await connection.execute(conversations_table.insert(), [row | {"bytes": 0, "listed": False} for row in rows])
    assert await store.delete_expired() == 250
    assert await count(empty_tables, conversations_table) == 0


@asynccontextmanager
async def three_trees(engine: AsyncEngine, **limits: int) -> AsyncIterator[Conversations]:
    """A store with little room, a listed conversation and two older trees that are not listed, of 100 bytes each."""
    store = Conversations(engine, limits=StorageLimits(**limits))
    for number, listed in enumerate((True, False, False)):
        question = message(f"msg_{number}", "x" * 98)
        await begin(store, f"conv_{number}", question, reply(f"resp_{number}"), listed=listed)
    await set_updated(engine, {"conv_0": 1.0, "conv_1": 3.0, "conv_2": 2.0})
    yield store


async def test_the_least_recently_used_tree_makes_room_for_a_new_conversation(empty_tables: AsyncEngine) -> None:
    async with three_trees(empty_tables, conversations=3) as store:
        await begin(store, "conv_3", message("msg_3"), reply("resp_3"))
        assert [await is_there(store, f"resp_{number}") for number in range(4)] == [True, True, False, True]
        await begin(store, "conv_4", message("msg_4"), reply("resp_4"), listed=False)
        assert [await is_there(store, f"resp_{number}") for number in range(5)] == [True, False, False, True, True]
        await store.create("ann")
        assert not await is_there(store, "resp_4")
        with pytest.raises(StorageFullError):
            await store.create("ann")
        with pytest.raises(StorageFullError):
            await begin(store, "conv_5", message("msg_5"), reply("resp_5"), listed=False)


async def test_as_many_trees_as_needed_make_room_for_bytes(empty_tables: AsyncEngine) -> None:
    async with three_trees(empty_tables, bytes=302) as store:
        await begin(store, "conv_3", message("msg_3", "x" * 100), reply("resp_3"))
        assert [await is_there(store, f"resp_{number}") for number in range(4)] == [True, True, False, True]
        with pytest.raises(StorageFullError):
            await begin(store, "conv_4", message("msg_4", "x" * 300), reply("resp_4"))
        assert await is_there(store, "resp_1"), "a turn that is refused deletes nothing"


async def test_trees_of_others_or_in_progress_do_not_make_room(empty_tables: AsyncEngine) -> None:
    store = Conversations(empty_tables, limits=StorageLimits(conversations=1))
    await begin(store, "conv_1", growing("resp_1"), listed=False)
    await begin(store, "conv_2", reply("resp_2"), listed=False, user="bob")
    with pytest.raises(StorageFullError):
        await begin(store, "conv_3", growing("resp_3"), listed=False)
    assert await count(empty_tables, conversations_table) == 2


async def test_a_tree_that_is_not_listed_has_the_limits_of_a_conversation(store: Conversations) -> None:
    await begin(store, "conv_1", message("msg_1"), reply("resp_1"), listed=False)
    with pytest.raises(ConversationFullError):
        await fork(store, "conv_1", "resp_1", message("msg_2", "x" * MAX_CONVERSATION_BYTES), reply("resp_2"))
    assert not await is_there(store, "resp_2")
