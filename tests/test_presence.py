from __future__ import annotations

import pytest

from models.presence import Change, Presence

News = list[tuple[Change, str]]


class Connection:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.news: News = []

    def notify(self, change: Change, user: str) -> None:
        self.news.append((change, user))


def joined(presence: Presence, user: str) -> Connection:
    connection = Connection()
    presence.join(user, connection.notify)
    return connection


def test_every_other_connection_hears_of_a_users_first_one_and_of_the_end_of_the_last() -> None:
    presence = Presence()
    watchers = [joined(presence, "ann"), joined(presence, "ann"), joined(presence, "bob")]
    for watcher in watchers:
        watcher.news.clear()
    first, second = joined(presence, "eve"), joined(presence, "eve")
    presence.leave("eve", first.notify)
    assert [watcher.news for watcher in watchers] == [[("joined", "eve")]] * 3
    presence.leave("eve", second.notify)
    assert [watcher.news for watcher in watchers] == [[("joined", "eve"), ("left", "eve")]] * 3


def test_a_user_hears_nothing_about_herself() -> None:
    presence = Presence()
    first, second = joined(presence, "ann"), joined(presence, "ann")
    presence.leave("ann", first.notify)
    presence.leave("ann", second.notify)
    assert first.news == second.news == []


def test_a_connection_that_left_hears_nothing_more() -> None:
    presence = Presence()
    gone, still = joined(presence, "ann"), joined(presence, "ann")
    presence.leave("ann", gone.notify)
    joined(presence, "bob")
    assert (gone.news, still.news) == ([], [("joined", "bob")])


def test_whoever_comes_back_joins_anew() -> None:
    presence = Presence()
    ann = joined(presence, "ann")
    presence.leave("bob", joined(presence, "bob").notify)
    joined(presence, "bob")
    assert ann.news == [("joined", "bob"), ("left", "bob"), ("joined", "bob")]


@pytest.mark.parametrize("announce", [True, False])
def test_connections_are_counted_whether_or_not_they_are_announced(announce: bool) -> None:
    presence = Presence(announce)
    first, _ = joined(presence, "ann"), joined(presence, "ann")
    assert (presence.count("ann"), presence.count("bob")) == (2, 0)
    presence.leave("ann", first.notify)
    assert presence.count("ann") == 1


def test_nobody_is_told_where_announcing_is_off() -> None:
    presence = Presence(announce=False)
    ann = joined(presence, "ann")
    presence.leave("bob", joined(presence, "bob").notify)
    assert ann.news == []
