from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from models.store.buffered_replies import REPLY_BYTES, BufferedReplies, BufferedReply
from models.store.conversations import Conversations
from models.store.item import Item, Status


def message(id: str, content: str = "hello") -> Item:
    return Item(id, "user", content, 1.0)


def reply(id: str, content: str = "hi", status: Status = Status.COMPLETED, **fields: Any) -> Item:
    return Item(id, "assistant", content, 1.0, status, cuts=str(len(content)), **fields)


def finished(id: str, conversation: str | None = None, user: str = "ann") -> BufferedReply:
    """A reply whose input is in the database."""
    return BufferedReply(user, conversation, reply(id))


def unwritten(id: str, conversation: str, position: int, content: str = "hello") -> BufferedReply:
    """An empty reply whose input is not in the database either."""
    return BufferedReply("ann", conversation, reply(id, "", Status.IN_PROGRESS), [message(f"m{id}", content)], position)


def ids(buffered: Iterable[BufferedReply]) -> list[str]:
    return [one.reply.id for one in buffered]


def found(replies: BufferedReplies, *ids: str) -> list[str]:
    """Those of the ids that are found."""
    return [id for id in ids if replies.find("ann", id)]


# One reply


def test_a_reply_with_a_position_replaces_all_items_from_there() -> None:
    before = [message("m1"), reply("r1"), message("m2"), reply("r2")]
    assert [item.id for item in unwritten("r3", "conv", 2).applied_to(before)] == ["m1", "r1", "mr3", "r3"]
    assert [item.id for item in unwritten("r3", "conv", 0).applied_to([])] == ["mr3", "r3"]


def test_a_reply_without_a_position_replaces_its_earlier_state() -> None:
    before = [message("m1"), reply("r1", "h", Status.IN_PROGRESS), message("m2")]
    after = finished("r1", "conv").applied_to(before)
    assert [(item.id, item.content) for item in after] == [("m1", "hello"), ("r1", "hi"), ("m2", "hello")]
    assert finished("r9", "conv").applied_to(before) == before


@pytest.mark.parametrize("character", ["x", "州", "🙂"])
def test_the_size_of_a_reply_covers_its_text(character: str) -> None:
    content = character * 100_000
    size = len(content.encode())
    assert BufferedReply("ann", None, reply("r1", content)).bytes >= REPLY_BYTES + size * 2 // 3
    assert unwritten("r1", "conv", 0, content).bytes >= REPLY_BYTES + len(content)


def test_the_size_of_a_reply_covers_its_options() -> None:
    options = {"instructions": "x" * 100_000}
    assert replace(unwritten("r1", "conv", 0), reply=reply("r1", options=options)).bytes > 100_000


@pytest.mark.anyio
async def test_a_reply_is_written_with_its_input_at_its_position(conversations: Conversations) -> None:
    await conversations.put_items("ann", "conv", 0, [message("m1"), reply("r1"), message("m2")])
    await unwritten("r2", "conv", 2).write_to(conversations)
    assert [item.id for item in await conversations.items("ann", "conv")] == ["m1", "r1", "mr2", "r2"]


# All replies


def test_only_its_user_finds_a_reply_until_it_is_dropped() -> None:
    replies = BufferedReplies(10_000)
    replies.keep(finished("r1", "conv"))
    assert replies.find("ann", "r1") == ("conv", reply("r1"))
    assert replies.find("bob", "r1") is None
    assert replies.find("ann", "r2") is None
    replies.drop("r1")
    replies.drop("r1")
    assert replies.find("ann", "r1") is None


def test_a_later_state_keeps_the_input_and_the_position_of_an_earlier_one() -> None:
    replies = BufferedReplies(10_000)
    replies.keep(unwritten("r1", "conv", 4))
    replies.keep(finished("r1", "conv"))
    (one,) = replies.unwritten
    assert (one.reply.content, one.position, [item.id for item in one.input]) == ("hi", 4, ["mr1"])


def test_options_are_kept_only_while_the_database_lacks_the_whole_reply() -> None:
    replies = BufferedReplies(10_000)
    replies.keep(replace(unwritten("r1", "conv", 0), reply=reply("r1", options={"seed": 1})))
    replies.keep(BufferedReply("ann", "conv", reply("r2", options={"seed": 2})))
    assert [one.reply.options for one in replies.unwritten] == [{"seed": 1}, None]


def test_the_unwritten_replies_of_a_conversation_come_in_order() -> None:
    replies = BufferedReplies(100_000)
    for one in (
        unwritten("r1", "conv", 0),
        unwritten("r2", "other", 0),
        finished("r1", "conv"),
        finished("r3", "conv", user="bob"),
        finished("r4"),
        unwritten("r5", "conv", 2),
    ):
        replies.keep(one)
    assert ids(replies.unwritten_of("ann", "conv")) == ["r1", "r5"]
    assert ids(replies.unwritten_of("bob", "conv")) == ["r3"]
    assert ids(replies.unwritten_of("ann", None)) == []
    assert {*ids(replies.unwritten)} == {"r1", "r2", "r3", "r5"}, "a reply of no conversation is never written"


def test_a_written_reply_is_dropped_unless_it_has_changed_since() -> None:
    replies = BufferedReplies(10_000)
    replies.keep(unwritten("r1", "conv", 0))
    (written,) = replies.unwritten
    replies.keep(finished("r1", "conv"))
    replies.drop_written(written)
    assert found(replies, "r1") == ["r1"]
    replies.drop_written(replies.unwritten[0])
    assert found(replies, "r1") == []
    replies.drop_written(written)


def test_the_oldest_replies_are_dropped_when_there_is_no_room() -> None:
    replies = BufferedReplies(3 * finished("r1").bytes)
    lost = [replies.keep(finished(f"r{number}")) for number in range(5)]
    assert found(replies, "r0", "r1", "r2", "r3", "r4") == ["r2", "r3", "r4"]
    assert lost == [[]] * 5, "replies of no conversation did not have to be written"


def test_dropped_replies_that_had_to_be_written_are_reported_as_lost() -> None:
    replies = BufferedReplies(2 * unwritten("r0", "conv0", 0).bytes)
    assert [replies.keep(unwritten(f"r{number}", f"conv{number}", 0)) for number in range(4)] == [
        *([], [], ["r0"], ["r1"])
    ]


def test_replies_of_no_conversation_are_dropped_before_those_that_have_to_be_written() -> None:
    replies = BufferedReplies(unwritten("r0", "conv", 0).bytes + 2 * finished("r1").bytes)
    lost = replies.keep(unwritten("r0", "conv", 0))
    for number in range(1, 5):
        lost += replies.keep(finished(f"r{number}"))
    assert (found(replies, "r0", "r1", "r2", "r3", "r4"), lost) == (["r0", "r3", "r4"], [])


def test_a_reply_behind_a_lost_one_moves_to_its_position() -> None:
    replies = BufferedReplies(2 * unwritten("r1", "conv", 0).bytes)
    for one in (unwritten("r1", "conv", 2), unwritten("r2", "conv", 4), unwritten("r3", "conv", 6)):
        replies.keep(one)
    assert [(one.reply.id, one.position) for one in replies.unwritten] == [("r2", 2), ("r3", 4)]


def test_dropped_and_replaced_replies_take_no_room() -> None:
    replies = BufferedReplies(2 * finished("r1").bytes)
    for number in range(100):
        replies.keep(finished(f"r{number}"))
        replies.keep(finished(f"r{number}"))
        if number % 2:
            replies.drop(f"r{number}")
            replies.drop(f"r{number}")
    for id in ("a", "b"):
        replies.keep(finished(id))
    assert found(replies, "a", "b") == ["a", "b"]


def test_a_reply_that_is_too_large_is_not_kept_and_takes_no_room() -> None:
    replies = BufferedReplies(10_000)
    replies.keep(finished("r1"))
    replies.keep(BufferedReply("ann", None, reply("r2", "x" * 20_000)))
    assert found(replies, "r1", "r2") == []
    replies.keep(finished("r3"))
    assert found(replies, "r3") == ["r3"]


def test_without_room_no_reply_is_kept() -> None:
    replies = BufferedReplies(0)
    assert replies.keep(finished("r1", "conv")) == ["r1"]
    assert replies.unwritten == []
