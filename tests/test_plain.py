from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from models.conversations import Conversations
from models.listing import Listing
from models.plain import WAITING, PlainSession
from models.responses import Responses
from models.settings import Settings
from tests.scripted import ScriptedChat, running

pytestmark = pytest.mark.anyio


class Wire:
    """A plain session and what it sent."""

    def __init__(self, chat: ScriptedChat, responses: Responses) -> None:
        self.sent: asyncio.Queue[str] = asyncio.Queue()
        self.session = PlainSession(chat, responses, "ann", self.sent.put_nowait)  # type: ignore[arg-type]

    async def text(self, length: int) -> str:
        """The next so many characters."""
        text = ""
        while len(text) < length:
            text += await self.sent.get()
        return text


@pytest.fixture
async def wire(scripted: ScriptedChat, responses: Responses) -> AsyncIterator[Wire]:
    wire = Wire(scripted, responses)
    yield wire
    wire.session.close()


async def test_messages_are_answered_in_pieces_and_in_order(wire: Wire, scripted: ScriptedChat) -> None:
    wire.session.receive("say first")
    wire.session.receive("say second")
    assert await wire.text(11) == "firstsecond"
    assert [turn["content"] for turn in scripted.heard[-1][0]] == ["say first", "first", "say second"]


async def test_an_empty_message_is_ignored(wire: Wire, scripted: ScriptedChat) -> None:
    for message in ("", "  \n", "say yes"):
        assert wire.session.receive(message) is None
    assert await wire.text(3) == "yes"
    assert len(scripted.heard) == 1


async def test_eight_messages_may_wait_and_no_more(wire: Wire) -> None:
    wire.session.receive("wait a")
    await wire.text(1)
    assert [wire.session.receive("say b") for _ in range(WAITING)] == [None] * 8
    assert wire.session.receive("say b") == (1013, "8 messages wait already")


async def test_who_left_is_told_between_replies_and_never_inside_one(wire: Wire, scripted: ScriptedChat) -> None:
    wire.session.presence("joined", "bob")
    wire.session.presence("left", "bob")
    assert await wire.sent.get() == "Client #bob left the chat"
    wire.session.receive("wait here")
    assert await wire.text(4) == "here"
    wire.session.presence("left", "eve")
    assert wire.sent.empty()
    scripted.release()
    assert await wire.sent.get() == "Client #eve left the chat"


async def test_a_failure_is_said_and_the_next_message_answered(wire: Wire) -> None:
    wire.session.receive("break it")
    wire.session.receive("say on")
    assert [await wire.sent.get() for _ in range(3)] == ["it", "error: the server failed; try again", "on"]


async def test_a_refusal_is_said(wire: Wire, scripted: ScriptedChat) -> None:
    scripted.admission.per_user = 0
    wire.session.receive("say one")
    assert (await wire.sent.get()).startswith("error: 0 replies are in flight")


async def test_the_conversation_is_kept(wire: Wire, scripted: ScriptedChat, conversations: Conversations) -> None:
    wire.session.receive("say one")
    await wire.text(3)
    wire.session.receive("say two")
    await wire.text(3)
    wire.session.presence("left", "bob")
    assert (await wire.sent.get()).endswith("left the chat")  # so the reply has ended
    (conversation,), _ = await conversations.latest("ann", Listing(10, None, ""))
    items = await conversations.items("ann", conversation.id)
    assert [item.content for item in items] == ["say one", "one", "say two", "two"]


async def test_a_reply_goes_on_for_a_while_when_the_client_has_gone(
    wire: Wire, scripted: ScriptedChat, conversations: Conversations
) -> None:
    wire.session.receive("wait on")
    await wire.text(2)
    wire.session.close()
    assert scripted.running == 1


async def test_without_linger_closing_ends_the_reply(
    scripted: ScriptedChat, conversations: Conversations, settings: Settings
) -> None:
    async with running(scripted, conversations, settings, linger=0) as responses:
        wire = Wire(scripted, responses)
        wire.session.receive("wait on")
        await wire.text(2)
        wire.session.close()
        await scripted.idle.wait()
        assert scripted.running == 0
