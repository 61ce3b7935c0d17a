from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from models.conversations import Conversations
from models.events import Json
from models.responses import Responses
from models.session import RESUMES, Session
from models.settings import Settings
from tests.scripted import ScriptedChat, running

pytestmark = pytest.mark.anyio


class Wire:
    """A session and what it sent."""

    def __init__(self, chat: ScriptedChat, responses: Responses, user: str = "ann") -> None:
        self.sent: asyncio.Queue[Json] = asyncio.Queue()
        self.session = Session(chat, responses, user, {}, self)  # type: ignore[arg-type]

    def send(self, event: Json) -> None:
        self.sent.put_nowait(event)

    async def drained(self) -> None:
        """All that was sent is as good as read."""

    def tell(self, type: str, **fields: Any) -> None:
        self.session.receive(json.dumps({"type": type, **fields}))

    def ask(self, input: Any, event_id: str | None = None, **options: Any) -> None:
        self.tell("response.create", event_id=event_id, response={"input": input, **options})

    async def until(self, type: str) -> list[Json]:
        """Everything up to the next event of a type, that included."""
        events = [await self.sent.get()]
        while events[-1]["type"] != type:
            events.append(await self.sent.get())
        return events

    async def error(self) -> Json:
        error: Json = (await self.until("error"))[-1]["error"]
        return error


@pytest.fixture
async def wire(scripted: ScriptedChat, responses: Responses) -> AsyncIterator[Wire]:
    wire = Wire(scripted, responses)
    assert (await wire.sent.get())["type"] == "session.created"
    yield wire
    wire.session.close()


async def test_a_reply_is_created_numbered_and_done(wire: Wire) -> None:
    wire.ask("say hello there", event_id="mine")
    created, *deltas, done = await wire.until("response.done")
    assert created["event_id"] == "mine"
    assert created["response"]["status"] == "in_progress"
    assert [delta["sequence_number"] for delta in deltas] == [1, 2, 3]
    assert "".join(delta["delta"] for delta in deltas) == done["response"]["output_text"] == "hello there"
    assert done["sequence_number"] == 4
    assert {delta["response_id"] for delta in deltas} == {done["response"]["id"]} == {created["response"]["id"]}
    assert (done["response"]["status"], done["response"]["status_details"]) == ("completed", {"reason": "stop"})
    usage = {"input_tokens": 1, "cached_tokens": 0, "output_tokens": 3, "total_tokens": 4}
    assert done["response"]["usage"] == usage


async def test_a_conversation_goes_on_from_what_was_said(wire: Wire, scripted: ScriptedChat) -> None:
    for message in ("say one", "say two"):
        wire.ask(message)
        await wire.until("response.done")
    assert [(turn["role"], turn["content"]) for turn in scripted.heard[-1][0]] == [
        ("user", "say one"),
        ("assistant", "one"),
        ("user", "say two"),
    ]


async def test_the_conversation_none_is_its_input_alone_and_may_run_beside_others(
    wire: Wire, scripted: ScriptedChat
) -> None:
    wire.ask("say one")
    await wire.until("response.done")
    wire.ask("wait a")
    await wire.until("response.output_text.delta")
    wire.ask([{"role": "user", "content": "say two"}], conversation="none")
    done = (await wire.until("response.done"))[-1]["response"]
    assert (done["conversation"], done["output_text"]) == (None, "two")
    assert scripted.heard[-1][0] == [{"role": "user", "content": "say two"}]


async def test_its_own_id_names_the_conversation_and_another_is_not_found(wire: Wire) -> None:
    wire.ask("say one")
    own = (await wire.until("response.done"))[-1]["response"]["conversation"]
    wire.ask("say two", conversation=own)
    assert (await wire.until("response.done"))[-1]["response"]["output_text"] == "two"
    wire.ask("say three", event_id="lost", conversation="conv_of_somebody_else")
    assert (error := await wire.error())["code"] == "conversation_not_found"
    assert error["event_id"] == "lost"


async def test_a_conversation_makes_one_reply_at_a_time(wire: Wire, scripted: ScriptedChat) -> None:
    wire.ask("wait one")
    await wire.until("response.output_text.delta")
    wire.ask("say two")
    assert (await wire.error())["code"] == "conversation_busy"
    scripted.release()
    assert (await wire.until("response.done"))[-1]["response"]["output_text"] == "one"


async def test_options_hold_for_a_response_or_as_defaults_for_the_session(wire: Wire, scripted: ScriptedChat) -> None:
    wire.tell("session.update", session={"temperature": 0, "stop": "END"})
    updated = (await wire.until("session.updated"))[-1]["session"]["options"]
    assert (updated["temperature"], updated["stop"]) == (0, ["END"])
    wire.ask("say one", seed=3)
    await wire.until("response.done")
    wire.ask("say two")
    await wire.until("response.done")
    (_, first), (_, second) = scripted.heard
    assert (first.temperature, first.stop, first.seed) == (0, ("END",), 3)
    assert (second.temperature, second.seed) == (0, None)


@pytest.mark.parametrize("by_id", [True, False])
async def test_cancel_ends_the_reply_with_what_was_said_so_far(wire: Wire, scripted: ScriptedChat, by_id: bool) -> None:
    wire.ask("wait some")
    delta = (await wire.until("response.output_text.delta"))[-1]
    wire.tell("response.cancel", **({"response_id": delta["response_id"]} if by_id else {}))
    done = (await wire.until("response.done"))[-1]["response"]
    assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "client_cancelled")
    assert done["output_text"] == "some"
    assert scripted.running == 0
    wire.ask("say more")
    await wire.until("response.done")
    assert [turn["content"] for turn in scripted.heard[-1][0]] == ["wait some", "some", "say more"]


async def test_a_reply_cancelled_before_it_began_is_created_and_done_and_its_message_kept(
    wire: Wire, scripted: ScriptedChat
) -> None:
    wire.ask("wait one", event_id="mine")
    wire.tell("response.cancel")
    created, *_, done = await wire.until("response.done")
    assert (created["type"], created["event_id"]) == ("response.created", "mine")
    assert done["response"]["status"] == "cancelled"
    wire.ask("say two")
    await wire.until("response.done")
    assert [turn["content"] for turn in scripted.heard[-1][0]] == ["wait one", "one", "say two"]


async def test_cancelling_what_does_not_run_is_an_error_by_id_and_nothing_otherwise(wire: Wire) -> None:
    wire.tell("response.cancel")
    wire.tell("response.cancel", response_id="resp_nobody", event_id="mine")
    error = await wire.error()
    assert (error["code"], error["event_id"]) == ("response_not_found", "mine")


async def test_queue_positions_are_told(wire: Wire) -> None:
    wire.ask("queue up")
    events = await wire.until("response.done")
    assert [event["position"] for event in events if event["type"] == "response.queued"] == [2, 1]


async def test_a_bug_in_a_reply_is_told_as_failed_and_the_session_goes_on(wire: Wire) -> None:
    wire.ask("break here")
    done = (await wire.until("response.done"))[-1]["response"]
    assert (done["status"], done["status_details"]["reason"]) == ("failed", "server_error")
    assert done["output_text"] == "here"
    wire.ask("say on")
    assert (await wire.until("response.done"))[-1]["response"]["status"] == "completed"


async def test_refusals_are_errors_of_the_request_and_not_responses(wire: Wire, scripted: ScriptedChat) -> None:
    scripted.admission.per_user = 0
    wire.ask("say one", event_id="mine")
    (error,) = await wire.until("error")
    assert (error["error"]["type"], error["error"]["code"]) == ("rate_limit_error", "too_many_responses")
    assert error["error"]["event_id"] == "mine"


async def test_the_twentieth_bad_frame_in_a_row_closes_and_a_good_one_starts_the_count_anew(wire: Wire) -> None:
    for _ in range(19):
        assert wire.session.receive("nonsense") is None
        assert (await wire.error())["code"] == "invalid_json"
    wire.tell("response.cancel")
    closes = [wire.session.receive("nonsense") for _ in range(20)]
    assert closes == [None] * 19 + [(4400, "20 bad frames in a row")]


async def test_replies_outlive_the_connection(wire: Wire, scripted: ScriptedChat, responses: Responses) -> None:
    wire.ask("wait on")
    reply = (await wire.until("response.output_text.delta"))[-1]["response_id"]
    wire.session.close()
    other = Wire(scripted, responses)
    other.tell("response.resume", response_id=reply)
    assert (await other.until("response.output_text.delta"))[-1]["delta"] == "on"
    scripted.release()
    assert (await other.until("response.done"))[-1]["response"]["status"] == "completed"


async def test_without_linger_closing_ends_all_replies(
    scripted: ScriptedChat, conversations: Conversations, settings: Settings
) -> None:
    async with running(scripted, conversations, settings, linger=0) as responses:
        wire = Wire(scripted, responses)
        for _ in range(3):
            wire.ask("wait on", conversation="none")
            await wire.until("response.output_text.delta")
        wire.session.close()
        await scripted.idle.wait()
        assert scripted.running == 0


async def test_another_connection_may_cancel_by_id_and_not_by_all(
    wire: Wire, scripted: ScriptedChat, responses: Responses
) -> None:
    wire.ask("wait on")
    reply = (await wire.until("response.output_text.delta"))[-1]["response_id"]
    other = Wire(scripted, responses)
    other.tell("response.cancel")
    assert scripted.running == 1
    other.tell("response.cancel", response_id=reply)
    assert (await wire.until("response.done"))[-1]["response"]["status"] == "cancelled"


async def test_a_new_conversation_is_begun_each_time_and_goes_on_by_its_id(wire: Wire, scripted: ScriptedChat) -> None:
    wire.ask("say one", conversation="new")
    first = (await wire.until("response.done"))[-1]["response"]["conversation"]
    wire.ask("say two", conversation="new")
    second = (await wire.until("response.done"))[-1]["response"]["conversation"]
    assert first != second
    wire.ask("say three", conversation=first)
    await wire.until("response.done")
    assert [turn["content"] for turn in scripted.heard[-1][0]] == ["say one", "one", "say three"]


async def test_a_conversation_goes_on_from_another_connection(
    wire: Wire, scripted: ScriptedChat, responses: Responses
) -> None:
    wire.ask("say one")
    own = (await wire.until("response.done"))[-1]["response"]["conversation"]
    other = Wire(scripted, responses)
    other.ask("say two", conversation=own)
    await other.until("response.done")
    assert [turn["content"] for turn in scripted.heard[-1][0]] == ["say one", "one", "say two"]
    stranger = Wire(scripted, responses, "bob")
    stranger.ask("say three", conversation=own)
    assert (await stranger.error())["code"] == "conversation_not_found"


async def test_resuming_what_is_not_there_is_an_error_of_the_request(wire: Wire) -> None:
    wire.tell("response.resume", response_id="resp_nobody", event_id="mine")
    error = await wire.error()
    assert (error["code"], error["event_id"]) == ("response_not_found", "mine")


async def test_seventeen_resumptions_at_once_are_one_too_many(wire: Wire) -> None:
    for number in range(RESUMES + 1):
        wire.tell("response.resume", response_id="resp_nobody", event_id=str(number))
    errors = [await wire.error() for _ in range(RESUMES + 1)]
    assert {error["event_id"]: error["code"] for error in errors} == {
        str(number): "response_not_found" if number < RESUMES else "too_many_responses" for number in range(RESUMES + 1)
    }
