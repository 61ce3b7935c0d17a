from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from models.errors import ConversationLockedError, NotStoredError
from models.generation.interface import Listener, NewConversation, ResponseRequest, StoredConversation
from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.protocols.client import Close
from models.protocols.plain_text import WAITING, PlainTextSession
from models.store.item import Status
from tests.support.fake_client import FakeClient
from tests.support.fake_responses import FakeResponses, answer, conclude, perform

pytestmark = pytest.mark.anyio

DEFAULTS = Options(seed=3)


class Connection:
    """A session and its client."""

    def __init__(self, fake: FakeResponses) -> None:
        self.client = FakeClient()
        self.session = PlainTextSession(fake, ModelList([ModelInfo("scripted", 4096, DEFAULTS)]), "ann", self.client)

    def send(self, *messages: str | bytes) -> None:
        for message in messages:
            assert self.session.receive(message) is None

    async def frame(self) -> str:
        """The next text frame."""
        return str(await self.client.sent.get())

    async def text(self, length: int) -> str:
        """The next characters, in however many frames."""
        return await self.client.text(length)


@pytest.fixture
async def fake() -> FakeResponses:
    """A response service whose replies the test writes."""
    return FakeResponses()


@pytest.fixture
async def connection(fake: FakeResponses) -> AsyncIterator[Connection]:
    connection = Connection(fake)
    yield connection
    connection.session.close()


async def test_messages_are_answered_in_order_in_pieces(connection: Connection, fake: FakeResponses) -> None:
    connection.send("one", "two")
    first = await fake.next()
    assert fake.waiting == 0
    answer(first, "say first")
    assert [await connection.frame() for _ in range(2)] == ["firs", "t"]
    answer(await fake.next(), "say second")
    assert await connection.text(6) == "second"
    contents = [[message["content"] for message in asked.chat.messages] for asked in fake.asked]
    assert contents == [["one"], ["two"]]
    assert {asked.user for asked in fake.asked} == {"ann"}
    assert [asked.chat.options for asked in fake.asked] == [DEFAULTS, DEFAULTS]


async def test_the_connection_is_one_conversation(connection: Connection, fake: FakeResponses) -> None:
    for text in ("one", "two"):
        connection.send(text)
        answer(await fake.next(), f"say {text}")
        await connection.text(3)
    first, second = [asked.target for asked in fake.asked]
    assert isinstance(first, NewConversation)
    assert first.listed
    assert second == StoredConversation(first.id, create=True)


async def test_an_empty_message_is_ignored(connection: Connection, fake: FakeResponses) -> None:
    connection.send("", "  \n", "yes")
    answer(await fake.next(), "say yes")
    assert await connection.text(3) == "yes"
    assert len(fake.asked) == 1


async def test_a_frame_of_bytes_is_text(connection: Connection, fake: FakeResponses) -> None:
    for frame, text in (("广州".encode(), "广州"), (b"\xff", "\ufffd")):
        connection.send(frame)
        answer(await fake.next(), "say ok")
        await connection.text(2)
        assert fake.asked[-1].chat.messages[0]["content"] == text


async def test_only_the_text_of_a_reply_is_sent(connection: Connection, fake: FakeResponses) -> None:
    connection.send("Hi")
    answer(await fake.next(), "think hm, hm | say yes | call f {} | say no")
    assert [await connection.frame() for _ in range(2)] == ["yes", "no"]
    connection.session.presence_changed("left", "bob")
    assert (await connection.frame()).startswith("Client")


async def test_a_ninth_waiting_message_closes_the_connection(connection: Connection, fake: FakeResponses) -> None:
    connection.send("a")
    await fake.next()
    connection.send(*["b"] * WAITING)
    assert connection.session.receive("b") == Close(1013, "8 messages are waiting already")


async def test_a_user_who_left_is_named_between_replies(connection: Connection, fake: FakeResponses) -> None:
    connection.session.presence_changed("joined", "bob")
    connection.session.presence_changed("left", "bob")
    assert await connection.frame() == "Client #bob left the chat"
    connection.send("Hi")
    response = await fake.next()
    response.announce()
    perform(response, "say here")
    assert await connection.text(4) == "here"
    connection.session.presence_changed("left", "eve")
    assert connection.client.rest() == []
    conclude(response, "stop")
    assert await connection.frame() == "Client #eve left the chat"


async def test_a_failed_reply_ends_with_an_error_line(connection: Connection, fake: FakeResponses) -> None:
    connection.send("Hi", "again")
    response = await fake.next()
    response.announce()
    perform(response, "say it")
    response.status, response.reason = Status.FAILED, "server_error"
    conclude(response)
    answer(await fake.next(), "say on")
    assert [await connection.frame() for _ in range(3)] == ["it", "error: the server failed; try again", "on"]


async def test_a_refused_message_gets_an_error_line(connection: Connection, fake: FakeResponses) -> None:
    connection.send("one", "two")
    (await fake.next()).reject(ConversationLockedError())
    assert (await connection.frame()).startswith("error: a reply is running in this conversation")
    answer(await fake.next(), "say two")
    assert await connection.text(3) == "two"


async def test_a_message_that_is_refused_at_once_gets_an_error_line() -> None:
    class Locked(FakeResponses):
        def create(self, request: ResponseRequest, listener: Listener | None) -> str:
            id = super().create(request, listener)
            self._responses[id].reject(ConversationLockedError())
            return id

    connection = Connection(Locked())
    connection.send("one")
    assert (await connection.frame()).startswith("error: a reply is running in this conversation")
    connection.session.close()


async def test_a_storage_warning_comes_after_the_reply(connection: Connection, fake: FakeResponses) -> None:
    connection.send("Hi")
    response = await fake.next()
    response.announce()
    response.warn(NotStoredError())
    perform(response, "say something")
    conclude(response, "stop")
    frames = [await connection.frame() for _ in range(4)]
    assert "".join(frames[:3]) == "something"
    assert frames[3].startswith("error: messages cannot be stored at the moment")


async def test_a_reply_is_left_when_its_connection_closes(connection: Connection, fake: FakeResponses) -> None:
    connection.send("one", "two")
    response = await fake.next()
    response.announce()
    perform(response, "say on")
    assert await connection.text(2) == "on"
    connection.session.close()
    assert len(fake.left) == 1
    conclude(response, "stop")
    assert connection.client.rest() == []
    assert len(fake.asked) == 1
