from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from models.chat_request import ChatRequest
from models.errors import (
    APIError,
    ContextLengthExceededError,
    ConversationLockedError,
    ConversationNotFoundError,
    DatabaseUnavailableError,
    EngineError,
    FormatFailedError,
    ItemNotFoundError,
    MessagesRejectedError,
    NotStoredError,
    PreviousResponseNotFoundError,
    QueueFullError,
    RateLimitExceededError,
    ResponseNotFoundError,
    ServerError,
    ServerStoppingError,
    ServerUnavailableError,
    TooManyResponsesError,
)
from models.generation.admission import Admission
from models.generation.events import (
    Created,
    Finished,
    OutputDelta,
    OutputItemAdded,
    OutputItemDone,
    Queued,
    Rejected,
    ResponseEvent,
    Warned,
)
from models.generation.interface import (
    Branch,
    NewConversation,
    ResponseRequest,
    Stateless,
    StoredConversation,
    Target,
    Unstored,
)
from models.generation.manager import ResponseManager
from models.generation.rate_limiter import RateLimiter
from models.generation.response import BATCH
from models.language.events import Event
from models.messages import Message
from models.options import Options
from models.settings import Settings
from models.store.conversations import Conversations, Listing
from models.store.database import open_database
from models.store.item import Edge, Item, Status, part_id
from tests.support.fake_client import FakeListener
from tests.support.scripted import ScriptedChat, ScriptedReply, running
from tests.support.stores import AwayConversations, SlowConversations
from tests.support.trees import begin, growing, message

pytestmark = pytest.mark.anyio

CONVERSATION = StoredConversation("conv_1", create=True)
TARGETS = {
    "stateless": Stateless(),
    "unstored": Unstored(),
    "new conversation": NewConversation("conv_1"),
    "stored conversation": CONVERSATION,
}


def each_target(*names: str) -> pytest.MarkDecorator:
    """Run a test with some targets, or with all."""
    return pytest.mark.parametrize("target", [pytest.param(TARGETS[name], id=name) for name in names or TARGETS])


@pytest.fixture
async def conversations(settings: Settings) -> AsyncIterator[SlowConversations]:
    async with open_database(settings) as database:
        yield SlowConversations(database)


@pytest.fixture
def listener() -> FakeListener:
    return FakeListener()


def request(message: str, target: Target = CONVERSATION, user: str = "ann", **options: Any) -> ResponseRequest:
    """A request for a reply to one message, by default in the conversation conv_1 of ann."""
    messages: list[Message] = [{"role": "user", "content": message}]
    return ResponseRequest(ChatRequest(user, messages, Options().updated(options), truncate=True), target)


async def run(responses: ResponseManager, request: ResponseRequest) -> Item:
    """The finished reply to a request."""
    listener = FakeListener()
    responses.create(request, listener)
    return (await listener.next(Finished)).reply


async def run_rejected(responses: ResponseManager, request: ResponseRequest) -> APIError:
    """The error of a request that is rejected."""
    listener = FakeListener()
    responses.create(request, listener)
    return (await listener.next(Rejected)).error


async def start(responses: ResponseManager, listener: FakeListener, request: ResponseRequest, deltas: int = 1) -> str:
    """The id of a new reply that has told some text deltas."""
    id = responses.create(request, listener)
    for _ in range(deltas):
        await listener.next(OutputDelta)
    return id


def comparable(event: ResponseEvent) -> ResponseEvent:
    """An event without what only the store knows, or only the first listener is told."""
    if isinstance(event, OutputDelta):
        return structs.replace(event, usage=None)
    if isinstance(event, Created | Finished):
        return structs.replace(event, reply=replace(event.reply, parent=None))
    return event


async def items(conversations: Conversations, conversation: str = "conv_1") -> Sequence[Item]:
    """The stored items of the current branch of a conversation of ann."""
    return (await conversations.path("ann", conversation)).items


async def deltas_of(listener: FakeListener) -> list[str]:
    """The deltas up to the end of the reply."""
    return [event.text for event in await listener.until(Finished) if isinstance(event, OutputDelta)]


async def contents(conversations: Conversations, conversation: str = "conv_1") -> list[str]:
    """The contents of the stored items of a conversation of ann."""
    return [item.content for item in await items(conversations, conversation)]


async def statuses(conversations: Conversations) -> list[Status | None]:
    """The stored statuses of the items of ann's conversation conv_1; None for messages."""
    return [item.status for item in await items(conversations)]


def last_prompt(scripted: ScriptedChat) -> list[str]:
    """The messages that the chat was asked with last."""
    messages, _ = scripted.heard[-1]
    return [message["content"] for message in messages]


async def store_again(conversations: SlowConversations) -> None:
    """Repair the database, and wait until what waits in memory is stored."""
    conversations.broken = False
    conversations.updated.clear()
    await conversations.updated.wait()


# The events of a reply


@each_target()
async def test_a_reply_tells_created_then_deltas_then_finished(
    responses: ResponseManager, listener: FakeListener, target: Target
) -> None:
    id = responses.create(request("say yes or no", target), listener)
    created, *deltas, finished = await listener.until(Finished)
    conversation = "conv_1" if isinstance(target, NewConversation | StoredConversation) else None
    assert isinstance(created, Created)
    assert (created.conversation, created.response_id, created.reply.status) == (conversation, id, Status.IN_PROGRESS)
    assert [type(event) for event in deltas] == [OutputItemAdded, *[OutputDelta] * 3, OutputItemDone]
    assert [event.text for event in deltas if isinstance(event, OutputDelta)] == ["yes ", "or n", "o"]
    assert isinstance(finished, Finished)
    assert finished.conversation == conversation
    assert (finished.reply.id, finished.reply.role, finished.reply.content) == (id, "assistant", "yes or no")
    assert (finished.reply.status, finished.reply.reason) == (Status.COMPLETED, "stop")


async def test_a_waiting_reply_tells_its_positions(responses: ResponseManager, listener: FakeListener) -> None:
    id = responses.create(request("queue up"), listener)
    assert (await listener.until(Finished))[1:3] == [Queued(id, 2), Queued(id, 1)]


# What can end a reply


async def nothing(responses: ResponseManager, listener: FakeListener, id: str) -> None:
    """The reply ends by itself."""


async def cancel(responses: ResponseManager, listener: FakeListener, id: str) -> None:
    await responses.cancel("ann", id)


async def cancel_all(responses: ResponseManager, listener: FakeListener, id: str) -> None:
    responses.cancel_all(listener)


async def abandon(responses: ResponseManager, listener: FakeListener, id: str) -> None:
    responses.abandon("ann", id)


async def revoke(responses: ResponseManager, listener: FakeListener, id: str) -> None:
    responses.revoke("ann")


async def delete_conversation(responses: ResponseManager, listener: FakeListener, id: str) -> None:
    await responses.delete_conversation("ann", "conv_1")


async def drain(responses: ResponseManager, listener: FakeListener, id: str) -> None:
    await responses.drain(0)


Act = Callable[[ResponseManager, FakeListener, str], Awaitable[None]]


@pytest.mark.parametrize(
    ("message", "target", "act", "status", "reason"),
    [
        pytest.param("say it", CONVERSATION, nothing, "completed", "stop", id="completes"),
        pytest.param("break it", CONVERSATION, nothing, "failed", "server_error", id="fails"),
        pytest.param("wait here", CONVERSATION, cancel, "cancelled", "client_cancelled", id="is cancelled"),
        pytest.param("hold it", CONVERSATION, cancel, "cancelled", "client_cancelled", id="is cancelled in the queue"),
        pytest.param("wait here", CONVERSATION, cancel_all, "cancelled", "client_cancelled", id="cancel_all"),
        pytest.param("wait here", Stateless(), abandon, "cancelled", "client_disconnected", id="is abandoned"),
        pytest.param("wait here", Stateless(), revoke, "failed", "revoked", id="user is revoked"),
        pytest.param("wait here", CONVERSATION, delete_conversation, "cancelled", "client_cancelled", id="is deleted"),
        pytest.param("wait here", Unstored(), drain, "failed", "server_shutdown", id="server stops"),
    ],
)
async def test_a_created_reply_tells_exactly_one_finished_event(
    scripted: ScriptedChat,
    conversations: SlowConversations,
    settings: Settings,
    listener: FakeListener,
    message: str,
    target: Target,
    act: Act,
    status: str,
    reason: str,
) -> None:
    async with running(scripted, conversations, settings) as responses:
        id = responses.create(request(message, target), listener)
        events = await listener.until(Queued if message == "hold it" else OutputDelta)
        await act(responses, listener, id)
        events += await listener.until(Finished)
    events += listener.rest()
    assert [type(event) for event in events if isinstance(event, Created | Rejected | Finished)] == [Created, Finished]
    assert isinstance(finished := events[-1], Finished)
    assert (finished.reply.id, finished.reply.status, finished.reply.reason) == (id, status, reason)
    assert scripted.running == 0


class FailingChat(ScriptedChat):
    """Raises an error while it prepares a reply."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def prepare(self, request: ChatRequest) -> ScriptedReply:
        raise self.error


@each_target()
@pytest.mark.parametrize(
    ("error", "told"),
    [
        pytest.param(MessagesRejectedError("no"), MessagesRejectedError, id="messages rejected"),
        pytest.param(ValueError("a bug"), ServerError, id="bug"),
    ],
)
async def test_a_rejected_reply_tells_exactly_one_event_and_stores_nothing(
    conversations: SlowConversations,
    settings: Settings,
    listener: FakeListener,
    caplog: pytest.LogCaptureFixture,
    target: Target,
    error: Exception,
    told: type[APIError],
) -> None:
    async with running(FailingChat(error), conversations, settings) as responses:
        id = responses.create(request("say one", target), listener)
        rejected = await listener.next(Rejected)
        with pytest.raises(ResponseNotFoundError):
            await responses.follow("ann", id, listener)
    assert (rejected.response_id, type(rejected.error)) == (id, told)
    assert listener.rest() == []
    assert await contents(conversations) == []
    assert [record.getMessage() for record in caplog.records if record.exc_info] == (
        [f"{id} failed"] if told is ServerError else []
    )


async def test_a_request_without_a_ticket_is_rejected(responses: ResponseManager, scripted: ScriptedChat) -> None:
    scripted.admission.shrink(0)
    assert isinstance(await run_rejected(responses, request("say one")), QueueFullError)
    scripted.admission.per_user = 0
    assert isinstance(await run_rejected(responses, request("say one")), TooManyResponsesError)
    scripted.admission.close()
    assert isinstance(await run_rejected(responses, request("say one")), ServerStoppingError)
    assert scripted.heard == []


class StuckChat(ScriptedChat):
    """Prepares the first reply forever; sets `preparing` when it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.preparing = asyncio.Event()

    async def prepare(self, request: ChatRequest) -> ScriptedReply:
        if not self.preparing.is_set():
            self.preparing.set()
            await asyncio.Event().wait()
        return await super().prepare(request)


@each_target()
async def test_a_reply_whose_prompt_is_being_made_can_be_cancelled(
    conversations: SlowConversations, settings: Settings, listener: FakeListener, target: Target
) -> None:
    chat = StuckChat()
    async with running(chat, conversations, settings) as responses:
        id = responses.create(request("say one", target), listener)
        await chat.preparing.wait()
        await responses.cancel("ann", id)
        created, finished = await listener.until(Finished)
        assert isinstance(created, Created)
        assert isinstance(finished, Finished)
        assert (finished.reply.status, finished.reply.reason) == (Status.CANCELLED, "client_cancelled")
        assert await contents(conversations) == ([] if isinstance(target, Stateless | Unstored) else ["say one", ""])
        assert (await run(responses, request("say two", Unstored()))).content == "two"


async def test_tokens_that_were_encoded_for_a_refused_request_count(
    conversations: SlowConversations, settings: Settings
) -> None:
    chat = FailingChat(ContextLengthExceededError("too long", tokens=100))
    chat.admission = Admission(slots=9, queue=9, per_user=9, rate_limiter=RateLimiter(tokens="100/day"))
    async with running(chat, conversations, settings) as responses:
        assert isinstance(await run_rejected(responses, request("say one")), ContextLengthExceededError)
        assert isinstance(await run_rejected(responses, request("say one")), RateLimitExceededError)


class BrokenEngineChat(ScriptedChat):
    """Its engine fails in the middle of a reply."""

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        async for event in super().events(reply):
            yield event
            raise EngineError("the log has the reason")


class DeadEndChat(ScriptedChat):
    """A chat whose replies cannot keep to their format after their first piece."""

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        async for event in super().events(reply):
            yield event
            raise FormatFailedError


async def test_a_reply_that_cannot_keep_to_its_format_has_a_reason_of_its_own(
    conversations: SlowConversations, settings: Settings
) -> None:
    async with running(DeadEndChat(), conversations, settings) as responses:
        reply = await run(responses, request("say something"))
    assert (reply.content, reply.status, reply.reason) == ("some", Status.FAILED, "format_failed")


async def test_an_engine_failure_fails_the_reply_without_a_traceback(
    conversations: SlowConversations, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(BrokenEngineChat(), conversations, settings) as responses:
        reply = await run(responses, request("say something"))
    assert (reply.content, reply.status, reply.reason) == ("some", Status.FAILED, "server_error")
    assert f"{reply.id} failed" in caplog.text
    assert not any(record.exc_info for record in caplog.records)


class ClosingChat(ScriptedChat):
    """Sets `closed` when the events of a reply are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = asyncio.Event()

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        try:
            async for event in super().events(reply):
                yield event
        finally:
            self.closed.set()


async def test_a_cancelled_reply_closes_the_events_of_its_chat(
    conversations: SlowConversations, settings: Settings, listener: FakeListener
) -> None:
    chat = ClosingChat()
    async with running(chat, conversations, settings) as responses:
        id = await start(responses, listener, request("wait here"))
        assert not chat.closed.is_set()
        await responses.cancel("ann", id)
        await listener.next(Finished)
        assert chat.closed.is_set()


# What each target means


class WholeChat(ScriptedChat):
    """Leaves out the two oldest messages, unless it has to take them whole."""

    async def prepare(self, request: ChatRequest) -> ScriptedReply:
        reply = await super().prepare(request)
        reply.left_out = 2 if request.truncate and len(request.messages) >= 3 else 0
        return reply


@each_target()
@pytest.mark.parametrize("truncate", [False, True])
async def test_messages_are_left_out_only_if_the_request_allows_it(
    conversations: SlowConversations, settings: Settings, listener: FakeListener, target: Target, truncate: bool
) -> None:
    messages: list[Message] = [{"role": "user", "content": f"say {word}"} for word in ("one", "two", "three")]
    async with running(WholeChat(), conversations, settings) as responses:
        asked = ChatRequest("ann", messages, Options(), truncate=truncate)
        responses.create(ResponseRequest(asked, target), listener)
        created = await listener.next(Created)
    assert created.reply.left_out == (2 if truncate else 0)


async def test_messages_that_were_left_out_stay_left_out(
    conversations: SlowConversations, settings: Settings, listener: FakeListener
) -> None:
    chat = WholeChat()
    async with running(chat, conversations, settings) as responses:
        for word, left_out in (("one", 0), ("two", 2), ("three", 4)):
            responses.create(request(f"say {word}"), listener)
            assert (await listener.next(Created)).reply.left_out == left_out
            assert (await listener.next(Finished)).reply.left_out == left_out
    assert last_prompt(chat) == ["say two", "two", "say three"]


@each_target("stateless", "unstored")
async def test_a_reply_of_no_conversation_is_not_stored(
    responses: ResponseManager, conversations: SlowConversations, target: Target
) -> None:
    reply = await run(responses, request("say one", target))
    with pytest.raises(ResponseNotFoundError):
        await conversations.find_response("ann", reply.id)
    assert await conversations.list_page("ann", Listing()) == ([], False)
    assert not conversations.put_asked.is_set()


@each_target()
async def test_a_finished_reply_can_be_resumed_unless_it_is_stateless(
    responses: ResponseManager, listener: FakeListener, target: Target
) -> None:
    reply = await run(responses, request("say yes or no", target))
    if target == Stateless():
        with pytest.raises(ResponseNotFoundError):
            await responses.follow("ann", reply.id, listener)
    else:
        await responses.follow("ann", reply.id, listener)
        assert await deltas_of(listener) == ["yes ", "or n", "o"]


async def test_a_new_conversation_is_begun_without_a_read(settings: Settings, scripted: ScriptedChat) -> None:
    async with open_database(settings) as database:
        conversations = AwayConversations(database)
        async with running(scripted, conversations, settings) as responses:
            conversations.unreadable = True
            error = await run_rejected(responses, request("say one", CONVERSATION))
            assert isinstance(error, DatabaseUnavailableError)
            await run(responses, request("say two", NewConversation("conv_2")))
            conversations.unreadable = False
            assert await contents(conversations, "conv_2") == ["say two", "two"]
            assert await contents(conversations) == []


async def test_a_stored_conversation_must_exist_unless_create_is_set(
    responses: ResponseManager, conversations: SlowConversations
) -> None:
    error = await run_rejected(responses, request("say one", StoredConversation("conv_1")))
    assert isinstance(error, ConversationNotFoundError)
    assert await contents(conversations) == []
    await run(responses, request("say two", StoredConversation("conv_1", create=True)))
    await run(responses, request("say three", StoredConversation("conv_1")))
    assert await contents(conversations) == ["say two", "two", "say three", "three"]


async def test_a_reply_after_an_item_is_another_branch_and_deletes_nothing(
    responses: ResponseManager, conversations: SlowConversations, scripted: ScriptedChat
) -> None:
    first = await run(responses, request("say one"))
    second = await run(responses, request("say two"))
    await run(responses, request("say three", StoredConversation("conv_1", first.id)))
    assert last_prompt(scripted) == ["say one", "one", "say three"]
    assert await contents(conversations) == ["say one", "one", "say three", "three"]
    await run(responses, request("say four", StoredConversation("conv_1", Edge.START)))
    assert last_prompt(scripted) == ["say four"]
    assert await contents(conversations) == ["say four", "four"]
    older = await conversations.path("ann", "conv_1", second.id)
    assert [item.content for item in older.items] == ["say one", "one", "say two", "two"]


async def test_the_branch_stays_while_a_reply_is_being_prepared_or_stored(
    responses: ResponseManager, conversations: SlowConversations, listener: FakeListener
) -> None:
    first = await run(responses, request("say one"))
    second = await run(responses, request("say two", StoredConversation("conv_1", Edge.START)))
    conversations.may_put.clear()
    conversations.put_asked.clear()
    responses.create(request("say three"), listener)
    with pytest.raises(ConversationLockedError):
        await responses.set_leaf("ann", "conv_1", first.id)
    await conversations.put_asked.wait()
    with pytest.raises(ConversationLockedError):
        await responses.set_leaf("ann", "conv_1", first.id)
    conversations.may_put.set()
    assert (await listener.next(Finished)).reply.status is Status.COMPLETED
    assert await contents(conversations) == ["say two", "two", "say three", "three"]
    await responses.set_leaf("ann", "conv_1", first.id)
    assert await contents(conversations) == ["say one", "one"]
    await responses.set_leaf("ann", "conv_1", second.id)
    assert await contents(conversations) == ["say two", "two", "say three", "three"]


async def test_a_request_that_has_read_another_leaf_is_refused_and_nothing_is_lost(
    responses: ResponseManager, conversations: SlowConversations, listener: FakeListener
) -> None:
    first = await run(responses, request("say one"))
    await run(responses, request("say two", StoredConversation("conv_1", Edge.START)))
    conversations.may_put.clear()
    conversations.put_asked.clear()
    responses.create(request("say three"), listener)
    await conversations.put_asked.wait()
    await conversations.set_leaf("ann", "conv_1", first.id)  # by another process
    conversations.may_put.set()
    assert isinstance((await listener.next(Rejected)).error, ConversationLockedError)
    assert await contents(conversations) == ["say one", "one"]


async def test_branches_of_one_response_run_at_the_same_time_and_leave_the_conversation_as_it_is(
    responses: ResponseManager, conversations: SlowConversations, scripted: ScriptedChat
) -> None:
    first = await run(responses, request("say one"))
    listeners = FakeListener(), FakeListener()
    for number, listener in enumerate(listeners):
        await start(responses, listener, request(f"wait {number}", Branch(first.id)))
    assert scripted.running == 2
    scripted.release()
    for number, listener in enumerate(listeners):
        finished = await listener.next(Finished)
        assert (finished.conversation, finished.reply.content) == (None, str(number))
        found = await conversations.path_of_response("ann", finished.reply.id)
        assert [item.content for item in found.items] == ["say one", "one", f"wait {number}", str(number)]
    assert await contents(conversations) == ["say one", "one"]


async def test_a_response_without_a_conversation_is_stored_and_can_be_continued(
    responses: ResponseManager, conversations: SlowConversations, scripted: ScriptedChat
) -> None:
    first = await run(responses, request("say one", NewConversation("conv_9", listed=False)))
    await run(responses, request("say two", Branch(first.id)))
    assert last_prompt(scripted) == ["say one", "one", "say two"]
    assert await conversations.list_page("ann", Listing()) == ([], False)


@pytest.mark.parametrize("target", [Branch("resp_unknown"), Unstored("resp_unknown")], ids=["stored", "unstored"])
async def test_a_request_that_continues_an_unknown_response_is_rejected(
    responses: ResponseManager, target: Target
) -> None:
    error = await run_rejected(responses, request("say one", target))
    assert (type(error), error.status, error.code) == (
        PreviousResponseNotFoundError,
        400,
        "previous_response_not_found",
    )


async def test_a_stored_request_cannot_continue_a_response_that_is_only_in_memory(responses: ResponseManager) -> None:
    unstored = await run(responses, request("say one", Unstored()))
    error = await run_rejected(responses, request("say two", Branch(unstored.id)))
    assert isinstance(error, PreviousResponseNotFoundError)


async def test_a_response_that_still_runs_cannot_be_continued(
    responses: ResponseManager, listener: FakeListener, scripted: ScriptedChat
) -> None:
    id = await start(responses, listener, request("wait one"))
    assert isinstance(await run_rejected(responses, request("say two", Branch(id))), ConversationLockedError)


async def test_a_request_that_shall_not_generate_has_a_response_without_output_that_can_be_continued(
    responses: ResponseManager, scripted: ScriptedChat, listener: FakeListener
) -> None:
    warm = replace(request("say one", NewConversation("conv_9", listed=False)), generate=False)
    responses.create(warm, listener)
    _, finished = await listener.until(Finished)
    assert isinstance(finished, Finished)
    assert (finished.reply.status, finished.reply.output) == (Status.COMPLETED, [])
    await run(responses, request("say two", Branch(finished.reply.id)))
    assert last_prompt(scripted) == ["say one", "", "say two"]


@pytest.mark.parametrize("create", [False, True], ids=["existing", "create"])
async def test_a_reply_after_an_unknown_item_is_rejected_and_deletes_nothing(
    responses: ResponseManager, conversations: SlowConversations, create: bool
) -> None:
    await run(responses, request("say one"))
    error = await run_rejected(responses, request("say two", StoredConversation("conv_1", "item_unknown", create)))
    assert (type(error), error.code, error.param) == (ItemNotFoundError, "item_not_found", "after")
    assert await contents(conversations) == ["say one", "one"]


async def test_a_conversation_is_busy_until_its_reply_has_ended(
    responses: ResponseManager, listener: FakeListener, scripted: ScriptedChat
) -> None:
    await start(responses, listener, request("wait one"))
    assert isinstance(await run_rejected(responses, request("say two")), ConversationLockedError)
    error = await run_rejected(responses, request("say three", StoredConversation("conv_1"), user="bob"))
    assert isinstance(error, ConversationNotFoundError)  # for bob it is not busy
    scripted.release()
    await listener.next(Finished)
    responses.create(request("say four"), listener)


@each_target("stateless", "unstored")
async def test_replies_of_no_conversation_run_at_the_same_time(
    responses: ResponseManager, listener: FakeListener, scripted: ScriptedChat, target: Target
) -> None:
    for _ in range(2):
        await start(responses, listener, request("wait one", target))
    assert scripted.running == 2


async def test_a_conversation_of_another_user_is_not_found(
    responses: ResponseManager, conversations: SlowConversations
) -> None:
    await run(responses, request("say one"))
    error = await run_rejected(responses, request("say two", StoredConversation("conv_1"), user="bob"))
    assert isinstance(error, ConversationNotFoundError)
    assert await contents(conversations) == ["say one", "one"]


async def test_only_its_user_deletes_a_conversation_and_ends_its_reply(
    responses: ResponseManager, conversations: SlowConversations, listener: FakeListener, scripted: ScriptedChat
) -> None:
    await start(responses, listener, request("wait one"))
    with pytest.raises(ConversationNotFoundError):
        await responses.delete_conversation("bob", "conv_1")
    assert scripted.running == 1
    await responses.delete_conversation("ann", "conv_1")
    assert scripted.running == 0
    assert await conversations.list_page("ann", Listing()) == ([], False)
    assert (await listener.next(Finished)).reply.status == Status.CANCELLED


# Storage


async def test_a_message_is_stored_before_its_reply_is_created(
    responses: ResponseManager, conversations: SlowConversations, listener: FakeListener
) -> None:
    conversations.may_put.clear()
    responses.create(request("wait on"), listener)
    await conversations.put_asked.wait()
    assert listener.heard.empty()
    conversations.may_put.set()
    await listener.next(Created)
    message, reply = await items(conversations)
    assert (message.role, message.content, message.status) == ("user", "wait on", None)
    assert (reply.role, reply.content, reply.status) == ("assistant", "", Status.IN_PROGRESS)


async def test_a_reply_is_stored_while_it_grows(
    responses: ResponseManager, conversations: SlowConversations, listener: FakeListener
) -> None:
    responses.create(request("wait half a reply"), listener)
    await conversations.updated.wait()
    _, reply = await items(conversations)
    assert (reply.content, reply.status) == ("half a reply", Status.IN_PROGRESS)
    _, _, stored = await conversations.find_response("ann", reply.id)
    assert [part.pieces for part in stored.output] == [["half", " a r", "eply"]]


async def test_a_reply_that_another_process_runs_does_not_seem_to_have_ended(
    responses: ResponseManager, conversations: SlowConversations, listener: FakeListener
) -> None:
    await begin(conversations, "conv_1", message("msg_1"), growing("resp_1", "half"))
    assert not responses.runs("ann", "resp_1")
    with pytest.raises(ServerUnavailableError, match="another process runs this reply"):
        await responses.follow("ann", "resp_1", listener)
    assert listener.rest() == []


async def test_a_reply_runs_for_its_user_until_it_has_ended(responses: ResponseManager, listener: FakeListener) -> None:
    id = responses.create(request("wait on"), listener)
    await listener.next(OutputDelta)
    assert (responses.runs("ann", id), responses.runs("bob", id)) == (True, False)
    await responses.cancel("ann", id)
    await listener.next(Finished)
    assert not responses.runs("ann", id)


async def test_a_finished_reply_is_stored_before_it_is_told(
    responses: ResponseManager, conversations: SlowConversations, listener: FakeListener
) -> None:
    responses.create(request("say all of it", seed=3, temperature=Options().temperature), listener)
    finished = await listener.next(Finished)
    _, _, reply = await conversations.find_response("ann", finished.reply.id)
    assert reply == finished.reply
    assert (reply.content, reply.status, reply.reason) == ("all of it", Status.COMPLETED, "stop")
    assert reply.options == {"seed": 3}
    assert reply.usage == {"input_tokens": 1, "cached_tokens": 0, "output_tokens": 3, "total_tokens": 4} | {
        "reasoning_tokens": 0
    }
    assert reply.decode_seconds is not None


async def test_deltas_do_not_wait_for_the_database(
    responses: ResponseManager, conversations: SlowConversations, listener: FakeListener
) -> None:
    conversations.may_update.clear()
    id = responses.create(request("say it all at once"), listener)
    for _ in range(4):
        delta = await listener.next(OutputDelta)
    assert (delta.response_id, delta.text) == (id, "ce")
    await asyncio.sleep(0)
    assert not any(isinstance(event, Finished) for event in listener.rest())
    conversations.may_update.set()
    await listener.next(Finished)


async def test_a_reply_whose_end_cannot_be_stored_is_told_and_stored_later(
    responses: ResponseManager,
    conversations: SlowConversations,
    listener: FakeListener,
    caplog: pytest.LogCaptureFixture,
) -> None:
    responses.create(request("wait here"), listener)
    id = (await listener.next(Created)).response_id
    conversations.broken = True
    await listener.next(OutputDelta)
    await responses.cancel("ann", id)
    finished = await listener.next(Finished)
    assert (finished.reply.status, finished.reply.content) == (Status.CANCELLED, "here")
    assert "messages cannot be stored, and wait in memory: OSError: the disk is full" in caplog.text
    await responses.follow("ann", id, listener)
    again = await listener.next(Finished)
    assert (again.conversation, again.reply.content, again.reply.status) == ("conv_1", "here", Status.CANCELLED)
    await store_again(conversations)
    assert await statuses(conversations) == [None, Status.CANCELLED]


async def test_a_message_that_cannot_be_stored_is_answered_and_stored_later(
    responses: ResponseManager,
    conversations: SlowConversations,
    listener: FakeListener,
    caplog: pytest.LogCaptureFixture,
) -> None:
    conversations.broken = True
    id = responses.create(request("say one"), listener)
    created, warning, *_, finished = await listener.until(Finished)
    assert isinstance(created, Created)
    assert isinstance(warning, Warned)
    assert isinstance(finished, Finished)
    assert (created.response_id, finished.reply.content) == (id, "one")
    assert (warning.response_id, type(warning.error), warning.error.code) == (id, NotStoredError, "not_kept")
    assert responses.trouble
    assert caplog.text.count("messages cannot be stored") == 1
    await store_again(conversations)
    await run(responses, request("say two"))
    assert await contents(conversations) == ["say one", "one", "say two", "two"]
    assert responses.trouble is None


async def test_a_conversation_goes_on_with_messages_that_are_not_stored_yet(
    responses: ResponseManager, conversations: SlowConversations, scripted: ScriptedChat
) -> None:
    await run(responses, request("say one"))
    conversations.broken = True
    for word in ("two", "three"):
        await run(responses, request(f"say {word}"))
    assert await contents(conversations) == ["say one", "one"]
    assert last_prompt(scripted) == ["say one", "one", "say two", "two", "say three"]
    conversations.broken = False
    await run(responses, request("say four"))
    await store_again(conversations)
    assert await contents(conversations) == [
        text for word in ("one", "two", "three", "four") for text in (f"say {word}", word)
    ]
    assert (await statuses(conversations))[1::2] == [Status.COMPLETED] * 4


async def test_a_reply_cancelled_while_its_message_is_stored_still_ends(
    responses: ResponseManager, conversations: SlowConversations, listener: FakeListener, scripted: ScriptedChat
) -> None:
    conversations.may_put.clear()
    responses.create(request("wait one"), listener)
    await conversations.put_asked.wait()
    responses.cancel_all(listener)
    conversations.may_put.set()
    created, *_, finished = await listener.until(Finished)
    assert isinstance(created, Created)
    assert isinstance(finished, Finished)
    assert finished.reply.status == Status.CANCELLED
    assert scripted.running == 0
    assert await statuses(conversations) == [None, Status.CANCELLED]


async def test_a_reply_that_the_server_ends_is_stored_as_failed(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings, listener: FakeListener
) -> None:
    async with running(scripted, conversations, settings) as responses:
        await start(responses, listener, request("wait half"))
    _, reply = await items(conversations)
    assert (reply.content, reply.status, reply.reason) == ("half", Status.FAILED, "server_shutdown")
    assert scripted.running == 0


async def test_a_rejected_request_changes_no_conversation(
    responses: ResponseManager, conversations: SlowConversations, scripted: ScriptedChat
) -> None:
    await run(responses, request("say one"))
    scripted.admission.per_user = 0
    error = await run_rejected(responses, request("say two", StoredConversation("conv_1", Edge.START)))
    assert isinstance(error, TooManyResponsesError)
    assert await contents(conversations) == ["say one", "one"]


# Followers


@each_target("unstored", "stored conversation")
@pytest.mark.parametrize("finished", [False, True], ids=["running", "finished"])
async def test_a_follower_hears_the_same_events_as_the_first_listener(
    responses: ResponseManager, scripted: ScriptedChat, listener: FakeListener, target: Target, finished: bool
) -> None:
    responses.create(request("wait for a few short words", target), listener)
    first = await listener.until(OutputDelta)
    id, other = first[0].response_id, FakeListener()
    if finished:
        scripted.release()
        first += await listener.until(Finished)
    await responses.follow("ann", id, other)
    scripted.release()
    if not finished:
        first += await listener.until(Finished)
    assert [type(event) for event in first] == [Created, OutputItemAdded, *[OutputDelta] * 6, OutputItemDone, Finished]
    assert [comparable(event) for event in await other.until(Finished)] == [comparable(event) for event in first]


async def test_a_second_follower_hears_the_same_events(
    responses: ResponseManager, scripted: ScriptedChat, listener: FakeListener
) -> None:
    other = FakeListener()
    id = responses.create(request("hold on a little"), listener)
    assert await listener.next(Queued) == Queued(id, 3)
    await responses.follow("ann", id, other)
    assert [type(event) for event in other.rest()] == [Created, Queued]
    scripted.release()
    for _ in range(3):
        await listener.next(OutputDelta)
    scripted.release()
    assert await deltas_of(other) == ["on a", " lit", "tle"]


async def test_a_slow_follower_catches_up_in_order_while_the_reply_goes_on(
    responses: ResponseManager, scripted: ScriptedChat, listener: FakeListener
) -> None:
    slow, deltas = FakeListener(), 2 * BATCH + 5
    id = await start(responses, listener, request("wait " + "word" * deltas), deltas)
    slow.reading.clear()
    following = asyncio.create_task(responses.follow("ann", id, slow))
    await slow.behind.wait()
    scripted.release()
    await listener.next(Finished)
    assert slow.heard.qsize() == 2 + BATCH  # also that it was created, and that its part began
    slow.reading.set()
    await following
    assert await deltas_of(slow) == ["word"] * deltas


async def test_a_follower_that_follows_twice_hears_later_events_once(
    responses: ResponseManager, scripted: ScriptedChat, listener: FakeListener
) -> None:
    id = await start(responses, listener, request("wait for it"), 2)
    again = FakeListener()
    for _ in range(2):
        await responses.follow("ann", id, again)
    scripted.release()
    assert await deltas_of(again) == ["for ", "it"] * 2
    assert again.heard.empty()


async def test_a_reply_of_another_user_is_not_found(responses: ResponseManager, scripted: ScriptedChat) -> None:
    listener = FakeListener()
    running_id = await start(responses, listener, request("wait here", NewConversation("conv_2")))
    unstored = await run(responses, request("say this", Unstored()))
    stored = await run(responses, request("say that"))
    for id in (running_id, unstored.id, stored.id):
        with pytest.raises(ResponseNotFoundError):
            await responses.follow("bob", id, listener)
        with pytest.raises(ResponseNotFoundError):
            await responses.cancel("bob", id)
        responses.abandon("bob", id)
    assert listener.heard.empty()
    assert scripted.running == 1


async def test_a_finished_reply_cannot_be_cancelled(responses: ResponseManager) -> None:
    reply = await run(responses, request("say one"))
    with pytest.raises(ResponseNotFoundError, match="no such reply is running"):
        await responses.cancel("ann", reply.id)


async def test_a_finished_or_unknown_reply_can_be_abandoned(
    responses: ResponseManager, conversations: SlowConversations
) -> None:
    reply = await run(responses, request("say one"))
    responses.abandon("ann", reply.id)
    responses.abandon("ann", "resp_unknown")
    assert await statuses(conversations) == [None, Status.COMPLETED]


async def test_cancel_all_ends_only_the_replies_of_one_listener(
    responses: ResponseManager, scripted: ScriptedChat, listener: FakeListener
) -> None:
    other = FakeListener()
    for number in range(2):
        await start(responses, listener, request("wait here", NewConversation(f"conv_{number}")))
    await start(responses, other, request("wait here", NewConversation("conv_other")))
    responses.cancel_all(listener)
    for _ in range(2):
        assert (await listener.next(Finished)).reply.reason == "client_cancelled"
    assert scripted.running == 1
    assert other.heard.empty()


# Replies that nobody follows


async def test_without_linger_a_reply_ends_when_its_last_follower_leaves(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings, listener: FakeListener
) -> None:
    async with running(scripted, conversations, settings, linger=0) as responses:
        id, other = await start(responses, listener, request("wait here")), FakeListener()
        await responses.follow("ann", id, other)
        responses.leave(listener)
        responses.leave(other)
        await scripted.idle.wait()
    _, reply = await items(conversations)
    assert (reply.content, reply.status, reply.reason) == ("here", Status.CANCELLED, "client_disconnected")


async def test_a_follower_that_comes_back_in_time_keeps_the_reply_running(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings, listener: FakeListener
) -> None:
    async with running(scripted, conversations, settings, linger=0) as responses:
        id, other = await start(responses, listener, request("wait here")), FakeListener()
        responses.leave(listener)
        await responses.follow("ann", id, other)  # before the event loop looks at its timers again
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        scripted.release()
        assert (await other.next(Finished)).reply.status == Status.COMPLETED
        assert listener.heard.empty()


async def test_an_unstored_reply_is_kept_while_there_is_room(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings, listener: FakeListener
) -> None:
    async with running(scripted, conversations, settings, replay_bytes=500_000) as responses:
        replies = [await run(responses, request(f"say {'x' * 9_000}", Unstored())) for _ in range(4)]
        with pytest.raises(ResponseNotFoundError):
            await responses.follow("ann", replies[0].id, listener)
        await responses.follow("ann", replies[-1].id, listener)
        assert "".join(await deltas_of(listener)) == "x" * 9_000


async def test_an_unstored_reply_is_forgotten_after_its_linger_time(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings, listener: FakeListener
) -> None:
    async with running(scripted, conversations, settings, linger=0) as responses:
        reply = await run(responses, request("say gone", Unstored()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(ResponseNotFoundError):
            await responses.follow("ann", reply.id, listener)


# Revoked users and a server that stops


async def test_a_revoked_user_loses_all_replies_of_their_own(
    responses: ResponseManager, scripted: ScriptedChat
) -> None:
    targets: list[Target] = [Stateless(), Unstored(), NewConversation("conv_2")]
    anns, bobs = [FakeListener() for _ in targets], FakeListener()
    for listener, target in zip(anns, targets, strict=True):
        await start(responses, listener, replace(request("wait here", target), background=True))
    await start(responses, bobs, request("wait here", Stateless(), user="bob"))
    responses.revoke("ann")
    for listener in anns:
        reply = (await listener.next(Finished)).reply
        assert (reply.status, reply.reason) == (Status.FAILED, "revoked")
    assert scripted.running == 1
    assert bobs.heard.empty()


async def test_drain_refuses_new_replies_and_waits_for_running_ones(
    responses: ResponseManager, scripted: ScriptedChat, listener: FakeListener, caplog: pytest.LogCaptureFixture
) -> None:
    await start(responses, listener, request("wait here"))
    draining = asyncio.create_task(responses.drain(60))
    await asyncio.sleep(0)
    assert isinstance(await run_rejected(responses, request("say one", Unstored())), ServerStoppingError)
    assert not draining.done()
    scripted.release()
    await draining
    assert (await listener.next(Finished)).reply.status == Status.COMPLETED
    assert "waiting up to 60 s for 1 replies" in caplog.text


async def test_drain_ends_replies_that_do_not_finish_in_time(
    responses: ResponseManager, scripted: ScriptedChat, listener: FakeListener
) -> None:
    for number in range(2):
        await start(responses, listener, request("wait here", NewConversation(f"conv_{number}")))
    await responses.drain(0.01)
    assert scripted.running == 0
    for _ in range(2):
        reply = (await listener.next(Finished)).reply
        assert (reply.status, reply.reason) == (Status.FAILED, "server_shutdown")


async def test_replies_that_are_lost_with_the_server_are_counted_in_the_log(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(scripted, conversations, settings) as responses:
        conversations.broken = True
        await run(responses, request("say one"))
    assert "lost 1 replies that could not be stored" in caplog.text


# References to stored items


class WithoutBranches(Conversations):
    """A store that reads no branches: they may have thousands of items."""

    async def branch(self, user: str, node: str) -> Sequence[Item]:
        raise AssertionError("a whole branch is read")


async def test_a_reference_reads_one_item_and_not_those_before_it(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings
) -> None:
    async with running(scripted, WithoutBranches(conversations._database), settings) as responses:
        await run(responses, request("say one"))
        await run(responses, request("say two"))
        asked = (await conversations.path("ann", "conv_1")).items[2]
        assert await responses.find_message("ann", asked.id) == {"role": "user", "content": "say two"}
        with pytest.raises(ItemNotFoundError):
            await responses.find_message("bob", asked.id)


async def test_a_deleted_part_cannot_be_referred_to(
    responses: ResponseManager, conversations: SlowConversations
) -> None:
    reply = await run(responses, request("say one"))
    part = part_id(reply.id, "message", 0)
    assert (await responses.find_message("ann", part))["content"] == "one"
    await conversations.delete_item("ann", "conv_1", part)
    with pytest.raises(ItemNotFoundError):
        await responses.find_message("ann", part)


async def test_a_reference_says_so_if_the_database_is_away(
    scripted: ScriptedChat, conversations: SlowConversations, settings: Settings
) -> None:
    async with running(scripted, conversations, settings) as responses:
        await run(responses, request("say one"))
        asked = (await conversations.path("ann", "conv_1")).items[0]
        async with conversations._database.begin() as connection:
            await connection.exec_driver_sql("DROP TABLE items")
        with pytest.raises(DatabaseUnavailableError):
            await responses.find_message("ann", asked.id)
