from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies
from sqlalchemy.ext.asyncio import AsyncEngine

from models.errors import ConversationBusyError, ConversationNotFoundError, DatabaseUnavailableError, NotStoredError
from models.settings import Settings
from models.store.buffered_replies import BufferedReply
from models.store.conversations import Conversations
from models.store.database import open_database
from models.store.item import Item, Status
from models.store.write_buffer import WriteBuffer
from tests.support.stores import AwayConversations

ROOM = 2**24


@pytest.fixture
async def conversations(settings: Settings) -> AsyncIterator[AwayConversations]:
    async with open_database(settings) as opened:
        yield AwayConversations(opened)


@pytest.fixture
def buffer(conversations: AwayConversations) -> WriteBuffer:
    return WriteBuffer(conversations, ROOM)


def reply(id: str, content: str = "", status: Status = Status.IN_PROGRESS) -> Item:
    return Item(id, "assistant", content, 1.0, status, cuts=str(len(content)), usage={}, decode_seconds=0.0)


def new_reply(
    id: str, position: int, conversation: str = "conv", user: str = "ann", question: str = ""
) -> BufferedReply:
    """An empty reply with its input, the question `q` and the id unless another one is given."""
    input = Item(f"q{id}", "user", question or f"q{id}", 1.0)
    return BufferedReply(user, conversation, reply(id), [input], position)


def finished_reply(id: str, conversation: str | None = "conv") -> BufferedReply:
    """A reply that has ended, with the text `a` and the id."""
    return BufferedReply("ann", conversation, reply(id, f"a{id}", Status.COMPLETED))


async def add_turn(buffer: WriteBuffer, id: str) -> tuple[bool, bool]:
    """Add a question and its reply to the conversation; whether each was stored at once."""
    position = len(await buffer.items("ann", "conv"))
    return await buffer.begin(new_reply(id, position)), await buffer.finish(finished_reply(id))


async def stored(conversations: Conversations, conversation: str = "conv") -> list[str]:
    """The contents of the items in the database."""
    return [item.content for item in await conversations.items("ann", conversation)]


async def visible(buffer: WriteBuffer) -> list[str]:
    """The contents of the items, in the database or not."""
    return [item.content for item in await buffer.items("ann", "conv")]


def turns(*ids: str) -> list[str]:
    """The contents of some turns."""
    return [f"{kind}{id}" for id in ids for kind in "qa"]


# While the database can be written


@pytest.mark.anyio
async def test_a_question_and_its_reply_are_stored_at_once(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    assert await buffer.begin(new_reply("1", 0))
    assert await stored(conversations) == ["q1", ""]
    assert await buffer.finish(finished_reply("1"))
    assert await stored(conversations) == turns("1")
    assert (buffer.unwritten, buffer.trouble) == (0, None)


@pytest.mark.anyio
async def test_a_growing_reply_is_stored_as_far_as_it_is(buffer: WriteBuffer, conversations: AwayConversations) -> None:
    await buffer.begin(new_reply("1", 0))
    assert await buffer.write([reply("1", "ha")])
    assert await buffer.write([reply("1", "half")])
    assert await stored(conversations) == ["q1", "half"]


@pytest.mark.anyio
async def test_a_reply_of_no_conversation_is_found_until_it_is_forgotten(buffer: WriteBuffer) -> None:
    assert not await buffer.finish(finished_reply("1", None))
    assert buffer.unwritten == 0
    assert await buffer.find_reply("ann", "1") == (None, finished_reply("1").reply)
    assert await buffer.find_reply("bob", "1") is None
    buffer.forget("1")
    assert await buffer.find_reply("ann", "1") is None


@pytest.mark.anyio
async def test_a_stored_reply_is_found_in_the_database(buffer: WriteBuffer) -> None:
    await add_turn(buffer, "1")
    found = await buffer.find_reply("ann", "1")
    assert found
    assert (found[0], found[1].content) == ("conv", "a1")
    assert await buffer.find_reply("bob", "1") is None


@pytest.mark.anyio
async def test_a_conversation_of_another_user_cannot_be_continued(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await add_turn(buffer, "1")
    with pytest.raises(ConversationNotFoundError):
        await buffer.begin(new_reply("2", 2, user="bob"))
    assert await stored(conversations) == turns("1")
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
    assert await visible(buffer) == turns("1", "2", "3")
    assert await stored(conversations) == turns("1")
    found = await buffer.find_reply("ann", "3")
    assert found
    assert (found[0], found[1].content) == ("conv", "a3")
    assert buffer.unwritten == 2
    conversations.broken = False
    assert await buffer.write([])
    assert await stored(conversations) == await visible(buffer) == turns("1", "2", "3")
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
    await buffer.begin(new_reply("1", 0))
    conversations.broken = False
    writing = asyncio.create_task(buffer.write([]))
    await conversations.putting.wait()
    assert not await buffer.finish(finished_reply("1")), "nothing has been written yet"
    assert await writing
    assert await add_turn(buffer, "2") == (True, True)
    assert await stored(conversations) == turns("1", "2")
    assert buffer.unwritten == 0


@pytest.mark.anyio
async def test_a_new_conversation_goes_on_while_the_database_is_away(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    conversations.broken = conversations.unreadable = True
    for id in ("1", "2", "3"):
        position = len(await buffer.items("ann", "conv")) if id != "1" else 0  # nothing to read: it is new
        assert not await buffer.begin(new_reply(id, position))
        assert not await buffer.finish(finished_reply(id))
    assert await visible(buffer) == turns("1", "2", "3")
    conversations.broken = conversations.unreadable = False
    assert await buffer.write([])
    assert await stored(conversations) == turns("1", "2", "3")


@pytest.mark.anyio
async def test_a_conversation_that_cannot_be_read_is_an_error(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await add_turn(buffer, "1")
    conversations.broken = conversations.unreadable = True
    with pytest.raises(DatabaseUnavailableError) as raised:
        await buffer.items("ann", "conv")
    assert (raised.value.type, raised.value.code, raised.value.status) == ("server_error", "database_unavailable", 503)
    await buffer.begin(new_reply("2", 2))
    with pytest.raises(DatabaseUnavailableError):
        await buffer.items("ann", "conv")


@pytest.mark.anyio
async def test_a_waiting_turn_can_replace_earlier_ones(buffer: WriteBuffer, conversations: AwayConversations) -> None:
    for id in ("1", "2"):
        await add_turn(buffer, id)
    conversations.broken = True
    await buffer.begin(new_reply("3", 2))
    await buffer.finish(finished_reply("3"))
    await add_turn(buffer, "4")
    assert await visible(buffer) == turns("1", "3", "4")
    conversations.broken = False
    assert await buffer.write([])
    assert await stored(conversations) == turns("1", "3", "4")


@pytest.mark.anyio
async def test_another_user_does_not_see_waiting_turns(buffer: WriteBuffer, conversations: AwayConversations) -> None:
    conversations.broken = True
    await buffer.begin(new_reply("1", 0))
    assert await buffer.items("bob", "conv") == []
    assert await buffer.find_reply("bob", "1") is None


@pytest.mark.anyio
async def test_a_waiting_turn_of_a_deleted_conversation_is_dropped(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await add_turn(buffer, "1")
    conversations.broken = True
    await add_turn(buffer, "2")
    await buffer.begin(new_reply("3", 0, "other"))
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
    await buffer.begin(new_reply("1", 0))
    await buffer.begin(new_reply("2", 0, "other"))
    await buffer.delete("ann", "conv")
    with pytest.raises(ConversationNotFoundError):
        await buffer.delete("ann", "conv")
    conversations.broken = False
    assert await buffer.write([])
    assert (await stored(conversations), await stored(conversations, "other")) == ([], ["q2", ""])


@pytest.mark.anyio
async def test_the_end_of_a_reply_is_stored_before_the_next_turn_begins(
    buffer: WriteBuffer, conversations: AwayConversations
) -> None:
    await buffer.begin(new_reply("1", 0))
    conversations.broken = True
    await buffer.finish(finished_reply("1"))
    await buffer.begin(new_reply("2", 2))
    conversations.broken = False
    assert await buffer.write([])
    assert await stored(conversations) == ["q1", "a1", "q2", ""]
    assert await buffer.begin(new_reply("3", 0, "other"))


@pytest.mark.anyio
async def test_a_lost_reply_does_not_block_its_conversation(conversations: AwayConversations) -> None:
    buffer = WriteBuffer(conversations, 0)
    await buffer.begin(new_reply("1", 0))
    conversations.broken = True
    await buffer.finish(finished_reply("1"))
    conversations.broken = False
    assert await buffer.write([])
    assert (await conversations.items("ann", "conv"))[1].status is Status.FAILED
    assert await buffer.begin(new_reply("2", 2))


# A database that does not answer


class StuckConversations(AwayConversations):
    """A store whose writes wait until `may_write` is set."""

    def __init__(self, database: AsyncEngine) -> None:
        super().__init__(database)
        self.may_write = asyncio.Event()

    async def put_items(self, user: str, id: str, position: int, new: Sequence[Item], accepted: bool = False) -> None:
        await self.may_write.wait()
        await super().put_items(user, id, position, new, accepted)

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
    assert await add_turn(buffer, "1") == (False, False)
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
        await buffer.begin(new_reply(str(number), 0, f"conv{number}", question="x" * 10_000))
    assert buffer.unwritten == 3
    assert caplog.text.count("PARLEY_REPLAY_BYTES is too small") == 37
    conversations.broken = False
    assert await buffer.write([])
    there = [number for number in range(40) if await stored(conversations, f"conv{number}")]
    assert there == [37, 38, 39]


@pytest.mark.anyio
async def test_turns_after_a_lost_one_are_not_overwritten_by_the_next(conversations: AwayConversations) -> None:
    buffer = WriteBuffer(conversations, 40_000)
    await add_turn(buffer, "1")
    conversations.broken = True
    for id, question in (("2", "x" * 30_000), ("3", "y" * 20_000)):
        await buffer.begin(new_reply(id, 2 * int(id) - 2, question=question))
        await buffer.finish(finished_reply(id))
    assert buffer.unwritten == 1, "the first of them is lost"
    conversations.broken = False
    assert await buffer.write([])
    assert await stored(conversations) == ["q1", "a1", "y" * 20_000, "a3"]
    await add_turn(buffer, "4")
    assert await stored(conversations) == ["q1", "a1", "y" * 20_000, "a3", "q4", "a4"]


# Many users at once, and a database that fails at any time


class FailingStore:
    """What `Conversations` does, in memory. Each operation takes some turns of the event loop, and may fail in any."""

    def __init__(self, source: random.Random) -> None:
        self.rows: dict[str, dict[int, Item]] = {}
        self.broken = False
        self._source = source
        self._writing = asyncio.Lock()

    async def put_items(self, user: str, id: str, position: int, new: Sequence[Item], accepted: bool = False) -> None:
        async with self._writing:
            await self._work()
            if id not in self.rows and position:
                raise ConversationNotFoundError
            before = {place: item for place, item in self.rows.get(id, {}).items() if place < position}
            if any(item.status is Status.IN_PROGRESS for item in before.values()):
                raise ConversationBusyError
            self.rows[id] = before | dict(enumerate(new, position))
            await self._work()  # it may be done although the answer is lost

    async def update_replies(self, replies: Iterable[Item]) -> None:
        async with self._writing:
            await self._work()
            states = {item.id: item for item in replies}
            for rows in self.rows.values():
                rows.update({place: replace(states[row.id]) for place, row in rows.items() if row.id in states})
            await self._work()

    async def fail_replies(self, ids: Sequence[str]) -> None:
        raise AssertionError("none is lost")

    async def items(self, user: str, id: str) -> list[Item]:
        await self._work()
        return self.items_now(id)

    def items_now(self, id: str) -> list[Item]:
        return [item for _, item in sorted(self.rows.get(id, {}).items())]

    async def _work(self) -> None:
        for _ in range(self._source.randrange(4)):
            await asyncio.sleep(0)
        if self.broken:
            raise OSError("away")


class Chaos:
    """Three users who chat, each in a conversation, while the store fails and recovers at random."""

    def __init__(self, source: random.Random) -> None:
        self.store = FailingStore(source)
        self.buffer = WriteBuffer(self.store, ROOM)  # type: ignore[arg-type]
        self.expected: dict[str, list[str]] = {f"conv{number}": [] for number in range(3)}
        self._source = source
        self._growing: dict[str, BufferedReply] = {}  # how far each reply is; it stays until its end is stored
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
        expected = self.expected[conversation]
        try:
            items = await self.buffer.items("ann", conversation)
        except DatabaseUnavailableError:
            return
        assert [item.content for item in items] == expected
        position = self._source.choice([len(items), len(items), 2 * self._source.randrange(len(items) // 2 + 1)])
        await self.buffer.begin(new_reply(id, position, conversation))
        expected[position:] = [f"q{id}", f"a{id}"]
        self._growing[id] = replace(finished_reply(id, conversation), reply=reply(id, "a"))
        await self._pause(10)
        self._growing[id] = finished_reply(id, conversation)
        await self.buffer.finish(self._growing[id])
        del self._growing[id]

    async def _write_growing(self) -> None:
        while self._chatting:
            await self._pause(6)
            await asyncio.sleep(0)
            ids = [*self._growing]
            await self.buffer.write(self._growing[id].reply for id in ids if id in self._growing)

    async def _break_and_repair(self) -> None:
        while self._chatting:
            await asyncio.sleep(0)
            await self._pause(30)
            self.store.broken = not self.store.broken


async def check_chaos(source: random.Random) -> None:
    """Let the users chat; then everything has to be stored once and in order."""
    chaos = Chaos(source)
    await chaos.run()
    assert await chaos.buffer.write([])
    assert chaos.buffer.unwritten == 0
    assert chaos.buffer.trouble is None
    for conversation, expected in chaos.expected.items():
        items = chaos.store.items_now(conversation)
        assert [item.content for item in items] == expected
        assert [item.status for item in items][1::2] == [Status.COMPLETED] * (len(expected) // 2)


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
def test_nothing_is_lost_doubled_or_reordered_while_the_database_fails(
    loop: asyncio.Runner, source: random.Random
) -> None:
    loop.run(check_chaos(source))
