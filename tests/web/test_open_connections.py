from __future__ import annotations

import pytest

from models.web.open_connections import LOG_SECONDS, OpenConnection, OpenConnections
from tests.support.fake_clock import FakeClock

LINE = "too many connections are open"


class Crowd:
    """Opens connections, and keeps the names of those that were closed."""

    def __init__(self, limit: int = 100, strangers: int = 100, per_address: int = 100, proxies: tuple[str, ...] = ()):
        self.clock = FakeClock()
        self.connections = OpenConnections(limit, strangers, per_address, proxies, self.clock)
        self.closed: list[str] = []

    def open(self, name: str, host: str | None = "10.0.0.1") -> OpenConnection:
        return self.connections.open(host, lambda: self.closed.append(name))


def test_the_stranger_who_is_silent_for_longest_makes_room() -> None:
    crowd = Crowd(strangers=3)
    first, *_ = [crowd.open(name, f"10.0.0.{name}") for name in "123"]
    first.request_began()
    crowd.open("4", "10.0.0.4")
    assert crowd.closed == ["2"]
    crowd.open("5", "10.0.0.5")
    assert crowd.closed == ["2", "3"]
    assert len(crowd.connections) == 3


def test_an_address_makes_room_for_itself() -> None:
    crowd = Crowd(per_address=2)
    crowd.open("other", "10.0.0.2")
    for name in "123":
        crowd.open(name)
    assert crowd.closed == ["1"]


@pytest.mark.parametrize(
    ("hosts", "closed"),
    [
        pytest.param(("2001:db8::1", "2001:db8::2:3", "2001:db8::ffff"), ["0"], id="one /64"),
        pytest.param(("2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:2::1"), [], id="three /64"),
        pytest.param(("10.0.0.1", "::ffff:10.0.0.1", "10.0.0.1"), ["0"], id="mapped"),
        pytest.param((None, None, None), ["0"], id="Unix socket"),
        pytest.param(("192.168.7.1",) * 3, [], id="proxy"),
        pytest.param(("::ffff:192.168.7.1",) * 3, [], id="mapped proxy"),
    ],
)
def test_an_address_is_counted_by_its_network(hosts: tuple[str | None, ...], closed: list[str]) -> None:
    crowd = Crowd(per_address=2, proxies=("192.168.0.0/16",))
    for number, host in enumerate(hosts):
        crowd.open(str(number), host)
    assert crowd.closed == closed


def test_a_trusted_unix_socket_has_no_limit_of_its_own() -> None:
    crowd = Crowd(strangers=3, per_address=1, proxies=("unix",))
    for name in "1234":
        crowd.open(name, None)
    assert crowd.closed == ["1"]


def test_users_make_no_room_and_no_longer_count_as_strangers() -> None:
    crowd = Crowd(limit=3, strangers=1, per_address=1)
    for name in "12":
        crowd.open(name).welcome()
    stranger = crowd.open("3")
    assert crowd.closed == []
    stranger.welcome()
    assert not stranger.is_stranger
    newcomer = crowd.open("4")  # there is room for three, and all of them are users
    assert crowd.closed == ["4"]
    assert not newcomer.is_stranger
    newcomer.closed()
    stranger.closed()
    crowd.open("5")
    assert crowd.closed == ["4"]


def test_what_is_closed_counts_no_more() -> None:
    crowd = Crowd(strangers=1)
    for name in "123":
        connection = crowd.open(name)
        connection.closed()
        connection.closed()
        connection.request_began()
        connection.welcome()
    assert (crowd.closed, len(crowd.connections)) == ([], 0)


def test_closed_strangers_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    crowd = Crowd(strangers=1)
    for lines in (1, 2):
        for _ in range(3):
            crowd.open("another")
        assert caplog.text.count(LINE) == lines
        crowd.clock.now += LOG_SECONDS


@pytest.mark.parametrize(("files", "connections"), [(64, 32), (100, 50), (1024, 960)])
def test_descriptors_are_kept_back_for_the_database(files: int, connections: int) -> None:
    open_connections = OpenConnections.within(files, ())
    for number in range(2 * files):
        open_connections.open(f"10.0.{number // 250}.{number % 250}", lambda: None).welcome()
    assert len(open_connections) == connections


def test_an_address_with_many_strangers_does_not_keep_out_others() -> None:
    crowd = Crowd(strangers=5)
    crowd.open("newcomer", "10.0.0.2")
    for number in range(100):
        crowd.open(str(number), "10.0.0.1")
    assert "newcomer" not in crowd.closed
    assert crowd.closed == [str(number) for number in range(96)]
