from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from models.generation.interface import Follower, ModelInfo
from models.generation.manager import ResponseManager
from models.options import Options
from models.protocols.chat_v1 import BAD_FRAMES, RESUMES, ChatV1Session
from models.protocols.client import Close
from models.settings import Settings
from models.store.conversations import Conversations
from models.validation import Json
from tests.support.fake_client import FakeClient
from tests.support.scripted import ScriptedChat, running
from tests.support.stores import AwayConversations

pytestmark = pytest.mark.anyio

MODEL = ModelInfo("scripted", 4096, Options())


class Connection:
    """A session and its client."""

    def __init__(self, responses: ResponseManager, user: str = "ann", limits: Json | None = None) -> None:
        self.client = FakeClient()
        self.session = ChatV1Session(responses, MODEL, user, limits or {}, self.client)

    def send(self, type: str, **fields: Any) -> None:
        """Send a client event."""
        assert self.session.receive(json.dumps({"type": type, **fields})) is None

    def ask(self, input: Any, event_id: str | None = None, **fields: Any) -> None:
        """Send a `response.create`."""
        self.send("response.create", event_id=event_id, response={"input": input, **fields})

    async def until(self, type: str) -> list[Json]:
        """All events up to the next of a type, which is the last."""
        return await self.client.until(type)

    async def delta(self) -> Json:
        """The next text delta."""
        return (await self.until("response.output_text.delta"))[-1]

    async def done(self) -> Json:
        """The next reply that has ended."""
        response: Json = (await self.until("response.done"))[-1]["response"]
        return response

    async def error(self) -> Json:
        """The next error."""
        error: Json = (await self.until("error"))[-1]["error"]
        return error


@pytest.fixture
async def connection(responses: ResponseManager) -> AsyncIterator[Connection]:
    connection = Connection(responses)
    assert (await connection.client.sent.get())["type"] == "session.created"
    yield connection
    connection.session.close()


def prompt(scripted: ScriptedChat) -> list[str]:
    """The contents of the messages that the model got last."""
    return [message["content"] for message in scripted.heard[-1][0]]


# The session


async def test_the_first_event_describes_the_session(responses: ResponseManager) -> None:
    connection = Connection(responses, limits={"responses": 4})
    event = await connection.client.sent.get()
    session = event["session"]
    assert event == {"type": "session.created", "session": session}
    assert session.pop("id").startswith("sess_")
    assert session.pop("conversation").startswith("conv_")
    assert session == {
        "user": "ann",
        "model": "scripted",
        "context_length": 4096,
        "options": Options().as_json(),
        "limits": {"responses": 4},
    }


async def test_a_session_update_changes_the_default_options(connection: Connection, scripted: ScriptedChat) -> None:
    connection.send("session.update", session={"temperature": 0, "stop": "END"})
    updated = (await connection.until("session.updated"))[-1]["session"]["options"]
    assert (updated["temperature"], updated["stop"]) == (0, ["END"])
    connection.ask("say one", seed=3)
    await connection.done()
    connection.ask("say two")
    await connection.done()
    (_, first), (_, second) = scripted.heard
    assert (first.temperature, first.stop, first.seed) == (0, ("END",), 3)
    assert (second.temperature, second.seed) == (0, None)


async def test_the_client_is_told_who_joined_and_left(connection: Connection) -> None:
    connection.session.presence_changed("joined", "bob")
    connection.session.presence_changed("left", "bob")
    events = [await connection.client.sent.get() for _ in range(2)]
    assert events == [{"type": "presence.joined", "user": "bob"}, {"type": "presence.left", "user": "bob"}]


async def test_twenty_bad_frames_in_a_row_close_the_connection(connection: Connection) -> None:
    for _ in range(BAD_FRAMES - 1):
        assert connection.session.receive("nonsense") is None
        assert (await connection.error())["code"] == "invalid_json"
    connection.send("response.cancel")  # a good frame: the count begins again
    closes = [connection.session.receive("nonsense") for _ in range(20)]
    assert closes == [None] * 19 + [Close(4400, "20 bad frames in a row")]


async def test_a_rejected_event_is_no_bad_frame(connection: Connection) -> None:
    for _ in range(BAD_FRAMES):
        connection.send("response.cancel", response_id="resp_unknown")
        assert (await connection.error())["code"] == "response_not_found"
    assert connection.session.receive("nonsense") is None


async def test_an_error_of_a_bad_frame_has_the_event_id(connection: Connection) -> None:
    connection.session.receive(json.dumps({"type": "response.resume", "event_id": "mine"}))
    error = await connection.error()
    assert (error["code"], error["param"], error["event_id"]) == ("missing_field", "response_id", "mine")


# Replies


async def test_a_reply_is_created_then_numbered_deltas_then_done(connection: Connection) -> None:
    connection.ask("say hello there", event_id="mine")
    created, *deltas, done = await connection.until("response.done")
    assert created["event_id"] == "mine"
    assert created["response"]["status"] == "in_progress"
    assert [delta["sequence_number"] for delta in deltas] == [1, 2, 3]
    assert "".join(delta["delta"] for delta in deltas) == done["response"]["output_text"] == "hello there"
    assert done["sequence_number"] == 4
    assert {delta["response_id"] for delta in deltas} == {done["response"]["id"]} == {created["response"]["id"]}
    assert (done["response"]["status"], done["response"]["status_details"]) == ("completed", {"reason": "stop"})
    usage = {"input_tokens": 1, "cached_tokens": 0, "output_tokens": 3, "total_tokens": 4}
    assert done["response"]["usage"] == usage


async def test_each_request_gets_its_own_event_id_back(connection: Connection) -> None:
    for number in ("1", "2"):
        connection.ask("say yes", event_id=number, conversation="none")
    events = [*await connection.until("response.done"), *await connection.until("response.done")]
    assert [event["event_id"] for event in events if event["type"] == "response.created"] == ["1", "2"]


async def test_a_waiting_reply_is_told_its_queue_positions(connection: Connection) -> None:
    connection.ask("queue up")
    events = await connection.until("response.done")
    assert [event["position"] for event in events if event["type"] == "response.queued"] == [2, 1]


async def test_a_failed_reply_ends_as_failed_and_the_session_goes_on(connection: Connection) -> None:
    connection.ask("break here")
    done = await connection.done()
    assert (done["status"], done["status_details"]["reason"]) == ("failed", "server_error")
    assert done["output_text"] == "here"
    connection.ask("say on")
    assert (await connection.done())["status"] == "completed"


async def test_a_refused_request_gets_an_error_and_no_reply(connection: Connection, scripted: ScriptedChat) -> None:
    scripted.admission.per_user = 0
    connection.ask("say one", event_id="mine")
    (error,) = await connection.until("error")
    assert (error["error"]["type"], error["error"]["code"]) == ("rate_limit_error", "too_many_responses")
    assert error["error"]["event_id"] == "mine"


async def test_a_reply_that_cannot_be_stored_gets_a_warning(
    conversations: Conversations, scripted: ScriptedChat, settings: Settings
) -> None:
    away = AwayConversations(conversations._database)
    async with running(scripted, away, settings) as responses:
        away.broken = True
        connection = Connection(responses)
        connection.ask("say one", event_id="mine")
        error = await connection.error()
        done = await connection.done()
        away.broken = False
    assert (error["code"], error["response_id"], "event_id" in error) == ("not_kept", done["id"], False)
    assert (done["status"], done["output_text"]) == ("completed", "one")


# Conversations


async def test_a_conversation_goes_on_from_its_last_message(connection: Connection, scripted: ScriptedChat) -> None:
    for message in ("say one", "say two"):
        connection.ask(message)
        await connection.done()
    assert [(message["role"], message["content"]) for message in scripted.heard[-1][0]] == [
        ("user", "say one"),
        ("assistant", "one"),
        ("user", "say two"),
    ]


async def test_a_reply_without_a_conversation_sees_only_its_input(
    connection: Connection, scripted: ScriptedChat
) -> None:
    connection.ask("say one")
    await connection.done()
    connection.ask("wait a")
    await connection.delta()
    connection.ask([{"role": "user", "content": "say two"}], conversation="none")
    done = await connection.done()  # although another reply is running
    assert (done["conversation"], done["output_text"]) == (None, "two")
    assert scripted.heard[-1][0] == [{"role": "user", "content": "say two"}]


async def test_a_conversation_is_named_by_its_id(connection: Connection) -> None:
    connection.ask("say one")
    own = (await connection.done())["conversation"]
    connection.ask("say two", conversation=own)
    assert (await connection.done())["output_text"] == "two"
    connection.ask("say three", event_id="lost", conversation="conv_of_somebody_else")
    assert (error := await connection.error())["code"] == "conversation_not_found"
    assert error["event_id"] == "lost"


async def test_a_conversation_runs_one_reply_at_a_time(connection: Connection, scripted: ScriptedChat) -> None:
    connection.ask("wait one")
    await connection.delta()
    connection.ask("say two", event_id="mine")
    error = await connection.error()
    assert (error["code"], error["event_id"]) == ("conversation_busy", "mine")
    scripted.release()
    assert (await connection.done())["output_text"] == "one"


async def test_each_new_conversation_goes_on_by_its_id(connection: Connection, scripted: ScriptedChat) -> None:
    connection.ask("say one", conversation="new")
    first = (await connection.done())["conversation"]
    connection.ask("say two", conversation="new")
    assert first != (await connection.done())["conversation"]
    connection.ask("say three", conversation=first)
    await connection.done()
    assert prompt(scripted) == ["say one", "one", "say three"]


async def test_a_conversation_goes_on_from_another_connection(
    connection: Connection, scripted: ScriptedChat, responses: ResponseManager
) -> None:
    connection.ask("say one")
    own = (await connection.done())["conversation"]
    other = Connection(responses)
    other.ask("say two", conversation=own)
    await other.done()
    assert prompt(scripted) == ["say one", "one", "say two"]
    bob = Connection(responses, "bob")
    bob.ask("say three", conversation=own)
    assert (await bob.error())["code"] == "conversation_not_found"


async def test_a_reply_can_follow_an_earlier_item(connection: Connection, scripted: ScriptedChat) -> None:
    connection.ask("say one")
    first = (await connection.done())["id"]
    connection.ask("say two")
    await connection.done()
    connection.ask("say three", after=first)
    await connection.done()
    assert prompt(scripted) == ["say one", "one", "say three"]
    connection.ask("say four", after="none")
    await connection.done()
    assert prompt(scripted) == ["say four"]


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "empty"])
async def test_a_reply_after_an_unknown_item_is_refused(connection: Connection, begun: bool) -> None:
    if begun:
        connection.ask("say one")
        await connection.done()
    connection.ask("say two", after="item_unknown")
    error = await connection.error()
    assert (error["code"], error["param"]) == ("item_not_found", "response.after")


# Cancel


@pytest.mark.parametrize("by_id", [True, False], ids=["one", "all"])
async def test_a_cancelled_reply_keeps_its_text(connection: Connection, scripted: ScriptedChat, by_id: bool) -> None:
    connection.ask("wait some")
    delta = await connection.delta()
    connection.send("response.cancel", **({"response_id": delta["response_id"]} if by_id else {}))
    done = await connection.done()
    assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "client_cancelled")
    assert done["output_text"] == "some"
    assert scripted.running == 0
    connection.ask("say more")
    await connection.done()
    assert prompt(scripted) == ["wait some", "some", "say more"]


async def test_a_reply_cancelled_at_once_is_created_and_stored(connection: Connection, scripted: ScriptedChat) -> None:
    connection.ask("wait one", event_id="mine")
    connection.send("response.cancel")
    created, *_, done = await connection.until("response.done")
    assert (created["type"], created["event_id"]) == ("response.created", "mine")
    assert done["response"]["status"] == "cancelled"
    connection.ask("say two")
    await connection.done()
    assert prompt(scripted) == ["wait one", "", "say two"]


async def test_cancelling_is_an_error_only_for_an_unknown_id(connection: Connection) -> None:
    connection.send("response.cancel")
    connection.send("response.cancel", response_id="resp_unknown", event_id="mine")
    (event,) = await connection.until("error")
    assert (event["error"]["code"], event["error"]["event_id"]) == ("response_not_found", "mine")


async def test_another_connection_can_cancel_only_by_id(
    connection: Connection, scripted: ScriptedChat, responses: ResponseManager
) -> None:
    connection.ask("wait on")
    reply = (await connection.delta())["response_id"]
    other = Connection(responses)
    other.send("response.cancel")
    assert scripted.running == 1
    other.send("response.cancel", response_id=reply)
    assert (await connection.done())["status"] == "cancelled"


# Resume


async def test_a_reply_goes_on_when_its_connection_closes(
    connection: Connection, scripted: ScriptedChat, responses: ResponseManager
) -> None:
    connection.ask("wait on")
    reply = (await connection.delta())["response_id"]
    connection.session.close()
    other = Connection(responses)
    other.send("response.resume", response_id=reply)
    assert (await other.delta())["delta"] == "on"
    scripted.release()
    assert (await other.done())["status"] == "completed"


async def test_without_linger_a_closed_connection_ends_its_replies(
    scripted: ScriptedChat, conversations: Conversations, settings: Settings
) -> None:
    async with running(scripted, conversations, settings, linger=0) as responses:
        connection = Connection(responses)
        for _ in range(3):
            connection.ask("wait on", conversation="none")
            await connection.delta()
        connection.session.close()
        await scripted.idle.wait()
        assert scripted.running == 0


async def test_resuming_an_unknown_reply_is_an_error(connection: Connection) -> None:
    connection.send("response.resume", response_id="resp_unknown", event_id="mine")
    error = await connection.error()
    assert (error["code"], error["event_id"]) == ("response_not_found", "mine")


async def test_seventeen_resumes_at_once_are_too_many(connection: Connection) -> None:
    for number in range(RESUMES + 1):
        connection.send("response.resume", response_id="resp_unknown", event_id=str(number))
    errors = [await connection.error() for _ in range(RESUMES + 1)]
    assert {error["event_id"]: error["code"] for error in errors} == {
        str(number): "response_not_found" if number < RESUMES else "too_many_responses" for number in range(RESUMES + 1)
    }


async def test_a_resumed_reply_starts_after_a_delta(connection: Connection) -> None:
    connection.ask("say hello there", conversation="none")
    reply = (await connection.done())["id"]
    connection.send("response.resume", response_id=reply, starting_after=1)
    *deltas, done = await connection.until("response.done")
    assert [(delta["sequence_number"], delta["delta"]) for delta in deltas] == [(2, "o th"), (3, "ere")]
    assert done["response"]["output_text"] == "hello there"


async def test_a_bug_while_resuming_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ResponseManager):
        def __init__(self) -> None:
            pass

        async def follow(self, user: str, id: str, starting_after: int, follower: Follower) -> None:
            raise RuntimeError("a bug")

    connection = Connection(Broken())
    connection.send("response.resume", response_id="resp_1", event_id="mine")
    error = await connection.error()
    assert (error["type"], error["code"], error["event_id"]) == ("server_error", "server_error", "mine")
    assert "a bug" in caplog.text
    assert "a bug" not in error["message"]
