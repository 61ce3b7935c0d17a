"""Two hosts with one database: what a client of one does with a reply that the other one runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from models.settings import Settings
from server import create_app
from tests.conftest import SERVES
from tests.support.client import bearer
from tests.support.databases import EMPTY, PostgreSQL
from tests.support.responses import PARTS
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served
from tests.support.sockets import ask, chat_v2, events_until_done, resume
from tests.web.test_resume import following, received, so_far, standard

Hosts = tuple[Served, Served]


@pytest.fixture(params=SERVES)
def hosts(
    request: pytest.FixtureRequest, settings: Settings, scripted: ScriptedChat, postgresql: PostgreSQL, tmp_path: Path
) -> Iterator[Hosts]:
    """Two hosts, each of one process or with workers; the replies of the first one are scripted."""
    asyncio.run(postgresql.execute(EMPTY))
    shared = replace(settings, database_url=postgresql.url(), key="k" * 32, peer_address="127.0.0.1:0")
    with ExitStack() as stack:
        serve = SERVES[request.param]
        first, second = (
            stack.enter_context(serve(create_app(replace(shared, data=tmp_path / name), chat.opened)))
            for name, chat in (("first", scripted), ("second", ScriptedChat()))
        )
        yield first, second


def post(host: Served, path: str) -> httpx2.Response:
    return httpx2.post(f"{host.url}{path}", headers=bearer())


def test_a_running_reply_resumes_at_each_event_at_another_host(hosts: Hosts, scripted: ScriptedChat) -> None:
    first, second = hosts
    with chat_v2(first) as asking, chat_v2(second) as other, ExitStack() as stack:
        ask(asking, f"pause {PARTS}")
        events = so_far(asking)
        id = events[0]["response"]["id"]
        for number in range(-1, len(events) - 1):
            resume(other, id, number)
            assert received(other, len(events) - 1 - number) == events[number + 1 :]
        streams = [stack.enter_context(following(second, id, number)) for number in (-1, len(events) - 2)]
        first.in_loop(scripted.release)
        rest = events_until_done(asking)
        assert events_until_done(other) == rest
        assert list(streams[0]) == standard([*events, *rest])
        assert list(streams[1]) == standard([events[-1], *rest])


def test_a_reply_is_cancelled_at_another_host(hosts: Hosts) -> None:
    first, second = hosts
    with chat_v2(first) as asking:
        ask(asking, f"pause {PARTS}")
        id = so_far(asking)[0]["response"]["id"]
        answer = post(second, f"/v1/responses/{id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        assert events_until_done(asking)[-1]["response"]["id"] == id
        assert post(second, f"/v1/responses/{id}/cancel").json()["status"] == "cancelled"


def test_a_reply_that_a_socket_follows_is_stopped_at_its_host(hosts: Hosts) -> None:
    first, second = hosts
    with chat_v2(first) as asking, chat_v2(second) as other:
        ask(asking, f"pause {PARTS}")
        events = so_far(asking)
        resume(other, events[0]["response"]["id"])
        received(other, len(events))
        other.send('{"type": "parley.response.cancel"}')
        assert events_until_done(other) == events_until_done(asking)


def test_a_reply_is_deleted_at_another_host(hosts: Hosts) -> None:
    first, second = hosts
    with chat_v2(first) as asking:
        ask(asking, f"pause {PARTS}")
        url = f"/v1/responses/{so_far(asking)[0]['response']['id']}"
        assert httpx2.delete(f"{second.url}{url}", headers=bearer()).status_code == 200
        events_until_done(asking)
        for host in hosts:
            assert httpx2.get(f"{host.url}{url}", headers=bearer()).status_code == 404
