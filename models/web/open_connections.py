"""The open connections of the web server, and which of them are of strangers."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from ipaddress import ip_network

from models.users.addresses import counted, unmapped

logger = logging.getLogger("parley")

STRANGERS_PER_ADDRESS = 64
STRANGERS = 1024
RESERVE = 64  # descriptors for the database and for files
LOG_SECONDS = 60  # between two log lines

Close = Callable[[], None]
Strangers = OrderedDict["OpenConnection", None]


class OpenConnection:
    """A connection to a client, who is a stranger until `welcome` is called; `address` is None for a trusted proxy."""

    def __init__(self, others: OpenConnections, address: str | None, close: Close) -> None:
        self._others = others
        self.address = address
        self.close = close

    @property
    def is_stranger(self) -> bool:
        """Whether the client has not authenticated."""
        return self._others.has_stranger(self)

    def welcome(self) -> None:
        """Note that the client is a user."""
        self._others.forget_stranger(self)

    def request_began(self) -> None:
        """Note a new request: nobody has been silent for a shorter time."""
        self._others.renew(self)

    def close_stranger(self) -> None:
        """Close the connection, unless the client is a user."""
        if self.is_stranger:
            self.close()

    def closed(self) -> None:
        """Note that the connection is closed."""
        self._others.forget(self)


class OpenConnections:
    """Counts open connections. If a stranger is one too many, the one of the same address, or of the address with
    most strangers, that has been silent for longest is closed.

    So a newcomer gets in, whoever else holds connections. There are at most `per_address` strangers of an address, and
    `strangers` of them in all; with those of users, there are at most `limit` connections.
    """

    def __init__(
        self,
        limit: int,
        strangers: int = STRANGERS,
        per_address: int = STRANGERS_PER_ADDRESS,
        proxies: tuple[str, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limit, strangers, per_address
        self._proxies = [ip_network(proxy) for proxy in proxies if proxy != "unix"]
        self._trusts_unix = "unix" in proxies
        self._open: set[OpenConnection] = set()
        self._strangers = Strangers()  # the one that has been silent for longest is first
        self._of_address: defaultdict[str | None, Strangers] = defaultdict(OrderedDict)
        self._clock = clock
        self._logged_at = -math.inf

    @classmethod
    def within(cls, file_limit: int, proxies: tuple[str, ...]) -> OpenConnections:
        """As many connections as the limit of open files allows, with a reserve for the database."""
        return cls(file_limit - min(RESERVE, file_limit // 2), proxies=proxies)

    def __len__(self) -> int:
        return len(self._open)

    def open(self, host: str | None, close: Close) -> OpenConnection:
        """Note a new connection, of a stranger; `close` closes it at once. `host` is None for a Unix socket."""
        connection = OpenConnection(self, self._address(host), close)
        self._open.add(connection)
        self._strangers[connection] = self._of_address[connection.address][connection] = None
        self._make_room(connection.address)
        return connection

    def has_stranger(self, connection: OpenConnection) -> bool:
        """Whether a connection is open, and of a stranger."""
        return connection in self._strangers

    def renew(self, connection: OpenConnection) -> None:
        """Note a new request on a connection."""
        if connection in self._strangers:
            self._strangers.move_to_end(connection)
            self._of_address[connection.address].move_to_end(connection)

    def forget_stranger(self, connection: OpenConnection) -> None:
        """Note that a connection is none of a stranger any more."""
        if connection in self._strangers:
            del self._strangers[connection], self._of_address[connection.address][connection]
            if not self._of_address[connection.address]:
                del self._of_address[connection.address]

    def forget(self, connection: OpenConnection) -> None:
        """Note that a connection is closed."""
        self.forget_stranger(connection)
        self._open.discard(connection)

    def _make_room(self, address: str | None) -> None:
        limit, strangers, per_address = self._limits
        if address is not None and len(self._of_address[address]) > per_address:
            self._evict(next(iter(self._of_address[address])), "of one address")
        elif len(self._strangers) > strangers:
            self._evict(self._oldest_of_most(), "of strangers")
        elif len(self) > limit:
            self._evict(self._oldest_of_most(), "for the limit of files: raise `ulimit -n`")

    def _oldest_of_most(self) -> OpenConnection:
        """Of the addresses with most strangers, the stranger that has been silent for longest.

        So an address with many does not close the connections of the others.
        """
        most = max(map(len, self._of_address.values()))
        return next(one for one in self._strangers if len(self._of_address[one.address]) == most)

    def _evict(self, connection: OpenConnection, which: str) -> None:
        self.forget(connection)  # not later, so that it makes room only once
        connection.close()
        if self._clock() >= self._logged_at + LOG_SECONDS:
            self._logged_at = self._clock()
            logger.warning("closed a stranger who was silent for longest: too many connections are open, %s", which)

    def _address(self, host: str | None) -> str | None:
        """The address or network that the limit of an address counts; None for a trusted proxy, which has no limit."""
        if host is None:
            return None if self._trusts_unix else "unix"
        try:
            is_proxy = any(unmapped(host) in network for network in self._proxies)
        except ValueError:
            is_proxy = False
        return None if is_proxy else counted(host)
