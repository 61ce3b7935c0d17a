from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st
from starlette.testclient import TestClient

from models import database
from models.conversations import ConversationNotFound, Conversations
from models.database import DatabaseUnavailable
from models.held import Held
from models.item import Item
from models.journal import Journal, NotKept
from models.settings import Settings
from server import create_app
from tests.scripted import ScriptedChat, keeping_in
from tests.test_server import Json, bearer

ROOM = 2**24


class AwayConversations(Conversations):
    """A store that is out of reach while a test wants it: to be written, and while `unreadable` to be read too."""

    def __init__(self, database: Any) -> None:
        super().__init__(database)
        self.broken = self.unreadable = False
        self.adding = asyncio.Event()  # something is about to be added
        self.back = asyncio.Event()  # something was written, if only nothing

    async def add(self, user: str, id: str, position: int, new: Sequence[Item]) -> None:
        self._check(self.broken)
        self.adding.set()
        await super().add(user, id, position, new)

    async def write(self, replies: Iterable[Item]) -> None:
        self._check(self.broken)
        await super().write(replies)
        self.back.set()

    async def items(self, user: str, id: str) -> list[Item]:
        self._check(self.unreadable)
        return await super().items(user, id)

    def _check(self, away: bool) -> None:
        if away:
            self.back.clear()
            raise OSError("the database is away")


@pytest.fixture
async def conversations(settings: Settings) -> AsyncIterator[AwayConversations]:
    async with database.opened(settings) as opened:
        yield AwayConversations(opened)


@pytest.fixture
def journal(conversations: AwayConversations) -> Journal:
    return Journal(conversations, ROOM)


def reply(id: str, content: str = "", status: Any = "in_progress") -> Item:
    return Item(id, "assistant", content, 1.0, status, cuts=str(len(content)), usage={}, decode_seconds=0.0)


def begun(id: str, position: int, conversation: str = "conv", user: str = "ann", said: str = "") -> Held:
    """A reply of which there is nothing yet, and its question."""
    return Held(user, conversation, reply(id), [Item(f"q{id}", "user", said or f"q{id}", 1.0)], position)


def ended(id: str, conversation: str | None = "conv", user: str = "ann") -> Held:
    return Held(user, conversation, reply(id, f"a{id}", "completed"))


async def turn(journal: Journal, id: str, conversation: str = "conv") -> tuple[bool, bool]:
    """Have something said and answered; whether each was kept at once."""
    position = len(await journal.read("ann", conversation))
    return await journal.add(begun(id, position, conversation)), await journal.end(ended(id, conversation))


async def kept(conversations: Conversations, conversation: str = "conv") -> list[str]:
    """What is in the database."""
    return [item.content for item in await conversations.items("ann", conversation)]


async def said(journal: Journal, conversation: str = "conv") -> list[str]:
    return [item.content for item in await journal.read("ann", conversation)]


def turns(*ids: str) -> list[str]:
    return [f"{kind}{id}" for id in ids for kind in "qa"]


# With the database


@pytest.mark.anyio
async def test_what_is_said_is_kept_at_once(journal: Journal, conversations: AwayConversations) -> None:
    assert await journal.add(begun("1", 0))
    assert await kept(conversations) == ["q1", ""]
    assert await journal.end(ended("1"))
    assert await kept(conversations) == turns("1")
    assert (journal.unwritten, journal.trouble) == (0, None)


@pytest.mark.anyio
async def test_replies_are_written_as_far_as_they_have_come(journal: Journal, conversations: AwayConversations) -> None:
    await journal.add(begun("1", 0))
    assert await journal.write([reply("1", "ha")])
    assert await journal.write([reply("1", "half")])
    assert await kept(conversations) == ["q1", "half"]


@pytest.mark.anyio
async def test_a_reply_of_no_conversation_is_found_until_it_is_forgotten_and_never_written(
    journal: Journal, conversations: AwayConversations
) -> None:
    assert not await journal.end(ended("1", None))
    assert journal.unwritten == 0
    assert await journal.find("ann", "1") == (None, ended("1").reply)
    assert await journal.find("bob", "1") is None
    journal.forget("1")
    assert await journal.find("ann", "1") is None


@pytest.mark.anyio
async def test_a_reply_that_is_kept_is_found_in_the_database(journal: Journal) -> None:
    await turn(journal, "1")
    found = await journal.find("ann", "1")
    assert found
    assert (found[0], found[1].content) == ("conv", "a1")
    assert await journal.find("bob", "1") is None


@pytest.mark.anyio
async def test_a_conversation_of_somebody_else_is_not_added_to(
    journal: Journal, conversations: AwayConversations
) -> None:
    await turn(journal, "1")
    with pytest.raises(ConversationNotFound):
        await journal.add(begun("2", 2, user="bob"))
    assert await kept(conversations) == turns("1")
    assert (journal.unwritten, journal.trouble) == (0, None)


# Without


@pytest.mark.anyio
async def test_trouble_is_told_once_and_that_it_is_over_once(
    journal: Journal, conversations: AwayConversations, caplog: pytest.LogCaptureFixture
) -> None:
    conversations.broken = True
    assert await turn(journal, "1") == (False, False)
    assert await turn(journal, "2") == (False, False)
    assert not await journal.write([])
    assert journal.trouble == NotKept.message
    assert caplog.text.count("cannot be written down, and waits in memory") == 1
    assert "the database is away" in caplog.text
    conversations.broken = False
    assert await journal.write([])
    assert await journal.write([])
    assert journal.trouble is None
    assert caplog.text.count("can be written down again") == 1
    assert "q1" not in caplog.text


@pytest.mark.anyio
async def test_what_could_not_be_kept_is_read_found_and_written_in_order_when_it_can_be(
    journal: Journal, conversations: AwayConversations
) -> None:
    await turn(journal, "1")
    conversations.broken = True
    for id in ("2", "3"):
        assert await turn(journal, id) == (False, False)
    assert await said(journal) == turns("1", "2", "3")
    assert await kept(conversations) == turns("1")
    found = await journal.find("ann", "3")
    assert found
    assert (found[0], found[1].content) == ("conv", "a3")
    assert journal.unwritten == 2
    conversations.broken = False
    assert await journal.write([])
    assert await kept(conversations) == await said(journal) == turns("1", "2", "3")
    assert journal.unwritten == 0


@pytest.mark.anyio
async def test_the_next_turn_writes_what_its_conversation_lacks_first(
    journal: Journal, conversations: AwayConversations
) -> None:
    conversations.broken = True
    await turn(journal, "1")
    conversations.broken = False
    assert await turn(journal, "2") == (False, False), "until somebody found out that it can be written again"
    assert await journal.write([])
    assert await turn(journal, "3") == (True, True)
    assert await kept(conversations) == turns("1", "2", "3")


@pytest.mark.anyio
async def test_a_reply_that_ends_while_it_is_written_is_written_again_before_the_next_turn(
    journal: Journal, conversations: AwayConversations
) -> None:
    conversations.broken = True
    await journal.add(begun("1", 0))
    conversations.broken = False
    writing = asyncio.create_task(journal.write([]))
    await conversations.adding.wait()
    assert await journal.end(ended("1"))
    assert await writing
    assert await turn(journal, "2") == (True, True)
    assert await kept(conversations) == turns("1", "2")
    assert journal.unwritten == 0


@pytest.mark.anyio
async def test_a_conversation_that_began_without_the_database_goes_on_without_it(
    journal: Journal, conversations: AwayConversations
) -> None:
    conversations.broken = conversations.unreadable = True
    for id in ("1", "2", "3"):
        position = len(await journal.read("ann", "conv")) if id != "1" else 0  # a new one: there is nothing to read
        assert not await journal.add(begun(id, position))
        assert not await journal.end(ended(id))
    assert await said(journal) == turns("1", "2", "3")
    conversations.broken = conversations.unreadable = False
    assert await journal.write([])
    assert await kept(conversations) == turns("1", "2", "3")


@pytest.mark.anyio
async def test_of_a_conversation_that_cannot_be_read_nothing_is_made_up(
    journal: Journal, conversations: AwayConversations
) -> None:
    await turn(journal, "1")
    conversations.broken = conversations.unreadable = True
    with pytest.raises(DatabaseUnavailable) as raised:
        await journal.read("ann", "conv")
    assert (raised.value.type, raised.value.code) == ("server_error", "database_unavailable")
    await journal.add(begun("2", 2))
    with pytest.raises(DatabaseUnavailable):
        await journal.read("ann", "conv")


@pytest.mark.anyio
async def test_a_turn_that_takes_the_place_of_others_does_so_without_the_database_too(
    journal: Journal, conversations: AwayConversations
) -> None:
    for id in ("1", "2"):
        await turn(journal, id)
    conversations.broken = True
    await journal.add(begun("3", 2))
    await journal.end(ended("3"))
    await turn(journal, "4")
    assert await said(journal) == turns("1", "3", "4")
    conversations.broken = False
    assert await journal.write([])
    assert await kept(conversations) == turns("1", "3", "4")


@pytest.mark.anyio
async def test_what_somebody_else_says_in_a_conversation_of_the_same_name_stays_apart(
    journal: Journal, conversations: AwayConversations
) -> None:
    conversations.broken = True
    await journal.add(begun("1", 0))
    assert await journal.read("bob", "conv") == []
    assert await journal.find("bob", "1") is None


@pytest.mark.anyio
async def test_what_was_said_in_a_conversation_that_is_deleted_meanwhile_is_let_go(
    journal: Journal, conversations: AwayConversations
) -> None:
    await turn(journal, "1")
    conversations.broken = True
    await turn(journal, "2")
    await journal.add(begun("3", 0, "other"))
    await Conversations.delete(conversations, "ann", "conv")
    conversations.broken = False
    assert await journal.write([])
    assert await kept(conversations) == []
    assert await kept(conversations, "other") == ["q3", ""], "the others do not wait for it"
    assert journal.unwritten == 0


# Memory


@pytest.mark.anyio
async def test_the_oldest_are_let_go_where_all_would_take_too_much(conversations: AwayConversations) -> None:
    journal = Journal(conversations, 40_000)
    conversations.broken = True
    for number in range(40):
        await journal.add(begun(str(number), 0, f"conv{number}", said="x" * 10_000))
    assert journal.unwritten == 3
    conversations.broken = False
    assert await journal.write([])
    there = [number for number in range(40) if await kept(conversations, f"conv{number}")]
    assert there == [37, 38, 39]


@pytest.mark.anyio
async def test_what_is_written_after_something_was_let_go_is_not_lost_with_the_next_turn(
    conversations: AwayConversations,
) -> None:
    journal = Journal(conversations, 40_000)
    await turn(journal, "1")
    conversations.broken = True
    for id, question in (("2", "x" * 30_000), ("3", "y" * 20_000)):
        await journal.add(begun(id, 2 * int(id) - 2, said=question))
        await journal.end(ended(id))
    assert journal.unwritten == 1, "one was let go"
    conversations.broken = False
    assert await journal.write([])
    assert await kept(conversations) == ["q1", "a1", "y" * 20_000, "a3"]
    await turn(journal, "4")
    assert await kept(conversations) == ["q1", "a1", "y" * 20_000, "a3", "q4", "a4"]


# In a server


@pytest.fixture
def client(settings: Settings, scripted: ScriptedChat) -> Iterator[tuple[TestClient, AwayConversations]]:
    """An app, and its store."""
    app = create_app(settings, keeping_in(AwayConversations, scripted.opened))
    with TestClient(app) as client:
        yield client, app.state.conversations


def ask(socket: Any, input: str, **fields: str) -> Json:
    """The end of the reply to what is asked; that it is not kept may be told before."""
    socket.send_json({"type": "response.create", "response": {"input": input, **fields}})
    while (event := socket.receive_json())["type"] != "response.done":
        assert event["type"] != "error" or event["error"]["code"] == "not_kept", event
    return dict(event["response"])


def test_what_is_deleted_while_it_waits_to_be_written_stays_deleted(
    client: tuple[TestClient, AwayConversations],
) -> None:
    http, store = client
    with http.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        socket.receive_json()
        changed = ask(socket, "say one", conversation="new")["conversation"]
        store.broken = True
        ask(socket, "say two", conversation=changed, after="none")
        begun = ask(socket, "say three", conversation="new")["conversation"]
        for id in (changed, begun):
            assert http.delete(f"/v1/conversations/{id}", headers=bearer()).status_code == 204
        store.broken = False
        assert http.portal
        http.portal.call(store.back.wait)
        assert http.get("/v1/conversations", headers=bearer()).json()["data"] == []


@pytest.mark.parametrize("fields", [{"conversation": "new"}, {}], ids=["a new one", "the connection's"])
def test_a_conversation_can_begin_and_go_on_without_the_database(
    client: tuple[TestClient, AwayConversations], fields: dict[str, str]
) -> None:
    http, store = client
    store.broken = store.unreadable = True
    with http.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
        socket.receive_json()
        conversation = ask(socket, "say one", **fields)["conversation"]
        assert ask(socket, "say two", conversation=conversation)["output_text"] == "two"
        store.broken = store.unreadable = False
        assert http.portal
        http.portal.call(store.back.wait)
        items = http.get(f"/v1/conversations/{conversation}", headers=bearer()).json()["items"]
        assert [item["content"] for item in items] == ["say one", "one", "say two", "two"]


def test_plain_text_is_answered_without_the_database(client: tuple[TestClient, AwayConversations]) -> None:
    http, store = client
    store.broken = store.unreadable = True
    with http.websocket_connect("/ws", headers=bearer()) as socket:
        socket.send_text("say one")
        assert socket.receive_text() == "one"


# All at once


class Store:
    """What `Conversations` does, in memory; an operation takes some turns of the event loop, and may fail in any."""

    def __init__(self, source: random.Random) -> None:
        self.rows: dict[str, dict[int, Item]] = {}
        self.broken = False
        self._source = source
        self._writing = asyncio.Lock()

    async def add(self, user: str, id: str, position: int, new: Sequence[Item]) -> None:
        async with self._writing:
            await self._work()
            if id not in self.rows and position:
                raise ConversationNotFound
            before = {place: item for place, item in self.rows.get(id, {}).items() if place < position}
            self.rows[id] = before | dict(enumerate(new, position))
            await self._work()  # it may be done, and the answer lost

    async def write(self, replies: Iterable[Item]) -> None:
        async with self._writing:
            await self._work()
            states = {item.id: item for item in replies}
            for rows in self.rows.values():
                rows.update({place: replace(states[row.id]) for place, row in rows.items() if row.id in states})
            await self._work()

    async def items(self, user: str, id: str) -> list[Item]:
        await self._work()
        return self.said(id)

    async def reply(self, user: str, id: str) -> tuple[str, Item] | None:
        raise AssertionError("nobody asks")

    def said(self, id: str) -> list[Item]:
        return [item for _, item in sorted(self.rows.get(id, {}).items())]

    async def _work(self) -> None:
        for _ in range(self._source.randrange(4)):
            await asyncio.sleep(0)
        if self.broken:
            raise OSError("away")


async def chatted(source: random.Random) -> None:
    """Let some chat in conversations of their own while the database comes and goes; what is kept is what was said."""
    store = Store(source)
    journal = Journal(store, ROOM)  # type: ignore[arg-type]
    growing: dict[str, Held] = {}  # how far each reply has come; what has ended is still in it for a while
    model: dict[str, list[str]] = {}
    chatting = 3

    async def pause(most: int) -> None:
        for _ in range(source.randrange(most)):
            await asyncio.sleep(0)

    async def chat(conversation: str) -> None:
        nonlocal chatting
        said = model[conversation] = list[str]()
        for number in range(source.randrange(1, 7)):
            await pause(10)
            try:
                items = await journal.read("ann", conversation)
            except DatabaseUnavailable:
                continue
            assert [item.content for item in items] == said
            position = source.choice([len(items), len(items), 2 * source.randrange(len(items) // 2 + 1)])
            id = f"{conversation}.{number}"
            await journal.add(begun(id, position, conversation))
            said[position:] = [f"q{id}", f"a{id}"]
            growing[id] = replace(ended(id, conversation), reply=reply(id, "a"))
            await pause(10)
            growing[id] = ended(id, conversation)
            await journal.end(growing[id])
            del growing[id]
        chatting -= 1

    async def write_along() -> None:
        while chatting:
            await pause(6)
            await asyncio.sleep(0)
            replies = [*growing]
            await journal.write(growing[id].reply for id in replies if id in growing)

    async def come_and_go() -> None:
        while chatting:
            await asyncio.sleep(0)
            await pause(30)
            store.broken = not store.broken

    await asyncio.gather(*(chat(f"conv{number}") for number in range(chatting)), write_along(), come_and_go())
    store.broken = False
    assert await journal.write([])
    assert journal.unwritten == 0
    assert journal.trouble is None
    for conversation, said in model.items():
        assert [item.content for item in store.said(conversation)] == said
        assert [item.status for item in store.said(conversation)][1::2] == ["completed"] * (len(said) // 2)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """An event loop for many examples, of whose troubles nothing is logged."""
    logger = logging.getLogger("parley")
    logger.disabled = True
    with asyncio.Runner() as runner:
        yield runner
    logger.disabled = False


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=True))
def test_nothing_is_lost_doubled_or_out_of_order_however_the_database_comes_and_goes(
    loop: asyncio.Runner, source: random.Random
) -> None:
    loop.run(chatted(source))
