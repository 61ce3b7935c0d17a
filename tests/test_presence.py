from __future__ import annotations

import asyncio

import pytest

from models.presence import Change, Presence, TooManySockets

News = list[tuple[Change, str]]


class Connection:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.news: News = []
        self.closed: list[tuple[int, str]] = []

    def close(self, code: int, reason: str) -> None:
        self.closed.append((code, reason))

    def notify(self, change: Change, user: str) -> None:
        self.news.append((change, user))


def joined(presence: Presence, user: str) -> Connection:
    connection = Connection()
    presence.join(user, connection)
    return connection


def test_every_other_connection_hears_of_a_users_first_one_and_of_the_end_of_the_last() -> None:
    presence = Presence(announce=True, per_user=9)
    watchers = [joined(presence, "ann"), joined(presence, "ann"), joined(presence, "bob")]
    for watcher in watchers:
        watcher.news.clear()
    first, second = joined(presence, "eve"), joined(presence, "eve")
    presence.leave("eve", first)
    assert [watcher.news for watcher in watchers] == [[("joined", "eve")]] * 3
    presence.leave("eve", second)
    assert [watcher.news for watcher in watchers] == [[("joined", "eve"), ("left", "eve")]] * 3


def test_a_user_hears_nothing_about_herself() -> None:
    presence = Presence(announce=True, per_user=9)
    first, second = joined(presence, "ann"), joined(presence, "ann")
    presence.leave("ann", first)
    presence.leave("ann", second)
    assert first.news == second.news == []


def test_a_connection_that_left_hears_nothing_more() -> None:
    presence = Presence(announce=True, per_user=9)
    gone, still = joined(presence, "ann"), joined(presence, "ann")
    presence.leave("ann", gone)
    joined(presence, "bob")
    assert (gone.news, still.news) == ([], [("joined", "bob")])


def test_whoever_comes_back_joins_anew() -> None:
    presence = Presence(announce=True, per_user=9)
    ann = joined(presence, "ann")
    presence.leave("bob", joined(presence, "bob"))
    joined(presence, "bob")
    assert ann.news == [("joined", "bob"), ("left", "bob"), ("joined", "bob")]


@pytest.mark.parametrize("announce", [True, False])
def test_connections_are_counted_whether_or_not_they_are_announced(announce: bool) -> None:
    presence = Presence(announce, per_user=9)
    first, _ = joined(presence, "ann"), joined(presence, "ann")
    assert (presence.count("ann"), presence.count("bob")) == (2, 0)
    presence.leave("ann", first)
    assert presence.count("ann") == 1


def test_nobody_is_told_where_announcing_is_off() -> None:
    presence = Presence(announce=False, per_user=9)
    ann = joined(presence, "ann")
    presence.leave("bob", joined(presence, "bob"))
    assert ann.news == []


@pytest.mark.parametrize("per_user", [1, 3])
def test_a_user_may_have_so_many_connections_and_each_that_ends_makes_room(per_user: int) -> None:
    presence = Presence(announce=True, per_user=per_user)
    for _ in range(per_user):
        presence.admit("ann")
        last = joined(presence, "ann")
    with pytest.raises(TooManySockets, match="too many connections") as raised:
        presence.admit("ann")
    assert (raised.value.type, raised.value.code) == ("rate_limit_error", "too_many_sockets")
    presence.admit("bob")
    presence.leave("ann", last)
    presence.admit("ann")


def test_being_admitted_counts_nobody_in() -> None:
    presence = Presence(announce=True, per_user=1)
    for _ in range(3):
        presence.admit("ann")
    assert presence.count("ann") == 0


REVOKED = (4401, "invalid_credentials")


def test_all_connections_of_a_user_are_closed_and_nobody_elses() -> None:
    presence = Presence(announce=True, per_user=9)
    anns, bob = [joined(presence, "ann") for _ in range(3)], joined(presence, "bob")
    presence.close("ann", *REVOKED)
    assert [ann.closed for ann in anns] == [[REVOKED]] * 3
    assert bob.closed == []


def test_a_user_without_connections_can_be_closed() -> None:
    Presence(announce=True, per_user=9).close("ann", *REVOKED)


def test_connections_count_until_they_have_left() -> None:
    presence = Presence(announce=True, per_user=2)
    first, _, _ = joined(presence, "ann"), joined(presence, "ann"), joined(presence, "bob")
    presence.close("ann", *REVOKED)
    assert (len(presence), presence.count("ann")) == (3, 2)
    presence.leave("ann", first)
    assert (len(presence), presence.count("ann")) == (2, 1)


@pytest.mark.anyio
async def test_closing_all_waits_until_the_last_has_left_and_nobody_hears_of_it() -> None:
    presence = Presence(announce=True, per_user=9)
    presence.leave("eve", joined(presence, "eve"))  # once before there was nobody
    everybody = [(user, joined(presence, user)) for user in ("ann", "ann", "bob")]
    for _, connection in everybody:
        connection.news.clear()
    closing = asyncio.create_task(presence.close_all(1012, "the server restarts"))
    await asyncio.sleep(0)
    for user, connection in everybody:
        assert connection.closed == [(1012, "the server restarts")]
        assert not closing.done()
        presence.leave(user, connection)
    await closing
    assert [connection.news for _, connection in everybody] == [[]] * 3


@pytest.mark.anyio
async def test_where_nobody_is_closing_all_does_not_wait() -> None:
    presence = Presence(announce=True, per_user=9)
    await presence.close_all(1012, "the server restarts")
    presence.leave("ann", joined(presence, "ann"))
    await presence.close_all(1012, "the server restarts")
