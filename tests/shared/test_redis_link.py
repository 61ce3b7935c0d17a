from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from models.errors import SettingsError
from models.shared.redis_link import ANSWER_SECONDS, LATE_SECONDS, RedisAwayError, RedisLink
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.anyio


class Asker:
    """Asks Redis for a PING through a link, and counts how often it is asked."""

    def __init__(self, link: RedisLink) -> None:
        self.link = link
        self.asked = 0

    async def ask(self) -> bool:
        return await self.link.ask(self._ping)

    async def attempt(self) -> bool:
        return await self.link.attempt(self._ping)

    async def _ping(self) -> bool:
        self.asked += 1
        return bool(await self.link.client.ping())


@pytest.fixture
async def asker(stopped_redis: RedisServer) -> AsyncIterator[Asker]:
    """One who asks a Redis that does not run yet."""
    link = RedisLink(stopped_redis.url)
    yield Asker(link)
    await link.close()


@pytest.mark.parametrize(
    "url",
    ["redis://:hunter2@host:port/0", "redis://:hunter2@host?nothing=1", "redis://:hunter2@host?socket_timeout=x"],
    ids=["port", "option", "value"],
)
async def test_a_url_that_cannot_be_read_is_refused_without_showing_the_password(url: str) -> None:
    with pytest.raises(SettingsError, match="PARLEY_REDIS_URL cannot be read") as raised:
        RedisLink(url)
    assert "hunter2" not in str(raised.value)


async def test_redis_answers(asker: Asker, stopped_redis: RedisServer) -> None:
    stopped_redis.start()
    assert await asker.ask()
    assert asker.link.trouble is None


@pytest.mark.parametrize("how", ["never started", "killed", "frozen"])
async def test_a_redis_that_is_away_is_asked_once_and_a_warning_is_logged_once(
    asker: Asker, stopped_redis: RedisServer, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    if how != "never started":
        stopped_redis.start()
        await asker.ask()
        stopped_redis.kill() if how == "killed" else stopped_redis.freeze()
    asker.asked = 0
    for _ in range(3):
        with pytest.raises(RedisAwayError):
            await asker.ask()
    assert asker.asked == 1
    assert asker.link.trouble == "Redis is away: limits and presence are those of this host alone"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith("Redis is away, so each host counts for itself: ")


async def test_an_attempt_finds_out_that_redis_is_back(
    asker: Asker, stopped_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RedisAwayError):
        await asker.attempt()
    with pytest.raises(RedisAwayError):
        await asker.attempt()
    stopped_redis.start()
    await asker.attempt()
    asker.link.recovered()
    await asker.link.wait_there()
    assert await asker.ask()
    assert asker.link.trouble is None
    assert caplog.messages[1:] == ["Redis is back"]


async def test_a_host_that_is_too_busy_to_hear_the_answer_asks_again(asker: Asker, stopped_redis: RedisServer) -> None:
    stopped_redis.start()
    await asker.ask()
    asyncio.get_running_loop().call_soon(time.sleep, ANSWER_SECONDS + 2 * LATE_SECONDS)
    assert await asker.ask()
    assert asker.link.trouble is None


async def test_idle_connections_are_dropped(asker: Asker, stopped_redis: RedisServer) -> None:
    stopped_redis.start()
    await asyncio.gather(*[asker.ask() for _ in range(9)])
    assert len(await asker.link.client.client_list()) > 1
    await asker.link.drop_idle()
    assert len(await asker.link.client.client_list()) == 1


async def test_a_hundred_questions_at_once_leave_connections_for_later(
    asker: Asker, stopped_redis: RedisServer
) -> None:
    stopped_redis.start()
    for _ in range(2):
        stopped_redis.freeze()
        errors = await asyncio.gather(*[asker.ask() for _ in range(100)], return_exceptions=True)
        assert {type(error) for error in errors} == {RedisAwayError}
        stopped_redis.thaw()
        await asker.attempt()
        asker.link.recovered()
        assert all(await asyncio.gather(*[asker.ask() for _ in range(100)]))


async def test_the_log_shows_no_password(stopped_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    stopped_redis.start()
    link = RedisLink(f"{stopped_redis.url}?password=hunter2")  # this Redis has none, so it refuses
    with pytest.raises(RedisAwayError):
        await Asker(link).ask()
    await link.close()
    assert "Redis is away" in caplog.text
    assert "hunter2" not in caplog.text
