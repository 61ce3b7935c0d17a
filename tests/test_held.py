from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from models.conversations import Conversations
from models.held import REPLY_BYTES, Held, HeldReplies
from models.item import Item


def message(id: str, content: str = "hello") -> Item:
    return Item(id, "user", content, 1.0)


def reply(id: str, content: str = "hi", status: Any = "completed", **fields: Any) -> Item:
    return Item(id, "assistant", content, 1.0, status, cuts=str(len(content)), **fields)


def held(id: str, conversation: str | None = None, user: str = "ann", **fields: Any) -> Held:
    return Held(user, conversation, reply(id), **fields)


def begun(id: str, conversation: str, position: int, content: str = "hello") -> Held:
    """A reply of which nothing is in the database, not even what it answers."""
    return Held("ann", conversation, reply(id, "", "in_progress"), [message(f"m{id}", content)], position)


def ids(all: Sequence[Held]) -> list[str]:
    return [one.reply.id for one in all]


def found(replies: HeldReplies, *wanted: str) -> list[str]:
    return [id for id in wanted if replies.find("ann", id)]


# One of them


def test_what_has_a_position_comes_after_what_stands_before_that() -> None:
    before = [message("m1"), reply("r1"), message("m2"), reply("r2")]
    one = begun("r3", "conv", 2)
    assert [item.id for item in one.after(before)] == ["m1", "r1", "mr3", "r3"]
    assert [item.id for item in begun("r3", "conv", 0).after([])] == ["mr3", "r3"]


def test_what_has_none_takes_the_place_of_its_earlier_state() -> None:
    before = [message("m1"), reply("r1", "h", "in_progress"), message("m2")]
    after = held("r1", "conv").after(before)
    assert [(item.id, item.content) for item in after] == [("m1", "hello"), ("r1", "hi"), ("m2", "hello")]
    assert held("r9", "conv").after(before) == before


@pytest.mark.parametrize("content", ["x" * 100_000, "州" * 100_000, "🙂" * 100_000])
def test_its_bytes_are_no_fewer_than_those_of_its_text(content: str) -> None:
    assert Held("ann", None, reply("r1", content)).bytes >= REPLY_BYTES + len(content.encode("utf-8")) * 2 // 3
    assert begun("r1", "conv", 0, content).bytes >= REPLY_BYTES + len(content)


def test_its_options_count_where_they_are_kept() -> None:
    large = replace(begun("r1", "conv", 0), reply=reply("r1", options={"instructions": "x" * 100_000}))
    assert large.bytes > 100_000


@pytest.mark.anyio
async def test_it_is_added_at_its_position_with_what_was_said(conversations: Conversations) -> None:
    await conversations.add("ann", "conv", 0, [message("m1"), reply("r1"), message("m2")])
    await begun("r2", "conv", 2).add_to(conversations)
    assert [item.id for item in await conversations.items("ann", "conv")] == ["m1", "r1", "mr2", "r2"]


# All of them


def test_a_reply_is_found_by_its_user_until_it_is_dropped() -> None:
    replies = HeldReplies(10_000)
    replies.hold(held("r1", "conv"))
    assert replies.find("ann", "r1") == ("conv", reply("r1"))
    assert replies.find("bob", "r1") is None
    assert replies.find("ann", "r2") is None
    replies.drop("r1")
    replies.drop("r1")
    assert replies.find("ann", "r1") is None


def test_a_later_state_takes_the_place_of_an_earlier_one_and_knows_what_was_said() -> None:
    replies = HeldReplies(10_000)
    replies.hold(begun("r1", "conv", 4))
    replies.hold(held("r1", "conv"))
    (one,) = replies.unwritten
    assert (one.reply.content, one.position, [item.id for item in one.said]) == ("hi", 4, ["mr1"])


def test_options_are_kept_only_of_a_reply_that_is_not_in_the_database_at_all() -> None:
    replies = HeldReplies(10_000)
    replies.hold(replace(begun("r1", "conv", 0), reply=reply("r1", options={"seed": 1})))
    replies.hold(Held("ann", "conv", reply("r2", options={"seed": 2})))
    assert [one.reply.options for one in replies.unwritten] == [{"seed": 1}, None]


def test_what_a_conversation_lacks_is_told_in_order_and_nothing_of_anybody_else() -> None:
    replies = HeldReplies(100_000)
    for one in (
        begun("r1", "conv", 0),
        begun("r2", "other", 0),
        held("r1", "conv"),
        held("r3", "conv", user="bob"),
        held("r4"),
        begun("r5", "conv", 2),
    ):
        replies.hold(one)
    assert ids(replies.missing("ann", "conv")) == ["r1", "r5"]
    assert ids(replies.missing("bob", "conv")) == ["r3"]
    assert ids(replies.missing("ann", None)) == []
    assert {*ids(replies.unwritten)} == {"r1", "r2", "r3", "r5"}, "one of no conversation is never written"


def test_a_reply_that_is_written_is_released_unless_more_has_come_of_it() -> None:
    replies = HeldReplies(10_000)
    first, second = begun("r1", "conv", 0), held("r1", "conv")
    replies.hold(first)
    (written,) = replies.unwritten
    replies.hold(second)
    replies.release(written)
    assert found(replies, "r1") == ["r1"]
    replies.release(replies.unwritten[0])
    assert found(replies, "r1") == []
    replies.release(written)


def test_the_oldest_are_dropped_where_all_take_too_much() -> None:
    room = 3 * held("r1").bytes
    replies = HeldReplies(room)
    for number in range(5):
        replies.hold(held(f"r{number}"))
    assert found(replies, "r0", "r1", "r2", "r3", "r4") == ["r2", "r3", "r4"]


def test_what_was_dropped_or_replaced_takes_no_room() -> None:
    replies = HeldReplies(2 * held("r1").bytes)
    for number in range(100):
        replies.hold(held(f"r{number}"))
        replies.hold(held(f"r{number}"))
        if number % 2:
            replies.drop(f"r{number}")
            replies.drop(f"r{number}")
    for id in ("a", "b"):
        replies.hold(held(id))
    assert found(replies, "a", "b") == ["a", "b"]


def test_one_that_takes_too_much_by_itself_is_not_held_and_leaves_the_room_free() -> None:
    replies = HeldReplies(10_000)
    replies.hold(held("r1"))
    replies.hold(Held("ann", None, reply("r2", "x" * 20_000)))
    assert found(replies, "r1", "r2") == []
    replies.hold(held("r3"))
    assert found(replies, "r3") == ["r3"]


def test_without_room_nothing_is_held() -> None:
    replies = HeldReplies(0)
    replies.hold(held("r1", "conv"))
    assert replies.unwritten == []
