from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies
from sqlalchemy.ext.asyncio import AsyncEngine

from models.errors import (
    ConversationLockedError,
    ConversationNotFoundError,
    DatabaseUnavailableError,
    ItemNotFoundError,
    NotStoredError,
    ResponseNotFoundError,
)
from models.settings import Settings
from models.store.buffered_replies import BufferedReply
from models.store.conversations import Conversations, Path
from models.store.database import open_database
from models.store.item import Edge, Item, Status, linked
from models.store.place import Place
from models.store.write_buffer import WriteBuffer
from tests.support.stores import AwayConversations
from tests.support.trees import contents_of, growing, message, reply

ROOM = 2**24
NEW = Place(new=True)


@pytest.fixture
async def conversations(settings: Settings) -> AsyncIterator[AwayConversations]:
    async with open_database(settings) as opened:
        yield AwayConversations(opened)


@pytest.fixture
def buffer(conversations: AwayConversations) -> WriteBuffer:
    return WriteBuffer(conversations, ROOM)


def turn(id: str, place: Place = NEW, conversation: str | None = "conv", user: str = "ann", question: str = "") -> Any:
    """A turn that begins: the question `q` and the id unless another one is given, and an empty reply."""
    return BufferedReply(user, conversation, growing(f"resp_{id}"), [message(f"q{id}", question or f"q{id}")], place)


def ended(begun: BufferedReply) -> BufferedReply:
    """The same turn, with the text `a` and the id."""
    id = begun.reply.id
    return replace(begun, reply=reply(id, "a", id.removeprefix("resp_")))


async def next_place(buffer: WriteBuffer, conversation: str = "conv") -> Place:
    """The place behind the leaf of a conversation."""
    path = await buffer.path("ann", conversation)
    return Place(path.leaf, path.leaf, new=not path.exists)


async def add_turn(buffer: WriteBuffer, id: str, place: Place | None = None) -> tuple[bool, bool]:
    """Add a question and its reply to the conversation; whether each was stored at once."""
    begun = turn(id, place or await next_place(buffer))
    return await buffer.begin(begun), await buffer.finish(ended(begun))


async def stored(conversations: Conversations, conversation: str = "conv") -> list[str]:
    """The contents of the current branch in the database."""
    return contents_of((await conversations.path("ann", conversation)).items)


async def visible(buffer: WriteBuffer, after: str | Edge = Edge.END) -> list[str]:
    """The contents of a path, in the database or not."""
    return contents_of((await buffer.path("ann", "conv", after)).items)


async def branch(buffer: WriteBuffer, id: str) -> list[str]:
    """The contents of the path of a response, in the database or not."""
    return contents_of((await buffer.path_of_response("ann", f"resp_{id}")).items)


def turns(*ids: str) -> list[str]:
    """The contents of some turns."""
    return [f"{kind}{id}" for id in ids for kind in "qa"]


# While the database can be written


@pytest.mark.anyio
async def test_a_question_and_its_reply_are_stored_at_once(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    assert await buffer.begin(turn("1"))
    assert await stored(conversations) == ["q1", ""]
    assert await buffer.finish(ended(turn("1")))
    assert await stored(conversations) == turns("1")
    assert (buffer.unwritten, buffer.trouble) == (0, None)


@pytest.mark.anyio
async def test_a_growing_reply_is_stored_as_far_as_it_is(buffer: WriteBuffer, conversations: AwayConversations) -> None:
    await buffer.begin(turn("1"))
    assert await buffer.write([growing("resp_1", "ha")])
    assert await buffer.write([growing("resp_1", "ha", "lf")])
    assert await stored(conversations) == ["q1", "half"]


@pytest.mark.anyio
async def test_a_reply_of_no_conversation_is_found_until_it_is_forgotten(buffer: WriteBuffer) -> None:
    one = ended(turn("1", Place(), None))
    assert not await buffer.finish(one)
    assert buffer.unwritten == 0
    assert await buffer.find_response("ann", "resp_1") == (None, False, one.reply)
    with pytest.raises(ResponseNotFoundError):
        await buffer.find_response("bob", "resp_1")
    buffer.forget("resp_1")
    with pytest.raises(ResponseNotFoundError):
        await buffer.find_response("ann", "resp_1")


@pytest.mark.anyio
async def test_replies_of_no_conversation_continue_each_other_and_stored_ones(buffer: WriteBuffer) -> None:
    await add_turn(buffer, "1")
    await buffer.finish(ended(turn("2", Place("resp_1"), None)))
    await buffer.finish(ended(turn("3", Place("resp_2"), None)))
    await buffer.finish(ended(turn("4", Place("resp_2"), None)))
    assert await branch(buffer, "3") == turns("1", "2", "3")
    found = await buffer.path_of_response("ann", "resp_4")
    assert (found.conversation, found.listed, contents_of(found.items)) == (None, False, turns("1", "2", "4"))
    buffer.forget("resp_2")
    with pytest.raises(ResponseNotFoundError):
        await buffer.path_of_response("ann", "resp_3")
    with pytest.raises(ResponseNotFoundError):
        await buffer.path_of_response("bob", "resp_4")


@pytest.mark.anyio
async def test_a_stored_response_is_found_in_the_database(buffer: WriteBuffer) -> None:
    await add_turn(buffer, "1")
    found = await buffer.find_response("ann", "resp_1")
    assert (found.conversation, found.listed, found.item.content) == ("conv", True, "a1")
    assert await branch(buffer, "1") == turns("1")
    for ask in (buffer.find_response, buffer.path_of_response, buffer.delete_response):
        with pytest.raises(ResponseNotFoundError):
            await ask("bob", "resp_1")


@pytest.mark.anyio
async def test_a_conversation_of_another_user_cannot_be_continued(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await add_turn(buffer, "1")
    with pytest.raises(ConversationNotFoundError):
        await buffer.begin(turn("2", Place("resp_1", "resp_1"), user="bob"))
    assert await stored(conversations) == turns("1")
    assert (buffer.unwritten, buffer.trouble) == (0, None)


@pytest.mark.anyio
async def test_a_turn_that_has_seen_another_leaf_is_refused(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    for id in ("1", "2"):
        await add_turn(buffer, id)
    with pytest.raises(ConversationLockedError):
        await buffer.begin(turn("3", Place("resp_1", "resp_1")))
    assert await stored(conversations) == turns("1", "2")
    assert (buffer.unwritten, buffer.trouble) == (0, None)


# While the database cannot be written


@pytest.mark.anyio
async def test_the_log_names_the_trouble_once_and_its_end_once(
    buffer: WriteBuffer, conversations: AwayConversations, caplog: pytest.LogCaptureFixture
) -> None:
    conversations.broken = True
    assert await add_turn(buffer, "1") == (False, False)
    assert await add_turn(buffer, "2") == (False, False)
    assert not await buffer.write([])
    assert buffer.trouble == NotStoredError.message
    assert caplog.text.count("messages cannot be stored, and wait in memory") == 1
    assert "the database is away" in caplog.text
    conversations.broken = False
    assert await buffer.write([])
    assert await buffer.write([])
    assert buffer.trouble is None
    assert caplog.text.count("messages can be stored again") == 1
    assert "q1" not in caplog.text


@pytest.mark.anyio
async def test_waiting_turns_can_be_read_and_are_stored_in_order_later(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await add_turn(buffer, "1")
    conversations.broken = True
    for id in ("2", "3"):
        assert await add_turn(buffer, id) == (False, False)
    assert await visible(buffer) == await branch(buffer, "3") == turns("1", "2", "3")
    assert await stored(conversations) == turns("1")
    found = await buffer.find_response("ann", "resp_3")
    assert (found.conversation, found.listed, found.item.content) == ("conv", True, "a3")
    assert buffer.unwritten == 2
    conversations.broken = False
    assert await buffer.write([])
    assert await stored(conversations) == await visible(buffer) == turns("1", "2", "3")
    assert buffer.unwritten == 0


@pytest.mark.anyio
async def test_a_path_ends_at_any_item_that_waits_or_is_stored(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await add_turn(buffer, "1")
    conversations.broken = True
    for id in ("2", "3"):
        await add_turn(buffer, id)
    for after, expected in (
        (Edge.START, []),
        ("q1", ["q1"]),
        ("msg_1_0", turns("1")),
        ("q2", [*turns("1"), "q2"]),
        ("msg_2_0", turns("1", "2")),
        ("resp_3", turns("1", "2", "3")),
        (Edge.END, turns("1", "2", "3")),
    ):
        path = await buffer.path("ann", "conv", after)
        assert (contents_of(path.items), path.leaf, path.exists) == (expected, "resp_3", True)
        assert [item.parent for item in path.items] == [item.parent for item in linked(path.items, None)]
    for unknown in ("q9", "resp_9", ""):
        with pytest.raises(ItemNotFoundError):
            await buffer.path("ann", "conv", unknown)


@pytest.mark.anyio
async def test_waiting_turns_can_fork(buffer: WriteBuffer, conversations: AwayConversations) -> None:
    for id in ("1", "2"):
        await add_turn(buffer, id)
    conversations.broken = True
    await add_turn(buffer, "3", Place("resp_1", "resp_2"))
    await add_turn(buffer, "4", Place("q3", "resp_3"))
    await add_turn(buffer, "5", Place("resp_3", advances=False))
    assert await visible(buffer) == [*turns("1"), "q3", *turns("4")]
    assert await branch(buffer, "5") == turns("1", "3", "5")
    assert await branch(buffer, "2") == turns("1", "2")
    conversations.broken = False
    assert await buffer.write([])
    assert await stored(conversations) == await visible(buffer) == [*turns("1"), "q3", *turns("4")]
    assert await branch(buffer, "5") == turns("1", "3", "5")
    assert await branch(buffer, "2") == turns("1", "2")


@pytest.mark.anyio
async def test_a_branch_is_shown_after_what_waits_is_written(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await add_turn(buffer, "1")
    await add_turn(buffer, "2", Place(None, "resp_1"))
    conversations.broken = True
    await add_turn(buffer, "3")
    with pytest.raises(DatabaseUnavailableError):
        await buffer.set_leaf("ann", "conv", "q1")
    conversations.broken = False
    await buffer.set_leaf("ann", "conv", "q1")
    assert await stored(conversations) == ["q1", "a1"]
    await buffer.set_leaf("ann", "conv", "q3")
    assert (await stored(conversations), buffer.unwritten) == (["q2", "a2", "q3", "a3"], 0)


@pytest.mark.anyio
async def test_a_turn_is_reported_when_it_begins_and_ends_in_the_database_also_late(
    conversations: AwayConversations,
) -> None:
    reported: list[tuple[str, str]] = []
    buffer = WriteBuffer(
        conversations, ROOM, on_stored=lambda user, conversation: reported.append((user, conversation))
    )
    begun = turn("1")
    await buffer.begin(begun)
    assert reported == [("ann", "conv")]
    await buffer.finish(ended(begun))
    assert reported == 2 * [("ann", "conv")]
    reported.clear()
    conversations.broken = True
    await add_turn(buffer, "2")
    await buffer.finish(ended(turn("3", conversation=None)))
    assert reported == []
    conversations.broken = False
    await buffer.write([])
    assert reported == [("ann", "conv")]


@pytest.mark.anyio
async def test_a_waiting_turn_becomes_a_branch_if_the_leaf_has_changed(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await add_turn(buffer, "1")
    conversations.broken = True
    await add_turn(buffer, "2")
    await Conversations.append_items(conversations, "ann", "conv", [message("q3", "q3")])
    conversations.broken = False
    assert await buffer.write([])
    assert await stored(conversations) == [*turns("1"), "q3"]
    assert await branch(buffer, "2") == turns("1", "2")
    assert buffer.unwritten == 0


@pytest.mark.anyio
async def test_a_new_turn_waits_until_a_write_has_succeeded(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    conversations.broken = True
    await add_turn(buffer, "1")
    conversations.broken = False
    assert await add_turn(buffer, "2") == (False, False), "no write has shown yet that the database is back"
    assert await buffer.write([])
    assert await add_turn(buffer, "3") == (True, True)
    assert await stored(conversations) == turns("1", "2", "3")


@pytest.mark.anyio
async def test_a_reply_that_ends_while_it_is_written_is_written_again(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    conversations.broken = True
    await buffer.begin(turn("1"))
    conversations.broken = False
    writing = asyncio.create_task(buffer.write([]))
    await conversations.putting.wait()
    assert not await buffer.finish(ended(turn("1"))), "nothing has been written yet"
    assert await writing
    assert await add_turn(buffer, "2") == (True, True)
    assert await stored(conversations) == turns("1", "2")
    assert buffer.unwritten == 0


@pytest.mark.anyio
async def test_a_new_conversation_goes_on_while_the_database_is_away(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    conversations.broken = conversations.unreadable = True
    await add_turn(buffer, "1", NEW)  # nothing to read: it is new
    for id in ("2", "3"):
        assert await add_turn(buffer, id) == (False, False)
    assert await visible(buffer) == await branch(buffer, "3") == turns("1", "2", "3")
    conversations.broken = conversations.unreadable = False
    assert await buffer.write([])
    assert await stored(conversations) == turns("1", "2", "3")


@pytest.mark.anyio
async def test_a_tree_that_is_not_listed_goes_on_while_the_database_is_away(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    conversations.broken = conversations.unreadable = True
    await add_turn(buffer, "1", Place(new=True, listed=False))
    for id in ("2", "3"):
        await add_turn(buffer, id, Place("resp_1", advances=False, listed=False))
    assert await buffer.path("ann", "conv") == ([], None, False)
    with pytest.raises(ItemNotFoundError):
        await buffer.path("ann", "conv", "resp_1")
    found = await buffer.path_of_response("ann", "resp_3")
    assert (found.conversation, found.listed, contents_of(found.items)) == ("conv", False, turns("1", "3"))
    conversations.broken = conversations.unreadable = False
    assert await buffer.write([])
    assert [await branch(buffer, id) for id in ("2", "3")] == [turns("1", "2"), turns("1", "3")]
    assert await conversations.path("ann", "conv") == ([], None, False)


@pytest.mark.anyio
async def test_a_conversation_that_cannot_be_read_is_an_error(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await add_turn(buffer, "1")
    conversations.broken = conversations.unreadable = True
    with pytest.raises(DatabaseUnavailableError) as raised:
        await buffer.path("ann", "conv")
    assert (raised.value.type, raised.value.code, raised.value.status) == ("server_error", "database_unavailable", 503)
    await buffer.begin(turn("2", Place("resp_1", "resp_1")))
    for ask in (
        buffer.path("ann", "conv"),
        buffer.find_response("ann", "resp_1"),
        buffer.path_of_response("ann", "resp_1"),
        buffer.delete_response("ann", "resp_1"),
    ):
        with pytest.raises(DatabaseUnavailableError):
            await ask
    assert (await buffer.find_response("ann", "resp_2")).item.status is Status.IN_PROGRESS


@pytest.mark.anyio
async def test_another_user_does_not_see_waiting_turns(buffer: WriteBuffer, conversations: AwayConversations) -> None:
    conversations.broken = True
    await buffer.begin(turn("1"))
    assert await buffer.path("bob", "conv") == ([], None, False)
    for ask in (buffer.find_response, buffer.path_of_response):
        with pytest.raises(ResponseNotFoundError):
            await ask("bob", "resp_1")


@pytest.mark.anyio
async def test_a_message_that_waits_is_found_by_its_id(buffer: WriteBuffer, conversations: AwayConversations) -> None:
    await add_turn(buffer, "1")
    conversations.broken = True
    await add_turn(buffer, "2", Place("resp_1", "resp_1"))
    assert [(await buffer.find_node("ann", id)).content for id in ("q1", "q2", "resp_2")] == ["q1", "q2", "a2"]
    for user, id in (("bob", "q2"), ("ann", "q3")):
        with pytest.raises(ItemNotFoundError):
            await buffer.find_node(user, id)


@pytest.mark.anyio
async def test_the_end_of_a_reply_that_waits_can_be_read(buffer: WriteBuffer, conversations: AwayConversations) -> None:
    await buffer.begin(turn("1"))
    conversations.broken = True
    await buffer.finish(ended(turn("1")))
    assert await stored(conversations) == ["q1", ""]
    assert await visible(buffer) == await branch(buffer, "1") == turns("1")
    conversations.unreadable = True
    assert (await buffer.find_response("ann", "resp_1")).item.content == "a1"


# Deleting


@pytest.mark.anyio
async def test_a_waiting_turn_of_a_deleted_conversation_is_dropped(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await add_turn(buffer, "1")
    conversations.broken = True
    await add_turn(buffer, "2")
    await buffer.begin(turn("3", conversation="other"))
    await Conversations.delete(conversations, "ann", "conv")
    conversations.broken = False
    assert await buffer.write([])
    assert await stored(conversations) == []
    assert await stored(conversations, "other") == ["q3", ""], "it must not delay other conversations"
    assert buffer.unwritten == 0


@pytest.mark.anyio
async def test_to_delete_a_conversation_drops_its_waiting_turns(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    conversations.broken = True
    await buffer.begin(turn("1"))
    await buffer.begin(turn("2", conversation="other"))
    await buffer.delete("ann", "conv")
    with pytest.raises(ConversationNotFoundError):
        await buffer.delete("ann", "conv")
    conversations.broken = False
    assert await buffer.write([])
    assert (await stored(conversations), await stored(conversations, "other")) == ([], ["q2", ""])


@pytest.mark.anyio
async def test_a_response_is_deleted_from_memory_or_from_the_database(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    for id in ("1", "2"):
        await add_turn(buffer, id)
    await buffer.finish(ended(turn("3", Place("resp_2"), None)))
    for id in ("3", "2"):
        await buffer.delete_response("ann", f"resp_{id}")
        with pytest.raises(ResponseNotFoundError):
            await buffer.find_response("ann", f"resp_{id}")
        with pytest.raises(ResponseNotFoundError):
            await buffer.delete_response("ann", f"resp_{id}")
    assert await visible(buffer) == await stored(conversations) == turns("1")


@pytest.mark.anyio
async def test_what_waits_behind_a_deleted_response_is_not_lost(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await add_turn(buffer, "1")
    conversations.broken = True
    for id in ("2", "3"):
        await add_turn(buffer, id)
    with pytest.raises(DatabaseUnavailableError):
        await buffer.delete_response("ann", "resp_2")
    assert await visible(buffer) == turns("1", "2", "3")
    conversations.broken = False
    await buffer.delete_response("ann", "resp_1")
    await buffer.delete_response("ann", "resp_2")
    assert await visible(buffer) == await stored(conversations) == ["q1", "", "q2", "", "q3", "a3"]
    assert buffer.unwritten == 0


# Losing replies


@pytest.mark.anyio
async def test_the_end_of_a_reply_is_stored_before_the_next_turn_begins(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await buffer.begin(turn("1"))
    conversations.broken = True
    await buffer.finish(ended(turn("1")))
    await buffer.begin(turn("2", await next_place(buffer)))
    conversations.broken = False
    assert await buffer.write([])
    assert await stored(conversations) == ["q1", "a1", "q2", ""]
    assert await buffer.begin(turn("3", conversation="other"))


@pytest.mark.anyio
async def test_a_lost_reply_does_not_block_its_conversation(conversations: AwayConversations) -> None:
    buffer = WriteBuffer(conversations, 0)
    await buffer.begin(turn("1"))
    conversations.broken = True
    await buffer.finish(ended(turn("1")))
    conversations.broken = False
    assert await buffer.write([])
    assert (await conversations.path("ann", "conv")).items[1].status is Status.FAILED
    assert await buffer.begin(turn("2", Place("resp_1", "resp_1")))


# A database that does not answer


class StuckConversations(AwayConversations):
    """A store whose writes wait until `may_write` is set."""

    def __init__(self, database: AsyncEngine) -> None:
        super().__init__(database)
        self.may_write = asyncio.Event()

    async def begin_turn(
        self, user: str, id: str, place: Place, input: Sequence[Item], reply: Item, accepted: bool = False
    ) -> None:
        await self.may_write.wait()
        await super().begin_turn(user, id, place, input, reply, accepted)

    async def update_replies(self, replies: Iterable[Item]) -> None:
        await self.may_write.wait()
        await super().update_replies(replies)


@pytest.mark.anyio
async def test_nobody_waits_for_a_database_that_does_not_answer(
    conversations: AwayConversations, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = StuckConversations(conversations._database)
    buffer = WriteBuffer(stuck, ROOM, patience=0.01)
    for id in ("1", "2", "3"):
        assert await add_turn(buffer, id) == (False, False)
    assert buffer.trouble == NotStoredError.message
    assert "the database has not answered for 0.01 s" in caplog.text
    assert await visible(buffer) == turns("1", "2", "3")
    stuck.may_write.set()
    assert await buffer.write([])
    assert await stored(conversations) == turns("1", "2", "3")
    assert buffer.unwritten == 0


@pytest.mark.anyio
async def test_a_late_write_does_not_replace_what_a_reply_has_become(conversations: AwayConversations) -> None:
    stuck = StuckConversations(conversations._database)
    buffer = WriteBuffer(stuck, ROOM, patience=0.01)
    stuck.may_write.set()
    holding = asyncio.create_task(buffer.write([]))
    await asyncio.sleep(0)  # it holds the lock, and succeeds, while the turn is being added
    stuck.may_write.clear()
    assert await add_turn(buffer, "1", NEW) == (False, False)
    stuck.may_write.set()
    await holding
    assert await buffer.write([])
    assert await stored(conversations) == turns("1")


# Memory


@pytest.mark.anyio
async def test_the_oldest_turns_are_lost_when_there_is_no_room(
    conversations: AwayConversations, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = WriteBuffer(conversations, 40_000)
    conversations.broken = True
    for number in range(40):
        await buffer.begin(turn(str(number), conversation=f"conv{number}", question="x" * 10_000))
    assert buffer.unwritten == 3
    assert caplog.text.count("PARLEY_REPLAY_BYTES is too small") == 37
    conversations.broken = False
    assert await buffer.write([])
    there = [number for number in range(40) if await stored(conversations, f"conv{number}")]
    assert there == [37, 38, 39]


@pytest.mark.anyio
async def test_the_turns_behind_a_lost_one_go_on_where_that_one_was(conversations: AwayConversations) -> None:
    buffer = WriteBuffer(conversations, 40_000)
    await add_turn(buffer, "1")
    conversations.broken = True
    for id, question in (("2", "x" * 30_000), ("3", "y" * 20_000)):
        begun = turn(id, await next_place(buffer), question=question)
        await buffer.begin(begun)
        await buffer.finish(ended(begun))
    assert buffer.unwritten == 1, "the first of them is lost"
    assert await visible(buffer) == ["q1", "a1", "y" * 20_000, "a3"]
    conversations.broken = False
    assert await buffer.write([])
    assert await stored(conversations) == ["q1", "a1", "y" * 20_000, "a3"]
    await add_turn(buffer, "4")
    assert await stored(conversations) == ["q1", "a1", "y" * 20_000, "a3", "q4", "a4"]


@pytest.mark.anyio
async def test_the_turn_behind_a_lost_first_one_begins_the_conversation(conversations: AwayConversations) -> None:
    buffer = WriteBuffer(conversations, 40_000)
    conversations.broken = True
    for id, question in (("1", "x" * 30_000), ("2", "y" * 20_000)):
        begun = turn(id, NEW if id == "1" else Place("resp_1", "resp_1"), question=question)
        await buffer.begin(begun)
        await buffer.finish(ended(begun))
    conversations.broken = False
    assert await buffer.write([])
    assert await stored(conversations) == ["y" * 20_000, "a2"]


# Many users at once, and a database that fails at any time


class FailingStore:
    """What `Conversations` does, in memory. Each operation takes some turns of the event loop, and may fail in any."""

    def __init__(self, source: random.Random) -> None:
        self.nodes: dict[str, dict[str, Item]] = {}
        self.leaves: dict[str, str] = {}
        self.broken = False
        self._source = source
        self._writing = asyncio.Lock()

    async def begin_turn(
        self, user: str, id: str, place: Place, input: Sequence[Item], reply: Item, accepted: bool = False
    ) -> None:
        async with self._writing:
            await self._work()
            if accepted and reply.id in self.nodes.get(id, {}):
                self.nodes[id][reply.id] = replace(reply, parent=self.nodes[id][reply.id].parent)
            else:
                self._add(id, place, linked([*input, reply], place.parent), accepted)
            await self._work()  # it may be done although the answer is lost

    def _add(self, id: str, place: Place, nodes: Sequence[Item], accepted: bool) -> None:
        tree = self.nodes.get(id, {})
        if not tree and not place.new:
            raise ConversationNotFoundError
        assert place.parent is None or place.parent in tree
        if place.advances and self.leaves.get(id) == place.leaf:
            self.leaves[id] = nodes[-1].id
        elif place.advances and not accepted:
            raise ConversationLockedError
        self.nodes[id] = tree | {node.id: node for node in nodes}

    async def update_replies(self, replies: Iterable[Item]) -> None:
        async with self._writing:
            await self._work()
            for item in replies:
                for tree in self.nodes.values():
                    if item.id in tree:
                        tree[item.id] = replace(item, parent=tree[item.id].parent)
            await self._work()

    async def fail_replies(self, ids: Sequence[str]) -> None:
        raise AssertionError("none is lost")

    async def path(self, user: str, id: str, after: str | Edge = Edge.END) -> Path:
        await self._work()
        leaf = self.leaves.get(id)
        last = leaf if after is Edge.END else after if isinstance(after, str) else None
        return Path(path_in(self.nodes.get(id, {}), last), leaf, id in self.nodes)

    async def _work(self) -> None:
        for _ in range(self._source.randrange(4)):
            await asyncio.sleep(0)
        if self.broken:
            raise OSError("away")


def path_in(tree: dict[str, Item], node: str | None) -> list[Item]:
    """The nodes of a tree that lead to one of them."""
    path: list[Item] = []
    while node is not None:
        path.insert(0, tree[node])
        node = tree[node].parent
    return path


class Chaos:
    """Three users who chat, each in a conversation, while the store fails and recovers at random."""

    def __init__(self, source: random.Random) -> None:
        self.store = FailingStore(source)
        self.buffer = WriteBuffer(self.store, ROOM)  # type: ignore[arg-type]
        self.expected: dict[str, dict[str, Item]] = {f"conv{number}": {} for number in range(3)}
        self.leaves: dict[str, str | None] = dict.fromkeys(self.expected)
        self._source = source
        self._growing: dict[str, Item] = {}  # how far each reply is; it stays until its end is stored
        self._chatting = len(self.expected)

    async def run(self) -> None:
        await asyncio.gather(*map(self._chat, self.expected), self._write_growing(), self._break_and_repair())
        self.store.broken = False

    async def _pause(self, most: int) -> None:
        for _ in range(self._source.randrange(most)):
            await asyncio.sleep(0)

    async def _chat(self, conversation: str) -> None:
        for number in range(self._source.randrange(1, 7)):
            await self._pause(10)
            await self._take_turn(conversation, f"{conversation}.{number}")
        self._chatting -= 1

    async def _take_turn(self, conversation: str, id: str) -> None:
        tree, leaf = self.expected[conversation], self.leaves[conversation]
        try:
            path = await self.buffer.path("ann", conversation)
        except DatabaseUnavailableError:
            return
        assert path == (path_in(tree, leaf), leaf, bool(tree))
        parent = self._source.choice([leaf, leaf, *tree])
        advances = not tree or self._source.random() < 0.8
        begun = turn(id, Place(parent, leaf, advances, new=not tree), conversation)
        await self.buffer.begin(begun)
        self._growing[id] = growing(f"resp_{id}", "a")
        await self._pause(10)
        self._growing[id] = ended(begun).reply
        tree |= {node.id: node for node in ended(begun).nodes}
        self.leaves[conversation] = f"resp_{id}" if advances else leaf
        await self.buffer.finish(ended(begun))
        del self._growing[id]

    async def _write_growing(self) -> None:
        while self._chatting:
            await self._pause(6)
            await asyncio.sleep(0)
            ids = [*self._growing]
            await self.buffer.write(self._growing[id] for id in ids if id in self._growing)

    async def _break_and_repair(self) -> None:
        while self._chatting:
            await asyncio.sleep(0)
            await self._pause(30)
            self.store.broken = not self.store.broken


async def check_chaos(source: random.Random) -> None:
    """Let the users chat; then everything has to be stored once and in its place."""
    chaos = Chaos(source)
    await chaos.run()
    assert await chaos.buffer.write([])
    assert chaos.buffer.unwritten == 0
    assert chaos.buffer.trouble is None
    for conversation, tree in chaos.expected.items():
        assert chaos.store.nodes.get(conversation, {}) == tree
        assert chaos.store.leaves.get(conversation) == chaos.leaves[conversation]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """An event loop for many examples, whose troubles are not logged."""
    logger = logging.getLogger("parley")
    logger.disabled = True
    with asyncio.Runner() as runner:
        yield runner
    logger.disabled = False


@hypothesis_settings(max_examples=300, deadline=None)
@given(strategies.randoms(use_true_random=True))
def test_nothing_is_lost_doubled_or_misplaced_while_the_database_fails(
    loop: asyncio.Runner, source: random.Random
) -> None:
    loop.run(check_chaos(source))
