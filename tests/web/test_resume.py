"""A reply that is dropped at any of its events, and resumed: always the same events, with the same numbers."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import httpx2
import pytest
from websockets.sync.client import ClientConnection

from models.settings import Settings
from models.validation import Json
from server import create_app
from tests.support.client import bearer
from tests.support.responses import PARTS, check_events
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served, serve
from tests.support.sockets import ask, chat_v2, events_until_done, receive, resume

ENDLESS = 60.0  # seconds for what takes less than one


@pytest.fixture
def roomy(settings: Settings) -> Settings:
    """Settings that allow a connection for each event of a reply."""
    return replace(settings, sockets_per_user=200)


@contextmanager
def following(served: Served, id: str, starting_after: int) -> Iterator[Iterator[Json]]:
    """The events of a response after a number, over HTTP, as they come."""
    parameters = {"stream": "true"} | ({} if starting_after < 0 else {"starting_after": str(starting_after)})
    url = f"{served.url}/v1/responses/{id}"
    with httpx2.stream("GET", url, params=parameters, headers=bearer(), timeout=ENDLESS, verify=False) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        yield (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))


def received(connection: ClientConnection, count: int) -> list[Json]:
    """The next events on a socket."""
    return [receive(connection) for _ in range(count)]


def so_far(connection: ClientConnection) -> list[Json]:
    """The events of a reply up to the last piece of its text."""
    events: list[Json] = received(connection, 1)
    while events[-1].get("delta") != "done":
        events += received(connection, 1)
    return events


def standard(events: list[Json]) -> list[Json]:
    """The events without the field of their responses that only `/ws` has."""
    return [
        event | {"response": {name: value for name, value in event["response"].items() if name != "parley"}}
        if "response" in event
        else event
        for event in events
    ]


def check_resumes(served: Served, events: list[Json]) -> None:
    """Check that a response that has ended is resumed at each of its events, by socket and over HTTP."""
    id = events[0]["response"]["id"]
    with chat_v2(served) as connection:
        resume(connection, id)
        on_socket, over_http = events_until_done(connection), standard(events)
        assert standard(on_socket) == over_http
        for number in range(-1, len(events) - 1):
            resume(connection, id, number)
            assert events_until_done(connection) == on_socket[number + 1 :]
            with following(served, id, number) as followed:
                assert list(followed) == over_http[number + 1 :]
        with following(served, id, len(events) - 1) as followed:
            assert list(followed) == []


@pytest.mark.parametrize("fields", [{}, {"conversation": "new"}, {"store": False}], ids=["alone", "listed", "unstored"])
def test_a_running_reply_resumes_at_each_event(roomy: Settings, scripted: ScriptedChat, fields: Json) -> None:
    with serve(create_app(roomy, scripted.opened)) as served, ExitStack() as stack:
        asking = stack.enter_context(chat_v2(served))
        ask(asking, f"pause {PARTS}", **fields)
        events = so_far(asking)
        id = events[0]["response"]["id"]
        sockets, streams = [], []
        for number in range(-1, len(events)):
            sockets.append(stack.enter_context(chat_v2(served)))
            resume(sockets[-1], id, number)
            streams.append(stack.enter_context(following(served, id, number)))
        for number in range(len(events) + 1):
            assert received(sockets[number], len(events) - number) == events[number:]
            assert [next(streams[number]) for _ in events[number:]] == standard(events[number:])
        served.in_loop(scripted.release)
        rest = events_until_done(asking)
        check_events(events + rest)
        for connection, stream in zip(sockets, streams, strict=True):
            assert events_until_done(connection) == rest
            assert list(stream) == standard(rest)


def test_a_reply_in_the_background_resumes_at_each_event(settings: Settings, scripted: ScriptedChat) -> None:
    with serve(create_app(settings, scripted.opened)) as served:
        body = {"input": f"pause {PARTS}", "background": True, "stream": True}
        url = f"{served.url}/v1/responses"
        with httpx2.stream("POST", url, json=body, headers=bearer(), timeout=ENDLESS, verify=False) as response:
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
            events: list[Json] = [json.loads(next(lines))]
            while events[-1].get("delta") != "done":
                events.append(json.loads(next(lines)))
        id = events[0]["response"]["id"]  # nobody follows it from now on
        for number in range(-1, len(events) - 1):
            with following(served, id, number) as followed:
                assert [next(followed) for _ in events[number + 1 :]] == events[number + 1 :]
        served.in_loop(scripted.release)
        with following(served, id, len(events) - 1) as followed:
            events += followed
        check_events(events)
        check_resumes(served, events)


def test_a_reply_that_is_dropped_after_each_event_and_resumed_has_all_events_once(
    settings: Settings, scripted: ScriptedChat
) -> None:
    with serve(create_app(settings, scripted.opened)) as served:
        with chat_v2(served) as connection:
            ask(connection, f"pause {PARTS}")
            events = received(connection, 1)
            connection.socket.shutdown(socket.SHUT_RDWR)
        id = events[0]["response"]["id"]
        while events[-1].get("delta") != "done":
            with chat_v2(served) as connection:
                resume(connection, id, events[-1]["sequence_number"])
                events += received(connection, 1)
                connection.socket.shutdown(socket.SHUT_RDWR)
            with following(served, id, events[-1]["sequence_number"]) as followed:
                if events[-1].get("delta") != "done":
                    events.append(next(followed))
        served.in_loop(scripted.release)
        with chat_v2(served) as connection:
            resume(connection, id, events[-1]["sequence_number"])
            events += events_until_done(connection)
        check_events(events)
        check_resumes(served, events)


def test_an_unstored_reply_that_has_ended_resumes_at_each_event(settings: Settings, scripted: ScriptedChat) -> None:
    with serve(create_app(settings, scripted.opened)) as served:
        with chat_v2(served) as connection:
            ask(connection, f"perform {PARTS}", store=False)
            events = events_until_done(connection)
        check_events(events)
        check_resumes(served, events)


@pytest.mark.parametrize("fields", [{}, {"conversation": "new"}], ids=["alone", "listed"])
def test_a_stored_reply_resumes_at_each_event_also_after_a_restart(
    settings: Settings, scripted: ScriptedChat, fields: Json
) -> None:
    with serve(create_app(settings, scripted.opened)) as served:
        with chat_v2(served) as connection:
            ask(connection, f"perform {PARTS}", instructions="be brief", metadata={"a": "b"}, **fields)
            events = events_until_done(connection)
        check_events(events)
        check_resumes(served, events)
    with serve(create_app(settings, ScriptedChat().opened)) as served:
        check_resumes(served, events)


def test_a_reply_of_a_server_that_stopped_resumes_at_each_event(settings: Settings, scripted: ScriptedChat) -> None:
    with serve(create_app(settings, scripted.opened)) as served, chat_v2(served) as connection:
        ask(connection, f"pause {PARTS}")
        before = so_far(connection)
    with serve(create_app(settings, ScriptedChat().opened)) as served:
        with following(served, before[0]["response"]["id"], -1) as followed:
            events = list(followed)
        assert events[: len(before)] == standard(before)
        assert check_events(events)["error"]["message"] == "The server stopped before the reply ended."
        check_resumes(served, events)


@pytest.mark.parametrize("end", ["break", "cancel"])
def test_a_reply_that_was_cut_resumes_at_each_event(settings: Settings, scripted: ScriptedChat, end: str) -> None:
    with serve(create_app(settings, scripted.opened)) as served:
        with chat_v2(served) as connection:
            ask(connection, "break this now" if end == "break" else f"pause {PARTS}")
            events = []
            if end == "cancel":
                events = so_far(connection)
                connection.send(json.dumps({"type": "parley.response.cancel"}))
            events += events_until_done(connection)
        assert check_events(events)["status"] == ("failed" if end == "break" else "cancelled")
        check_resumes(served, events)
    with serve(create_app(settings, ScriptedChat().opened)) as served:
        check_resumes(served, events)


def test_all_events_of_a_response_keep_the_lane_of_the_request_that_resumes_it(scripted_server: Served) -> None:
    with chat_v2(scripted_server) as connection:
        ask(connection, f"perform {PARTS}", stream_id="first")
        events = events_until_done(connection)
        resume(connection, events[0]["response"]["id"], 3, stream_id="second")
        again = events_until_done(connection)
    assert again == [event | {"stream_id": "second"} for event in events[4:]]
