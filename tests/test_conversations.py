from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from models import database
from models.conversations import Conversation, ConversationNotFound, Conversations, Document
from models.database import conversations_table, items_table
from models.item import Item
from models.listing import QUERY_CHARACTERS, Listing
from models.refused import InvalidValue
from models.settings import Settings

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.databases"]

SYSTEM = Item("item_0", "system", "Be brief.", 1.25)
QUESTION = Item("item_1", "user", "How are you?", 1700000000.123456)
ANSWER = Item("resp_1", "assistant", "Well.", 1700000000.2, "completed", "stop", {"total_tokens": 9}, {}, 0, "2 3", 0.5)
GROWING = Item("resp_2", "assistant", "", 1700000000.3, "in_progress", None, {"total_tokens": 0}, {}, 0, "", 0.0)

ALL = Listing(100, None, "")


@pytest.fixture
async def engine(empty_database: Settings) -> AsyncIterator[AsyncEngine]:
    async with database.opened(empty_database) as engine:
        yield engine


@pytest.fixture
def store(engine: AsyncEngine) -> Conversations:
    return Conversations(engine)


@pytest.fixture
async def anns(store: Conversations) -> Conversations:
    """The conversations, with conv_1 of ann's."""
    await store.add("ann", "conv_1", 0, [SYSTEM, QUESTION, ANSWER])
    return store


def said(id: str, content: str) -> Item:
    return Item(id, "user", content, 1.0)


async def listed(
    store: Conversations, user: str = "ann", limit: int = 100, after: str | None = None, query: str = ""
) -> list[str]:
    """The ids of a listing."""
    found, _ = await store.latest(user, Listing(limit, after, query))
    return [conversation.id for conversation in found]


async def everything(store: Conversations, user: str, id: str) -> tuple[Conversation, list[Item]]:
    return await store.find(user, id), await store.items(user, id)


async def set_times(engine: AsyncEngine, updated: dict[str, float]) -> None:
    """Have conversations been last added to at some times."""
    async with engine.begin() as connection:
        for id, time in updated.items():
            change = update(conversations_table).where(conversations_table.c.id == id).values(updated=time)
            await connection.execute(change)


# What is added


async def test_a_conversation_begins_with_the_first_items(store: Conversations) -> None:
    await store.add("ann", "conv_1", 0, [QUESTION, GROWING])
    conversation, items = await everything(store, "ann", "conv_1")
    assert items == [QUESTION, GROWING]
    assert (conversation.id, conversation.title) == ("conv_1", "How are you?")
    assert conversation.created == conversation.updated
    assert await store.latest("ann", ALL) == ([conversation], False)


async def test_items_stay_in_the_order_they_were_added_in(store: Conversations) -> None:
    items = [said(f"item_{(place * 7) % 20}", str(place)) for place in range(20)]
    for place in range(0, 20, 4):
        await store.add("ann", "conv_1", place, items[place : place + 4])
    assert await store.items("ann", "conv_1") == items


@pytest.mark.parametrize(
    "item",
    [
        SYSTEM,
        ANSWER,
        GROWING,
        replace(ANSWER, status="failed", reason="server_error", usage=None, options=None, left_out=None, cuts=None),
        replace(ANSWER, usage={"input_tokens": 2**40}, left_out=2**31 - 1, decode_seconds=1e-300, created=0.1 + 0.2),
        replace(
            ANSWER, options={"instructions": "é\0\u2028\"'\\", "temperature": 0.1, "stop": ["a", ""], "seed": None}
        ),
        replace(ANSWER, content="👩\u200d👩\u200d👧 广州 \ufeff\u202e\r\n\t\U0010ffff\x01 e\u0301 é", cuts="30 4"),
        replace(ANSWER, content="x" * 2**20, cuts=None),
    ],
    ids=["message", "reply", "growing reply", "nulls", "numbers", "options", "unicode", "a megabyte"],
)
async def test_an_item_comes_back_as_it_went_in(store: Conversations, item: Item) -> None:
    await store.add("ann", "conv_1", 0, [item])
    assert await store.items("ann", "conv_1") == [item]


async def test_a_reply_of_thousands_of_deltas_comes_back_in_the_same_ones(store: Conversations) -> None:
    deltas = [("广 a", "👩\u200d👧", "\n", "word ")[place % 4] for place in range(5000)]
    reply = replace(GROWING, content="".join(deltas), cuts=" ".join(str(len(delta)) for delta in deltas))
    await store.add("ann", "conv_1", 0, [GROWING])
    await store.write([reply])
    _, found = await store.reply("ann", "resp_2") or ("", GROWING)
    assert found.deltas == deltas
    assert found.sequence_number == 5000


async def test_a_nul_is_kept_as_a_mark_and_cuts_stay_right(store: Conversations) -> None:
    await store.add("ann", "conv_1", 0, [replace(ANSWER, content="a\0b\0c", cuts="2 3")])
    assert (await store.items("ann", "conv_1"))[0].deltas == ["a\ufffd", "b\ufffdc"]


@pytest.mark.parametrize("position", range(5))
async def test_items_added_at_a_position_take_the_place_of_what_is_there_and_behind(
    store: Conversations, position: int
) -> None:
    before = [said(f"item_{place}", str(place)) for place in range(4)]
    await store.add("ann", "conv_1", 0, before)
    await store.add("ann", "conv_2", 0, other := [said(f"item_{place}", "of another") for place in range(10, 14)])
    await store.add("ann", "conv_1", position, [said("item_8", "new"), said("item_9", "newer")])
    assert await store.items("ann", "conv_1") == [*before[:position], said("item_8", "new"), said("item_9", "newer")]
    assert await store.items("ann", "conv_2") == other


async def test_what_is_added_later_changes_neither_title_nor_beginning_but_when_it_was(
    anns: Conversations, engine: AsyncEngine
) -> None:
    before = await anns.find("ann", "conv_1")
    await set_times(engine, {"conv_1": 5.0})
    await anns.add("ann", "conv_1", 0, [said("item_9", "Something else")])
    after = await anns.find("ann", "conv_1")
    assert replace(after, updated=before.updated) == before
    assert after.updated > 5.0


async def test_conversations_that_begin_at_once_are_all_kept(store: Conversations) -> None:
    ids = [f"conv_{number}" for number in range(10)]
    await asyncio.gather(*(store.add("ann", id, 0, [said(f"item_{id}", id)]) for id in ids))
    assert sorted(await listed(store)) == ids
    assert [await store.items("ann", id) for id in ids] == [[said(f"item_{id}", id)] for id in ids]


def test_each_new_id_is_one_of_its_own() -> None:
    ids = {Conversations.new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(id.startswith("conv_") and len(id) == 37 for id in ids)


# What is not there

NOT_ANNS = [
    ("bob", "conv_1"),
    ("ANN", "conv_1"),
    ("", "conv_1"),
    ("ann\0", "conv_1"),
    ("ann", "conv_9"),
    ("ann", "CONV_1"),
    ("ann", "conv%1"),
    ("ann", "resp_1"),
    ("ann", ""),
    ("ann", "\0"),
    ("ann", "conv_1\0"),
    ("ann", "' OR 1=1 --"),
    ("ann", "x" * 100_000),
]


FINDING: list[Callable[[Conversations, str, str], Awaitable[Any]]] = [
    Conversations.find,
    Conversations.delete,
    lambda store, user, id: store.rename(user, id, "Stolen"),
    lambda store, user, id: store.latest(user, Listing(100, id, "")),
]


@pytest.mark.parametrize(("user", "id"), NOT_ANNS, ids=[ascii(pair)[:40] for pair in NOT_ANNS])
async def test_a_conversation_that_is_not_there_or_somebody_elses_is_not_found_and_not_changed(
    anns: Conversations, user: str, id: str
) -> None:
    before = await everything(anns, "ann", "conv_1")
    for act in FINDING:
        with pytest.raises(ConversationNotFound, match="there is no such conversation") as raised:
            await act(anns, user, id)
        assert (raised.value.type, raised.value.code) == ("invalid_request_error", "conversation_not_found")
    assert await anns.items(user, id) == []
    assert await everything(anns, "ann", "conv_1") == before
    assert await listed(anns) == ["conv_1"]


@pytest.mark.parametrize(
    ("user", "id"),
    [("bob", "resp_1"), ("ann", "resp_9"), ("ann", "item_1"), ("ann", "conv_1"), ("ann", "\0"), ("ann", "resp_1\0")],
)
async def test_what_is_no_reply_or_somebody_elses_is_not_found(anns: Conversations, user: str, id: str) -> None:
    assert await anns.reply(user, id) is None
    assert await anns.reply("ann", "resp_1") == ("conv_1", ANSWER)


async def test_nothing_can_be_added_to_somebody_elses_conversation(anns: Conversations) -> None:
    before = await everything(anns, "ann", "conv_1")
    with pytest.raises(ConversationNotFound):
        await anns.add("bob", "conv_1", 1, [said("item_9", "I was here")])
    with pytest.raises(IntegrityError):
        await anns.add("bob", "conv_1", 0, [said("item_9", "I was here")])
    assert await everything(anns, "ann", "conv_1") == before
    assert await listed(anns, "bob") == []


async def test_each_user_has_a_list_of_ones_own(anns: Conversations) -> None:
    await anns.add("bob", "conv_2", 0, [said("item_2", "How are you?")])
    assert [await listed(anns, user) for user in ("ann", "bob", "eve")] == [["conv_1"], ["conv_2"], []]
    assert await listed(anns, "bob", query="Well") == []
    assert await listed(anns, "bob", query="how") == ["conv_2"]


# What is changed


async def test_a_new_title_is_all_that_a_renamed_conversation_has_anew(
    anns: Conversations, engine: AsyncEngine
) -> None:
    await anns.add("ann", "conv_2", 0, [said("item_2", "Another")])
    await set_times(engine, {"conv_1": 5.0})
    before = await everything(anns, "ann", "conv_2")
    renamed = await anns.rename("ann", "conv_1", "广州 👩\u200d👧\0")
    first, items = await everything(anns, "ann", "conv_1")
    assert renamed == first == Conversation("conv_1", "广州 👩\u200d👧\ufffd", first.created, 5.0)
    assert items == [SYSTEM, QUESTION, ANSWER]
    assert await everything(anns, "ann", "conv_2") == before


async def test_a_deleted_conversation_is_gone_with_all_that_was_said_and_others_stay(
    anns: Conversations, engine: AsyncEngine
) -> None:
    await anns.add("ann", "conv_2", 0, [said("item_2", "Stays"), GROWING])
    await anns.add("bob", "conv_3", 0, [said("item_3", "Stays too")])
    kept = [await everything(anns, "ann", "conv_2"), await everything(anns, "bob", "conv_3")]
    await anns.delete("ann", "conv_1")
    assert await listed(anns) == ["conv_2"]
    assert await anns.items("ann", "conv_1") == []
    assert await anns.reply("ann", "resp_1") is None
    with pytest.raises(ConversationNotFound):
        await anns.delete("ann", "conv_1")
    assert [await everything(anns, "ann", "conv_2"), await everything(anns, "bob", "conv_3")] == kept
    async with engine.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(items_table))).scalar() == 3


async def test_what_replies_have_come_to_is_written_over_what_they_were(anns: Conversations) -> None:
    await anns.add("ann", "conv_1", 3, [said("item_2", "And you?"), GROWING])
    await anns.add("bob", "conv_2", 0, [other := replace(GROWING, id="resp_3")])
    half = replace(GROWING, content="I am", cuts="2 2", decode_seconds=0.1)
    await anns.write([half])
    assert await anns.items("ann", "conv_1") == [SYSTEM, QUESTION, ANSWER, said("item_2", "And you?"), half]
    assert await anns.items("bob", "conv_2") == [other]
    done = replace(half, content="I am.", cuts="2 2 1", status="completed", reason="stop", usage={"total_tokens": 12})
    ended = replace(other, status="cancelled", reason="client_cancelled")
    await anns.write(iter([done, ended]))
    assert await anns.reply("ann", "resp_2") == ("conv_1", done)
    assert await anns.reply("bob", "resp_3") == ("conv_2", ended)


async def test_writing_of_no_replies_changes_nothing(anns: Conversations) -> None:
    await anns.write([])
    assert await anns.items("ann", "conv_1") == [SYSTEM, QUESTION, ANSWER]


async def test_replies_that_were_deleted_or_replaced_stay_so_when_they_are_written(anns: Conversations) -> None:
    await anns.add("ann", "conv_1", 3, [GROWING])
    await anns.add("ann", "conv_2", 0, [deleted := replace(GROWING, id="resp_3")])
    await anns.add("ann", "conv_1", 3, [said("item_9", "Instead")])
    await anns.delete("ann", "conv_2")
    done = replace(ANSWER, content="Done.")
    await anns.write([replace(GROWING, content="Back"), replace(deleted, content="Back"), done])
    assert await anns.items("ann", "conv_1") == [SYSTEM, QUESTION, done, said("item_9", "Instead")]
    assert await anns.reply("ann", "resp_2") is None
    assert await anns.reply("ann", "resp_3") is None
    assert await listed(anns) == ["conv_1"]


async def test_replies_that_were_being_made_are_ended_as_failed_with_what_there_is_of_them(anns: Conversations) -> None:
    half = replace(GROWING, content="I am", cuts="2 2")
    other = replace(GROWING, id="resp_3")
    await anns.add("ann", "conv_1", 3, [half])
    await anns.add("bob", "conv_2", 0, [other])
    assert await anns.end_unfinished() == 2
    failed = replace(half, status="failed", reason="server_error")
    assert await anns.items("ann", "conv_1") == [SYSTEM, QUESTION, ANSWER, failed]
    assert await anns.items("bob", "conv_2") == [replace(other, status="failed", reason="server_error")]
    assert await anns.end_unfinished() == 0


# The list


@pytest.fixture
async def many(store: Conversations, engine: AsyncEngine) -> list[str]:
    """The ids of ann's conversations, the latest first; among the same time's by id. Bob's stand between them."""
    times = {f"conv_{letter}": float(place // 3) for place, letter in enumerate("gcaeibdfh")}
    for id in times:
        await store.add("ann", id, 0, [said(f"item_{id}", f"Title of {id}"), said(f"more_{id}", "title, once more")])
        await store.add("bob", f"{id}_bobs", 0, [said(f"bobs_{id}", "Title of bob's")])
    await set_times(engine, times | {f"{id}_bobs": time for id, time in times.items()})
    return sorted(times, key=lambda id: (times[id], id), reverse=True)


async def test_the_latest_conversation_comes_first_and_ids_decide_between_equals(
    store: Conversations, many: list[str]
) -> None:
    assert many == [f"conv_{letter}" for letter in "hfdiebgca"]
    assert await listed(store) == many


@pytest.mark.parametrize("query", ["", "title"])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 8, 9, 10, 100])
async def test_pages_in_turn_hold_each_conversation_once_and_the_last_one_says_so(
    store: Conversations, many: list[str], limit: int, query: str
) -> None:
    after, seen = None, list[str]()
    for start in range(0, len(many), limit):
        page, has_more = await store.latest("ann", Listing(limit, after, query))
        seen += [conversation.id for conversation in page]
        assert seen == many[: start + limit]
        assert has_more == (len(seen) < len(many))
        after = seen[-1]
    assert await store.latest("ann", Listing(limit, after, query)) == ([], False)


async def test_a_conversation_that_is_added_to_comes_first(store: Conversations, many: list[str]) -> None:
    last = many[-1]
    await store.add("ann", last, 2, [said("item_9", "Again")])
    assert await listed(store) == [last, *many[:-1]]


async def test_a_listing_begins_behind_a_conversation_that_the_query_is_not_in(
    store: Conversations, many: list[str]
) -> None:
    await store.rename("ann", many[5], "Unlike the others")
    await store.add("ann", many[5], 0, [said("item_9", "Nothing of the kind")])
    assert await listed(store, query="title") == [*many[:5], *many[6:]]
    assert await listed(store, query="title", after=many[5]) == many[:5] + many[6:]  # it is the latest now


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
async def test_a_query_is_looked_for_in_titles_and_in_what_was_said_whatever_its_case(
    store: Conversations, query: str, found: bool
) -> None:
    answer = replace(ANSWER, content="Sunny, 30 degrees in 广州 👩\u200d👧")
    await store.add("ann", "conv_1", 0, [SYSTEM, said("item_1", "Hello"), answer])
    await store.rename("ann", "conv_1", "Weather in Guangzhou")
    await store.add("ann", "conv_2", 0, [said("item_2", "Something else")])
    assert await listed(store, query=query) == ["conv_1"] * found


@pytest.mark.parametrize("sign", ["%", "_", "\\", "/", "'", '"', "[a]", "*", "?", "^", "\\%", "/_", "\\\\", "%%", "--"])
async def test_signs_in_a_query_mean_nothing_but_themselves(store: Conversations, sign: str) -> None:
    await store.add("ann", "conv_1", 0, [said("item_1", f"before{sign}after")])
    await store.add("ann", "conv_2", 0, [said("item_2", "Hello"), said("item_3", f"said {sign}")])
    await store.rename("ann", "conv_2", "A title")
    await store.add("ann", "conv_3", 0, [said("item_4", "before or after, a, b"), said("item_5", "beforexafter")])
    assert sorted(await listed(store, query=sign)) == ["conv_1", "conv_2"]
    assert await listed(store, query=f"before{sign}after") == ["conv_1"]


async def test_a_query_with_a_nul_finds_what_was_said_with_one_and_nothing_else(anns: Conversations) -> None:
    await anns.add("ann", "conv_2", 0, [said("item_2", "with\0nul")])
    assert await listed(anns, query="h\0n") == ["conv_2"]
    assert await listed(anns, query="\0\0") == []


async def test_a_query_finds_words_that_were_dropped_no_more(anns: Conversations) -> None:
    await anns.rename("ann", "conv_1", "A title")
    assert await listed(anns, query="how are you") == ["conv_1"]
    await anns.add("ann", "conv_1", 1, [said("item_9", "Instead")])
    assert await listed(anns, query="how are you") == []


@pytest.mark.parametrize("sign", ["x", "%", "\U0010ffff"])
async def test_a_query_as_long_as_one_may_be_is_looked_for(store: Conversations, sign: str) -> None:
    await store.add("ann", "conv_1", 0, [said("item_1", f"It is {sign * QUERY_CHARACTERS}.")])
    await store.add("ann", "conv_2", 0, [said("item_2", f"It is {sign * (QUERY_CHARACTERS - 1)}.")])
    assert await listed(store, query=sign * QUERY_CHARACTERS) == ["conv_1"]


# What is taken away

CONVERSATION = Conversation("conv_1", "Über 广州", 1.5, 2.5)


def test_the_public_form_has_the_conversation_and_its_items_in_order() -> None:
    public = CONVERSATION.public([QUESTION, ANSWER])
    assert public == {
        "id": "conv_1",
        "title": "Über 广州",
        "created": 1.5,
        "updated": 2.5,
        "items": [QUESTION.public(), ANSWER.public()],
    }


def test_a_json_document_is_the_public_form_and_can_be_read_without_escapes() -> None:
    name, media_type, text = CONVERSATION.document([QUESTION, ANSWER], "json")
    assert (name, media_type) == ("conv_1.json", "application/json")
    assert json.loads(text) == CONVERSATION.public([QUESTION, ANSWER])
    assert '"title": "Über 广州"' in text


def test_a_markdown_document_has_the_title_and_who_said_what() -> None:
    assert CONVERSATION.document([SYSTEM, QUESTION, replace(ANSWER, content="**Well.**\n\n- 好")], "markdown") == (
        Document(
            "conv_1.md",
            "text/markdown",
            "# Über 广州\n\n"
            "**System**\n\nBe brief.\n\n"
            "**User**\n\nHow are you?\n\n"
            "**Assistant**\n\n**Well.**\n\n- 好\n",
        )
    )


def test_a_document_of_nothing_said_is_the_title() -> None:
    assert CONVERSATION.document([], "markdown").text == "# Über 广州\n"


@pytest.mark.parametrize("format", ["", "md", "JSON", "html", "markdown "])
def test_another_format_is_refused_by_name(format: str) -> None:
    with pytest.raises(InvalidValue, match="format must be markdown or json") as raised:
        CONVERSATION.document([QUESTION], format)
    assert (raised.value.code, raised.value.param) == ("invalid_value", "format")
