"""The app with PARLEY_REDIS_URL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from models.settings import Settings
from server import create_app
from tests.support.client import ANN, BOB, chat_v2, complete, log_in, until
from tests.support.redis_server import RedisServer
from tests.support.running_app import RunningApp, start
from tests.support.scripted import ScriptedChat

AWAY = "ready, but Redis is away: limits and presence are those of this host alone"


@pytest.fixture
def hosts(settings: Settings, redis_server: RedisServer, tmp_path: Path) -> Iterator[list[RunningApp]]:
    """Two hosts with one Redis. Each has a database of its own, which Redis does not know."""
    with ExitStack() as stack:
        shared = replace(settings, redis_url=redis_server.url)
        own = [replace(shared, data=tmp_path / name) for name in ("first", "second")]
        yield [stack.enter_context(start(create_app(one, ScriptedChat().opened))) for one in own]


def answers(app: RunningApp) -> bool:
    """Whether a host answers a login, a socket and a request."""
    client = app.client()
    with chat_v2(client):
        pass
    return [log_in(client).status_code, complete(client, "say Hello").status_code] == [303, 200]


def test_users_of_two_hosts_hear_of_each_other(hosts: list[RunningApp]) -> None:
    first, second = (host.client() for host in hosts)
    with chat_v2(first) as ann:
        with chat_v2(second, BOB):
            assert until(ann, "parley.presence.joined")["user"] == "bob"
        assert until(ann, "parley.presence.left")["user"] == "bob"


def test_wrong_secrets_on_two_hosts_count_together(hosts: list[RunningApp]) -> None:
    clients = [host.client() for host in hosts]  # the first client of each host has the same address
    assert [log_in(clients[number % 2], "wrong").status_code for number in range(12)] == [401] * 10 + [429] * 2


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_host_whose_redis_is_away_answers_and_is_ready_with_a_warning(
    hosts: list[RunningApp], redis_server: RedisServer, how: str
) -> None:
    first, _ = hosts
    assert first.client().get("/ready").text == "ready"
    redis_server.kill() if how == "killed" else redis_server.freeze()
    assert answers(first)
    response = first.client().get("/ready")
    assert (response.status_code, response.text) == (200, AWAY)


def test_a_host_starts_without_its_redis(settings: Settings, stopped_redis: RedisServer) -> None:
    app = create_app(replace(settings, redis_url=stopped_redis.url), ScriptedChat().opened)
    with start(app) as running:
        assert running.client().get("/ready").text == AWAY
        assert answers(running)


def test_the_url_of_redis_is_not_shown(hosts: list[RunningApp], redis_server: RedisServer) -> None:
    assert ANN not in hosts[0].client().get("/args").text
    assert str(redis_server.socket) not in hosts[0].client().get("/args").text
