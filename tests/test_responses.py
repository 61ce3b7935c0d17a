from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from models import database
from models.conversations import ConversationNotFound, Conversations
from models.events import Json, ResponseCreate
from models.item import Item
from models.listing import Listing
from models.options import Options
from models.response import BATCH, Response
from models.responses import ConversationBusy, ResponseNotFound, Responses
from models.settings import Settings
from tests.scripted import ScriptedChat, running

pytestmark = pytest.mark.anyio


class Client:
    """A connection that is told of replies. While `reading` is cleared it has more to read than it can, and `behind`
    is set once somebody waits for it."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[Json] = asyncio.Queue()
        self.reading, self.behind = asyncio.Event(), asyncio.Event()
        self.reading.set()

    def send(self, event: Json) -> None:
        self.heard.put_nowait(event)

    async def drained(self) -> None:
        self.behind.set()
        await self.reading.wait()

    async def until(self, type: str) -> list[Json]:
        """Everything up to the next event of a type, that included."""
        events = [await self.heard.get()]
        while events[-1]["type"] != type:
            events.append(await self.heard.get())
        return events

    async def deltas(self) -> list[tuple[int, str]]:
        """The numbered deltas up to the end of the reply."""
        events = await self.until("response.done")
        return [(event["sequence_number"], event["delta"]) for event in events if "delta" in event]


class SlowConversations(Conversations):
    """A store that is as slow, or as broken, as a test wants: `adding` and `writing` let it do so, while set; `asked`
    and `written` tell that it should add, and that it has written."""

    def __init__(self, database: Any) -> None:
        super().__init__(database)
        self.adding, self.asked = asyncio.Event(), asyncio.Event()
        self.writing, self.written = asyncio.Event(), asyncio.Event()
        self.adding.set()
        self.writing.set()
        self.broken = False

    async def add(self, user: str, id: str, position: int, new: Sequence[Item]) -> None:
        self.asked.set()
        await self.adding.wait()
        if self.broken:
            raise OSError("the disk is full")
        await super().add(user, id, position, new)

    async def write(self, replies: Iterable[Item]) -> None:
        await self.writing.wait()
        if self.broken:
            raise OSError("the disk is full")
        replies = list(replies)
        await super().write(replies)
        if replies:
            self.written.set()


@pytest.fixture
async def conversations(settings: Settings) -> AsyncIterator[SlowConversations]:
    async with database.opened(settings) as opened:
        yield SlowConversations(opened)


@pytest.fixture
def client() -> Client:
    return Client()


def asked(
    input: str, conversation: str | None = "conv_1", user: str = "ann", after: str | None = None, **options: Any
) -> Response:
    request = ResponseCreate("mine", [{"role": "user", "content": input}], conversation, after)
    return Response(user, request, conversation, True, Options().updated(options))


async def said(conversations: Conversations, conversation: str = "conv_1", user: str = "ann") -> list[str]:
    return [item.content for item in await conversations.items(user, conversation)]


async def answered(responses: Responses, response: Response) -> None:
    """Have a reply made, and wait for it."""
    client = Client()
    responses.create(response, client)
    await client.until("response.done")


async def begun(responses: Responses, client: Client, input: str) -> Response:
    """A reply that has said something and goes on."""
    response = asked(input)
    responses.create(response, client)
    await client.until("response.output_text.delta")
    return response


# What is kept


async def test_the_message_is_kept_before_its_reply_begins(
    responses: Responses, conversations: SlowConversations, client: Client, scripted: ScriptedChat
) -> None:
    conversations.adding.clear()
    responses.create(asked("wait on"), client)
    await conversations.asked.wait()
    assert client.heard.empty()
    conversations.adding.set()
    await client.until("response.created")
    message, reply = await conversations.items("ann", "conv_1")
    assert (message.role, message.content, message.status) == ("user", "wait on", None)
    assert (reply.role, reply.content, reply.status) == ("assistant", "", "in_progress")


async def test_a_reply_is_kept_as_it_grows(
    responses: Responses, conversations: SlowConversations, client: Client
) -> None:
    responses.create(asked("wait half a reply"), client)
    await conversations.written.wait()
    _, reply = await conversations.items("ann", "conv_1")
    assert (reply.content, reply.status, reply.deltas) == ("half a reply", "in_progress", ["half", " a r", "eply"])


async def test_a_reply_is_kept_with_its_end_usage_and_options_before_its_end_is_told(
    responses: Responses, conversations: SlowConversations, client: Client
) -> None:
    responses.create(asked("say all of it", seed=3, temperature=Options().temperature), client)
    done = (await client.until("response.done"))[-1]
    _, reply = await conversations.items("ann", "conv_1")
    assert (reply.content, reply.status, reply.reason) == ("all of it", "completed", "stop")
    assert reply.options == {"seed": 3}
    assert (reply.usage, reply.decode_seconds) == (done["response"]["usage"], done["response"]["decode_seconds"])
    assert reply.usage == {"input_tokens": 1, "cached_tokens": 0, "output_tokens": 3, "total_tokens": 4}


async def test_deltas_do_not_wait_for_the_disk(
    responses: Responses, conversations: SlowConversations, client: Client
) -> None:
    conversations.writing.clear()
    responses.create(asked("say it all at once"), client)
    while (event := await client.heard.get()).get("sequence_number") != 4:
        assert event["type"] != "response.done"
    assert event["delta"] == "ce"
    await asyncio.sleep(0)
    assert client.heard.empty()
    conversations.writing.set()
    await client.until("response.done")


async def test_a_reply_that_cannot_be_written_down_is_told_all_the_same_and_written_later(
    responses: Responses, conversations: SlowConversations, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    responses.create(asked("wait here"), client)
    await client.until("response.created")
    conversations.broken = True
    reply = (await client.until("response.output_text.delta"))[-1]["response_id"]
    responses.cancel("ann", reply)
    done = (await client.until("response.done"))[-1]
    assert (done["response"]["status"], done["response"]["output_text"]) == ("cancelled", "here")
    assert "cannot be written down" in caplog.text
    await responses.follow("ann", reply, 1, client)
    assert await client.heard.get() == done
    conversations.broken = False
    conversations.written.clear()
    await conversations.written.wait()
    assert [item.status for item in await conversations.items("ann", "conv_1")] == [None, "cancelled"]


async def test_a_message_that_cannot_be_kept_is_answered_told_of_and_kept_later(
    responses: Responses, conversations: SlowConversations, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    conversations.broken = True
    responses.create(asked("say one"), client)
    created, warning, *_, done = await client.until("response.done")
    assert (created["type"], done["response"]["output_text"]) == ("response.created", "one")
    assert (warning["error"]["code"], warning["error"]["response_id"]) == ("not_kept", created["response"]["id"])
    assert "event_id" not in warning["error"], "it would pass for a refusal"
    assert responses.trouble
    assert caplog.text.count("cannot be written down") == 1
    conversations.broken = False
    conversations.written.clear()
    await conversations.written.wait()
    await answered(responses, asked("say two"))
    assert await said(conversations) == ["say one", "one", "say two", "two"]
    assert responses.trouble is None


async def test_a_chat_goes_on_with_what_could_not_be_kept_yet(
    responses: Responses, conversations: SlowConversations, client: Client, scripted: ScriptedChat
) -> None:
    await answered(responses, asked("say one"))
    conversations.broken = True
    for text in ("say two", "say three"):
        responses.create(asked(text), client)
        await client.until("response.done")
    assert await said(conversations) == ["say one", "one"]
    assert [message["content"] for message in scripted.heard[-1][0]] == [
        "say one",
        "one",
        "say two",
        "two",
        "say three",
    ]
    conversations.broken = False
    await answered(responses, asked("say four"))
    conversations.written.clear()
    await conversations.written.wait()
    everything = ["say one", "one", "say two", "two", "say three", "three", "say four", "four"]
    assert await said(conversations) == everything
    assert [item.status for item in await conversations.items("ann", "conv_1")][1::2] == ["completed"] * 4


async def test_a_cancel_while_the_message_is_being_kept_leaves_no_reply_without_an_end(
    responses: Responses, conversations: SlowConversations, client: Client, scripted: ScriptedChat
) -> None:
    conversations.adding.clear()
    responses.create(asked("wait one"), client)
    await conversations.asked.wait()
    responses.cancel_all(client)
    conversations.adding.set()
    created, *_, done = await client.until("response.done")
    assert (created["type"], done["response"]["status"]) == ("response.created", "cancelled")
    assert scripted.running == 0
    assert [item.status for item in await conversations.items("ann", "conv_1")] == [None, "cancelled"]


async def test_replies_that_the_server_ends_are_kept_as_failed(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings, client: Client
) -> None:
    async with running(scripted, conversations, settings) as responses:
        await begun(responses, client, "wait half")
    _, reply = await conversations.items("ann", "conv_1")
    assert (reply.content, reply.status, reply.reason) == ("half", "failed", "server_shutdown")
    assert scripted.running == 0


async def test_replies_that_ended_with_their_process_have_failed_when_the_next_begins(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    cut_off = Item("resp_1", "assistant", "hal", 1.0, "in_progress", cuts="3")
    await conversations.add("ann", "conv_1", 0, [cut_off])
    async with running(scripted, conversations, settings):
        (reply,) = await conversations.items("ann", "conv_1")
    assert (reply.content, reply.status, reply.reason) == ("hal", "failed", "server_error")
    assert "1 replies had been cut off" in caplog.text


async def test_nothing_of_a_refused_message_is_kept(
    responses: Responses, conversations: SlowConversations, client: Client, scripted: ScriptedChat
) -> None:
    await answered(responses, asked("say one"))
    scripted.admission.per_user = 0
    responses.create(asked("say two", after="none"), client)
    assert (await client.until("error"))[-1]["error"]["code"] == "too_many_responses"
    assert await said(conversations) == ["say one", "one"]


# Conversations


async def test_asking_after_an_item_drops_what_followed_it(
    responses: Responses, conversations: SlowConversations, scripted: ScriptedChat
) -> None:
    first = asked("say one")
    await answered(responses, first)
    await answered(responses, asked("say two"))
    await answered(responses, asked("say three", after=first.id))
    assert [turn["content"] for turn in scripted.heard[-1][0]] == ["say one", "one", "say three"]
    assert await said(conversations) == ["say one", "one", "say three", "three"]
    await answered(responses, asked("say four", after="none"))
    assert await said(conversations) == ["say four", "four"]


async def test_asking_after_what_is_not_there_loses_nothing(
    responses: Responses, conversations: SlowConversations, client: Client
) -> None:
    await answered(responses, asked("say one"))
    responses.create(asked("say two", after="item_nobody"), client)
    error = (await client.until("error"))[-1]["error"]
    assert (error["code"], error["param"], error["event_id"]) == ("item_not_found", "response.after", "mine")
    assert await said(conversations) == ["say one", "one"]


async def test_a_conversation_is_busy_until_its_reply_is_done_and_no_longer(
    responses: Responses, client: Client, scripted: ScriptedChat
) -> None:
    await begun(responses, client, "wait one")
    with pytest.raises(ConversationBusy):
        responses.create(asked("say two"), client)
    responses.create(replace(asked("say three", user="bob"), begins=False), client)
    assert (await client.until("error"))[-1]["error"]["code"] == "conversation_not_found"  # not busy, to bob
    scripted.release()
    await client.until("response.done")
    responses.create(asked("say four"), client)


async def test_a_conversation_that_has_to_be_there_is_not_found_where_it_is_somebody_elses(
    responses: Responses, conversations: SlowConversations, client: Client
) -> None:
    await answered(responses, asked("say one"))
    responses.create(replace(asked("say two", user="bob"), begins=False), client)
    assert (await client.until("error"))[-1]["error"]["code"] == ConversationNotFound.code
    assert await said(conversations) == ["say one", "one"]


async def test_a_conversation_is_deleted_by_its_user_alone_after_the_end_of_the_reply_in_it(
    responses: Responses, conversations: SlowConversations, client: Client, scripted: ScriptedChat
) -> None:
    await begun(responses, client, "wait one")
    with pytest.raises(ConversationNotFound):
        await responses.delete("bob", "conv_1")
    assert scripted.running == 1
    await responses.delete("ann", "conv_1")
    assert scripted.running == 0
    assert await conversations.latest("ann", Listing(9, None, "")) == ([], False)
    assert (await client.until("response.done"))[-1]["response"]["status"] == "cancelled"


# Following


@pytest.mark.parametrize("conversation", ["conv_1", None], ids=["kept", "none"])
@pytest.mark.parametrize("finished", [False, True])
async def test_a_reply_can_be_followed_from_every_number(
    responses: Responses, scripted: ScriptedChat, client: Client, conversation: str | None, finished: bool
) -> None:
    response = asked("wait for a few short words", conversation)
    responses.create(response, client)
    while len(response.deltas) < 6:
        await client.heard.get()
    if finished:
        scripted.release()
        await client.until("response.done")
    readers = [Client() for _ in range(9)]
    for number, reader in enumerate(readers):
        await responses.follow("ann", response.id, number, reader)
    scripted.release()
    whole = list(enumerate(response.deltas, start=1))
    assert "".join(delta for _, delta in whole) == "for a few short words"
    assert [await reader.deltas() for reader in readers] == [whole[number:] for number in range(9)]


async def test_two_readers_hear_the_same(responses: Responses, scripted: ScriptedChat, client: Client) -> None:
    response, other = asked("hold on a little"), Client()
    responses.create(response, client)
    assert (await client.until("response.queued"))[-1]["position"] == 3
    await responses.follow("ann", response.id, 0, other)
    assert (await other.heard.get())["position"] == 3
    scripted.release()
    for _ in range(3):
        await client.until("response.output_text.delta")
    scripted.release()
    assert await other.deltas() == [(1, "on a"), (2, " lit"), (3, "tle")]


async def test_who_is_behind_catches_up_in_order_while_the_reply_goes_on(
    responses: Responses, scripted: ScriptedChat, client: Client
) -> None:
    response, slow = asked("wait " + "word" * (2 * BATCH + 5)), Client()
    responses.create(response, client)
    while len(response.deltas) < 2 * BATCH + 5:
        await client.heard.get()
    slow.reading.clear()
    following = asyncio.create_task(responses.follow("ann", response.id, 0, slow))
    await slow.behind.wait()
    scripted.release()
    await client.until("response.done")
    assert slow.heard.qsize() == BATCH
    slow.reading.set()
    await following
    assert await slow.deltas() == list(enumerate(response.deltas, start=1))


async def test_who_follows_again_hears_nothing_twice_after_that(
    responses: Responses, scripted: ScriptedChat, client: Client
) -> None:
    response = asked("wait for it")
    responses.create(response, client)
    while len(response.deltas) < 2:
        await client.heard.get()
    again = Client()
    for _ in range(2):
        await responses.follow("ann", response.id, 1, again)
    scripted.release()
    assert await again.deltas() == [(2, response.deltas[1]), (2, response.deltas[1])]
    assert again.heard.empty()


async def test_somebody_elses_reply_is_not_found_live_or_ended(responses: Responses, scripted: ScriptedChat) -> None:
    client = Client()
    live, held, kept = asked("wait here", "conv_2"), asked("say held", None), asked("say kept")
    responses.create(live, client)
    await client.until("response.output_text.delta")
    for response in (held, kept):
        await answered(responses, response)
    for response in (live, held, kept):
        with pytest.raises(ResponseNotFound):
            await responses.follow("bob", response.id, 0, client)
        with pytest.raises(ResponseNotFound):
            responses.cancel("bob", response.id)
    assert client.heard.empty()
    assert scripted.running == 1


# Lingering


async def test_without_linger_a_reply_ends_when_nobody_listens(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings, client: Client
) -> None:
    async with running(scripted, conversations, settings, linger=0) as responses:
        response, other = await begun(responses, client, "wait here"), Client()
        await responses.follow("ann", response.id, 0, other)
        responses.leave(client)
        responses.leave(other)
        await scripted.idle.wait()
        await asyncio.wait([response.ending])
        _, reply = await conversations.items("ann", "conv_1")
        assert (reply.content, reply.status, reply.reason) == ("here", "cancelled", "client_disconnected")


async def test_who_comes_back_in_time_finds_the_reply_going_on(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings, client: Client
) -> None:
    async with running(scripted, conversations, settings, linger=0) as responses:
        response, other = await begun(responses, client, "wait here"), Client()
        responses.leave(client)
        await responses.follow("ann", response.id, 0, other)  # before the event loop looks at its timers again
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        scripted.release()
        assert (await other.until("response.done"))[-1]["response"]["status"] == "completed"
        assert client.heard.empty()


async def test_a_reply_of_no_conversation_is_held_while_there_is_room_and_linger_lasts(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings, client: Client
) -> None:
    async with running(scripted, conversations, settings, replay_bytes=30_000) as responses:
        replies = [asked(f"say {'x' * 9_000}", None) for _ in range(4)]
        for reply in replies:
            await answered(responses, reply)
        with pytest.raises(ResponseNotFound):
            await responses.follow("ann", replies[0].id, 0, client)
        await responses.follow("ann", replies[-1].id, 0, client)
        assert "".join(delta for _, delta in await client.deltas()) == "x" * 9_000
    async with running(scripted, conversations, settings, linger=0) as responses:
        reply = asked("say gone", None)
        await answered(responses, reply)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(ResponseNotFound):
            await responses.follow("ann", reply.id, 0, client)


async def test_the_completions_of_a_user_end_with_the_secret_and_nobody_elses(
    responses: Responses, scripted: ScriptedChat
) -> None:
    completions = [replace(asked("wait here", None, user), completion=True) for user in ("ann", "bob")]
    clients = [Client(), Client()]
    for completion, client in zip(completions, clients, strict=True):
        responses.create(completion, client)
        await client.until("response.output_text.delta")
    responses.revoke("ann")
    assert (await clients[0].until("response.done"))[-1]["response"]["status_details"] == {"reason": "revoked"}
    assert scripted.running == 1
