from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from models.generation.interface import ModelInfo, ResponseRequest, StoredConversation
from models.generation.manager import ResponseManager
from models.options import Options
from models.protocols.client import Close
from models.protocols.plain_text import WAITING, PlainTextSession
from models.settings import Settings
from models.store.conversations import Conversations, Listing
from tests.support.fake_client import FakeClient, FakeListener
from tests.support.scripted import ScriptedChat, running
from tests.support.stores import AwayConversations

pytestmark = pytest.mark.anyio

DEFAULTS = Options(seed=3)


class Connection:
    """A session and its client."""

    def __init__(self, responses: ResponseManager) -> None:
        self.client = FakeClient()
        self.session = PlainTextSession(responses, ModelInfo("scripted", 4096, DEFAULTS), "ann", self.client)

    def send(self, *messages: str) -> None:
        for message in messages:
            assert self.session.receive(message) is None

    async def frame(self) -> str:
        """The next text frame."""
        return str(await self.client.sent.get())

    async def text(self, length: int) -> str:
        """The next characters, in however many frames."""
        return await self.client.text(length)


@pytest.fixture
async def connection(responses: ResponseManager) -> AsyncIterator[Connection]:
    connection = Connection(responses)
    yield connection
    connection.session.close()


async def test_messages_are_answered_in_order_in_pieces(connection: Connection, scripted: ScriptedChat) -> None:
    connection.send("say first", "say second")
    assert await connection.frame() == "firs"
    assert await connection.text(7) == "tsecond"
    messages, options = scripted.heard[-1]
    assert [message["content"] for message in messages] == ["say first", "first", "say second"]
    assert options == DEFAULTS


async def test_an_empty_message_is_ignored(connection: Connection, scripted: ScriptedChat) -> None:
    connection.send("", "  \n", "say yes")
    assert await connection.text(3) == "yes"
    assert len(scripted.heard) == 1


async def test_a_frame_of_bytes_is_text(connection: Connection) -> None:
    assert connection.session.receive("say 广州".encode()) is None
    assert await connection.text(2) == "广州"
    assert connection.session.receive(b"say \xff") is None
    assert await connection.text(1) == "\ufffd"


async def test_a_ninth_waiting_message_closes_the_connection(connection: Connection) -> None:
    connection.send("wait a")
    await connection.text(1)
    connection.send(*["say b"] * WAITING)
    assert connection.session.receive("say b") == Close(1013, "8 messages are waiting already")


async def test_a_user_who_left_is_named_between_replies(connection: Connection, scripted: ScriptedChat) -> None:
    connection.session.presence_changed("joined", "bob")
    connection.session.presence_changed("left", "bob")
    assert await connection.frame() == "Client #bob left the chat"
    connection.send("wait here")
    assert await connection.text(4) == "here"
    connection.session.presence_changed("left", "eve")
    assert connection.client.sent.empty()
    scripted.release()
    assert await connection.frame() == "Client #eve left the chat"


async def test_a_failed_reply_ends_with_an_error_line(connection: Connection) -> None:
    connection.send("break it", "say on")
    assert [await connection.frame() for _ in range(3)] == ["it", "error: the server failed; try again", "on"]


async def test_a_refused_message_gets_an_error_line(connection: Connection, scripted: ScriptedChat) -> None:
    scripted.admission.per_user = 0
    connection.send("say one")
    assert (await connection.frame()).startswith("error: you have 0 replies running or waiting")
    scripted.admission.per_user = 1
    connection.send("say two")
    assert await connection.text(3) == "two"


async def test_a_busy_conversation_gets_an_error_line(
    connection: Connection, scripted: ScriptedChat, responses: ResponseManager, conversations: Conversations
) -> None:
    connection.send("say one")
    await connection.text(3)
    connection.session.presence_changed("left", "bob")
    await connection.frame()  # so the reply has ended
    (conversation,), _ = await conversations.list_page("ann", Listing())
    request = ResponseRequest(
        "ann", [{"role": "user", "content": "wait"}], DEFAULTS, StoredConversation(conversation.id)
    )
    responses.create(request, FakeListener())
    connection.send("say two")
    assert (await connection.frame()).startswith("error: a reply is running in this conversation")


async def test_a_storage_warning_comes_after_the_reply(
    conversations: Conversations, scripted: ScriptedChat, settings: Settings
) -> None:
    away = AwayConversations(conversations._database)
    async with running(scripted, away, settings) as responses:
        away.broken = True
        connection = Connection(responses)
        connection.send("say something")
        frames = [await connection.frame() for _ in range(4)]
        away.broken = False
        connection.session.close()
    assert "".join(frames[:3]) == "something"
    assert frames[3].startswith("error: messages cannot be stored at the moment")


async def test_the_conversation_is_stored(connection: Connection, conversations: Conversations) -> None:
    connection.send("say one")
    await connection.text(3)
    connection.send("say two")
    await connection.text(3)
    connection.session.presence_changed("left", "bob")
    assert (await connection.frame()).endswith("left the chat")  # so the reply has ended
    (conversation,), _ = await conversations.list_page("ann", Listing(10, None, ""))
    items = await conversations.items("ann", conversation.id)
    assert [item.content for item in items] == ["say one", "one", "say two", "two"]


async def test_a_reply_goes_on_when_its_connection_closes(connection: Connection, scripted: ScriptedChat) -> None:
    connection.send("wait on")
    await connection.text(2)
    connection.session.close()
    assert scripted.running == 1


async def test_without_linger_a_closed_connection_ends_its_reply(
    scripted: ScriptedChat, conversations: Conversations, settings: Settings
) -> None:
    async with running(scripted, conversations, settings, linger=0) as responses:
        connection = Connection(responses)
        connection.send("wait on")
        await connection.text(2)
        connection.session.close()
        await scripted.idle.wait()
        assert scripted.running == 0
