from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from models.messages import ToolCall
from models.output_item import OutputItem, TokenLogprob
from models.store.buffered_replies import REPLY_BYTES, BufferedReplies, BufferedReply, leaf_behind
from models.store.conversations import Conversations
from models.store.place import Place
from tests.support.trees import begin, contents, growing, ids_of, message, reply


def finished(id: str, conversation: str | None = None, user: str = "ann", **fields: Any) -> BufferedReply:
    """A reply that has ended; if it belongs to a conversation, its beginning is in the database."""
    return BufferedReply(user, conversation, reply(id, "hi"), begun=conversation is not None, **fields)


def unwritten(id: str, conversation: str, place: Place, content: str = "hello") -> BufferedReply:
    """A turn that is not in the database: a message and an empty reply."""
    return BufferedReply("ann", conversation, growing(id), [message(f"m{id}", content)], place)


def ids(buffered: Iterable[BufferedReply]) -> list[str]:
    return [one.reply.id for one in buffered]


def found(replies: BufferedReplies, *ids: str) -> list[str]:
    """Those of the ids that are found."""
    return [id for id in ids if replies.find("ann", id)]


NEW = Place(new=True)


# One reply


def test_a_turn_has_its_nodes_below_the_parent_of_its_place() -> None:
    nodes = unwritten("resp_2", "conv", Place("resp_1", "resp_1")).nodes
    assert [(item.id, item.parent) for item in nodes] == [("mresp_2", "resp_1"), ("resp_2", "mresp_2")]


@pytest.mark.parametrize("character", ["x", "州", "🙂"])
def test_the_size_of_a_reply_covers_its_text(character: str) -> None:
    content = character * 100_000
    size = len(content.encode())
    assert BufferedReply("ann", None, reply("resp_1", content)).bytes >= REPLY_BYTES + size * 2 // 3
    assert unwritten("resp_1", "conv", NEW, content).bytes >= REPLY_BYTES + len(content)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"options": {"instructions": "x" * 100_000}}, id="options"),
        pytest.param({"request": {"tools": [{"name": "f", "parameters": {"x" * 100_000: {}}}]}}, id="request"),
        pytest.param({"output": [OutputItem("reasoning", ["x" * 100_000])]}, id="reasoning"),
        pytest.param({"output": [OutputItem("message", ["x"] * 2000)]}, id="pieces"),
        pytest.param(
            {"output": [OutputItem("message", ["x"], logprobs=[[TokenLogprob(b"x", -1.0)] * 1000])]}, id="logprobs"
        ),
    ],
)
def test_the_size_of_a_reply_covers_all_that_it_has(fields: dict[str, Any]) -> None:
    assert BufferedReply("ann", None, replace(reply("resp_1"), **fields)).bytes > 100_000


def test_the_size_of_a_reply_covers_the_calls_in_its_input() -> None:
    calls: list[ToolCall] = [{"id": "call_1", "name": "f", "arguments": "x" * 100_000}]
    assert BufferedReply("ann", None, reply("resp_1"), [replace(message("m"), tool_calls=calls)]).bytes > 100_000


@pytest.mark.anyio
async def test_a_turn_is_written_at_its_place(conversations: Conversations) -> None:
    await begin(conversations, "conv", message("m1", "one"), reply("resp_1", "two"))
    await unwritten("resp_2", "conv", Place("m1", "resp_1"), "three").write_to(conversations)
    assert await contents(conversations, "conv") == ["one", "three", ""]


# The leaf behind turns


def test_the_leaf_moves_with_each_turn_that_has_seen_it() -> None:
    first, second = unwritten("resp_1", "conv", NEW), unwritten("resp_2", "conv", Place("resp_1", "resp_1"))
    assert leaf_behind([first, second], None, False) == ("resp_2", True)
    assert leaf_behind([second], "resp_1", True) == ("resp_2", True)
    assert leaf_behind([second], "resp_3", True) == ("resp_3", True), "the leaf has changed meanwhile"
    assert leaf_behind([finished("resp_1", "conv")], "resp_9", True) == ("resp_9", True)


def test_the_leaf_stays_when_a_turn_does_not_advance_it() -> None:
    branch = unwritten("resp_2", "conv", Place("resp_1", "resp_1", advances=False))
    assert leaf_behind([branch], "resp_1", True) == ("resp_1", True)
    unlisted = unwritten("resp_1", "conv", Place(new=True, listed=False))
    assert leaf_behind([unlisted], None, False) == (None, False)


# All replies


def test_only_its_user_finds_a_reply_until_it_is_dropped() -> None:
    replies = BufferedReplies(10_000)
    replies.keep(finished("resp_1", "conv"))
    assert replies.find("ann", "resp_1") == finished("resp_1", "conv")
    assert replies.find("bob", "resp_1") is None
    assert replies.find("ann", "resp_2") is None
    replies.drop("resp_1")
    replies.drop("resp_1")
    assert replies.find("ann", "resp_1") is None


def test_a_later_state_keeps_the_input_and_the_place_of_an_earlier_one() -> None:
    replies = BufferedReplies(10_000)
    place = Place("resp_0", "resp_0")
    replies.keep(unwritten("resp_1", "conv", place))
    replies.keep(finished("resp_1", "conv"))
    (one,) = replies.unwritten
    assert (one.reply.content, one.place, ids_of(one.input), one.begun) == ("hi", place, ["mresp_1"], False)


def test_the_input_of_a_reply_is_kept_only_while_the_database_lacks_it() -> None:
    replies = BufferedReplies(10_000)
    replies.keep(BufferedReply("ann", "conv", reply("resp_1"), [message("m1")], begun=True))
    replies.keep(BufferedReply("ann", None, reply("resp_2"), [message("m2")]))
    kept = [replies.find("ann", id) for id in ("resp_1", "resp_2")]
    assert [ids_of(one.input) for one in kept if one] == [[], ["m2"]]


def test_the_unwritten_replies_of_a_conversation_come_in_order() -> None:
    replies = BufferedReplies(100_000)
    for one in (
        unwritten("resp_1", "conv", NEW),
        unwritten("resp_2", "other", NEW),
        finished("resp_1", "conv"),
        finished("resp_3", "conv", user="bob"),
        finished("resp_4"),
        unwritten("resp_5", "conv", Place("resp_1", "resp_1")),
    ):
        replies.keep(one)
    assert ids(replies.unwritten_of("ann", "conv")) == ["resp_1", "resp_5"]
    assert ids(replies.unwritten_of("bob", "conv")) == ["resp_3"]
    assert ids(replies.unwritten_of("ann", None)) == []
    assert {*ids(replies.unwritten)} == {"resp_1", "resp_2", "resp_3", "resp_5"}, "one of no conversation is not"


def test_a_walk_goes_back_through_the_turns_in_memory() -> None:
    replies = BufferedReplies(100_000)
    replies.keep(unwritten("resp_2", "conv", Place("resp_1", "resp_1")))
    replies.keep(unwritten("resp_3", "conv", Place("resp_2", "resp_2")))
    replies.keep(unwritten("resp_4", "conv", Place("mresp_2", "resp_3")))

    def walk(node: str | None) -> tuple[list[str], str | None]:
        nodes, last = replies.walk("ann", "conv", node)
        return ids_of(nodes), last

    assert walk("resp_3") == (["mresp_2", "resp_2", "mresp_3", "resp_3"], "resp_1")
    assert walk("mresp_3") == (["mresp_2", "resp_2", "mresp_3"], "resp_1")
    assert walk("resp_4") == (["mresp_2", "mresp_4", "resp_4"], "resp_1")
    assert walk("resp_1") == ([], "resp_1")
    assert walk(None) == ([], None)
    assert replies.walk("bob", "conv", "resp_3") == replies.walk("ann", "other", "resp_3") == ([], "resp_3")


def test_replies_among_items_are_replaced_by_their_latest_state() -> None:
    replies = BufferedReplies(100_000)
    replies.keep(finished("resp_1", "conv"))
    items = [message("m1"), replace(growing("resp_1", "h"), parent="m1"), replace(growing("resp_2"), parent="resp_1")]
    assert replies.latest("ann", items) == [items[0], replace(reply("resp_1", "hi"), parent="m1"), items[2]]
    assert replies.latest("bob", items) == items


def test_a_written_reply_is_dropped_unless_it_has_changed_since() -> None:
    replies = BufferedReplies(10_000)
    replies.keep(unwritten("resp_1", "conv", NEW))
    (written,) = replies.unwritten
    replies.keep(finished("resp_1", "conv"))
    replies.drop_written(written)
    assert found(replies, "resp_1") == ["resp_1"]
    replies.drop_written(replies.unwritten[0])
    assert found(replies, "resp_1") == []
    replies.drop_written(written)


# Room


def test_the_oldest_replies_are_dropped_when_there_is_no_room() -> None:
    replies = BufferedReplies(3 * finished("resp_1").bytes)
    lost = [replies.keep(finished(f"resp_{number}")) for number in range(5)]
    assert found(replies, *(f"resp_{number}" for number in range(5))) == ["resp_2", "resp_3", "resp_4"]
    assert lost == [[]] * 5, "replies of no conversation did not have to be written"


def test_dropped_replies_that_had_to_be_written_are_reported_as_lost() -> None:
    replies = BufferedReplies(2 * unwritten("resp_0", "conv0", NEW).bytes)
    assert [replies.keep(unwritten(f"resp_{number}", f"conv{number}", NEW)) for number in range(4)] == [
        *([], [], ["resp_0"], ["resp_1"])
    ]


def test_replies_of_no_conversation_are_dropped_before_those_that_have_to_be_written() -> None:
    replies = BufferedReplies(unwritten("resp_0", "conv", NEW).bytes + 2 * finished("resp_1").bytes)
    lost = replies.keep(unwritten("resp_0", "conv", NEW))
    for number in range(1, 5):
        lost += replies.keep(finished(f"resp_{number}"))
    kept = found(replies, *(f"resp_{number}" for number in range(5)))
    assert (kept, lost) == (["resp_0", "resp_3", "resp_4"], [])


def places_after_a_loss(*turns: tuple[str, Place]) -> list[tuple[str, Place]]:
    """The places of the later turns of a conversation, after there was no room for the first one."""
    replies = BufferedReplies((len(turns) - 1) * unwritten("resp_1", "conv", NEW).bytes)
    for id, place in turns:
        replies.keep(unwritten(id, "conv", place))
    return [(one.reply.id, one.place) for one in replies.unwritten]


def test_the_turns_that_continue_a_lost_one_take_its_place() -> None:
    turns = [
        ("resp_2", Place("resp_1", "resp_1")),
        ("resp_3", Place("resp_2", "resp_2")),
        ("resp_4", Place("resp_3", "resp_3")),
        ("resp_5", Place("mresp_2", "resp_4")),
    ]
    assert places_after_a_loss(*turns) == [("resp_3", turns[0][1]), turns[2], ("resp_5", Place("resp_1", "resp_4"))]


def test_the_first_turn_after_a_lost_one_begins_what_that_one_began() -> None:
    turns = [("resp_1", NEW), ("resp_2", Place(None, "resp_1")), ("resp_3", Place("resp_2", "resp_2"))]
    assert places_after_a_loss(*turns) == [("resp_2", NEW), turns[2]]


def test_dropped_and_replaced_replies_take_no_room() -> None:
    replies = BufferedReplies(2 * finished("resp_1").bytes)
    for number in range(100):
        replies.keep(finished(f"resp_{number}"))
        replies.keep(finished(f"resp_{number}"))
        if number % 2:
            replies.drop(f"resp_{number}")
            replies.drop(f"resp_{number}")
    for id in ("resp_a", "resp_b"):
        replies.keep(finished(id))
    assert found(replies, "resp_a", "resp_b") == ["resp_a", "resp_b"]


def test_a_reply_that_is_too_large_is_not_kept_and_takes_no_room() -> None:
    replies = BufferedReplies(10_000)
    replies.keep(finished("resp_1"))
    replies.keep(BufferedReply("ann", None, reply("resp_2", "x" * 20_000)))
    assert found(replies, "resp_1", "resp_2") == []
    replies.keep(finished("resp_3"))
    assert found(replies, "resp_3") == ["resp_3"]


def test_without_room_no_reply_is_kept() -> None:
    replies = BufferedReplies(0)
    assert replies.keep(finished("resp_1", "conv")) == ["resp_1"]
    assert replies.unwritten == []
