"""The connections of this host to the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from models.errors import ServerUnavailableError, StartError, one_line
from models.generation.manager import ResponseManager
from models.hosts.door import Door, enter
from models.hosts.followers import Followed, Followers
from models.hosts.peer import Peer
from models.hosts.peer_service import PeerService
from models.hub.link import Link
from models.hub.wire import OnceEncoder

logger = logging.getLogger("parley")

ANSWER_SECONDS = 2.0  # for a connection with the proofs of both sides, and for each ping; also between two pings
STRANGERS = 64  # connections at once without a proof
STRANGER_BYTES = 1024  # of a frame before the proof


class Peers:
    """Connects to the hosts where replies run, and lets other hosts connect to this one at its address, if it has one.

    A host that does not answer is disconnected after some seconds.
    """

    def __init__(self, key: bytes, seconds: float = ANSWER_SECONDS) -> None:
        self.address: str | None = None  # where other hosts reach this one
        self._key = key
        self._seconds = seconds
        self._encoder = OnceEncoder()
        self._server: asyncio.Server | None = None
        self._responses: ResponseManager  # once it serves
        self._strangers: dict[Link, None] = {}  # the oldest one first
        self._guests: dict[Link, PeerService] = {}
        self._hosts: dict[str, asyncio.Task[Peer]] = {}  # by address; connected, or about to be
        self._unreachable: set[str] = set()  # addresses about which the log has been told
        self._watching: dict[Link, asyncio.Task[None]] = {}

    @classmethod
    @asynccontextmanager
    async def opened(cls, address: str | None, key: bytes, seconds: float = ANSWER_SECONDS) -> AsyncIterator[Peers]:
        """The connections for as long as the context lasts; all hosts have one key. Raises StartError.

        `serve` lets other hosts in.
        """
        peers = cls(key, seconds)
        if address:
            await peers._bind(address)
        try:
            yield peers
        finally:
            await peers._close()

    async def serve(self, responses: ResponseManager) -> None:
        """Let other hosts follow and end the responses that run here."""
        self._responses = responses
        if self._server:
            await self._server.start_serving()

    async def at(self, address: str) -> Peer:
        """The host at an address. Raises ServerUnavailableError if it cannot be reached."""
        found = self._hosts.get(address)
        if found is None or has_failed(found):
            found = self._hosts[address] = asyncio.create_task(self._connect(address))
            found.add_done_callback(has_failed)  # else asyncio complains if nobody waits any more
        return await asyncio.shield(found)

    async def _bind(self, address: str) -> None:
        host, port = split(address)
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(self._new_guest, host, port, start_serving=False)
        except OSError as error:
            raise StartError(f"PARLEY_PEER_ADDRESS={address} cannot be used: {one_line(error)}") from error
        port = self._server.sockets[0].getsockname()[1]  # which the system has chosen, if it was 0
        self.address = f"{address.rpartition(':')[0]}:{port}"

    # Hosts that connect to this one

    def _new_guest(self) -> Link:
        return Link(self._door_for, self._on_guest_lost, longest=STRANGER_BYTES)

    def _door_for(self, link: Link) -> Door:
        if len(self._strangers) == STRANGERS:
            self._end_stranger(next(iter(self._strangers)))
        self._strangers[link] = None
        asyncio.get_running_loop().call_later(self._seconds, self._end_stranger, link)
        return Door(self._key, partial(self._let_in, link))

    def _end_stranger(self, link: Link) -> None:
        if self._strangers.pop(link, link) is None:
            link.abort()

    def _let_in(self, link: Link) -> None:
        if self._strangers.pop(link, link) is None:
            self._guests[link] = service = PeerService(self._responses, self._encoder, link)
            link.trust(service)
            self._watch(link)

    def _on_guest_lost(self, link: Link) -> None:
        self._strangers.pop(link, None)
        if service := self._guests.pop(link, None):
            service.leave_all()

    # Hosts that this one connects to

    async def _connect(self, address: str) -> Peer:
        try:
            async with asyncio.timeout(self._seconds):
                peer = await self._enter(address)
            self._unreachable.discard(address)
            return peer
        except (TimeoutError, OSError, ServerUnavailableError) as error:
            if address not in self._unreachable:
                logger.warning("the host at %s cannot be reached: %s", address, one_line(error))
            self._unreachable.add(address)
            raise ServerUnavailableError("the reply runs on another host, which does not answer") from error

    async def _enter(self, address: str) -> Peer:
        followed: dict[int, Followed] = {}
        service = Followers(followed)
        new_link = partial(Link, lambda _: service, longest=STRANGER_BYTES)
        _, link = await asyncio.get_running_loop().create_connection(new_link, *split(address))
        try:
            await link.wait_greeted()
            await enter(link, self._key)
        except BaseException:
            link.abort()
            raise
        link.trust(service)
        self._watch(link)
        return Peer(link, followed)

    # Both

    def _watch(self, link: Link) -> None:
        task = self._watching[link] = asyncio.create_task(disconnect_if_stuck(link, self._seconds))
        task.add_done_callback(lambda _: self._watching.pop(link))

    async def _close(self) -> None:
        if self._server:
            self._server.close()
        hosts = [*self._hosts.values()]
        for task in hosts:
            task.cancel()
        await asyncio.gather(*hosts, return_exceptions=True)
        for link in [*self._strangers]:
            link.abort()
        for link in self._watching:
            link.close()
        await asyncio.gather(*self._watching.values())


def split(address: str) -> tuple[str, int]:
    """The host and the port of an address; an IPv6 host stands in brackets there."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def has_failed(connected: asyncio.Task[Peer]) -> bool:
    """Whether a connection could not be made, or is lost."""
    if not connected.done():
        return False
    return connected.cancelled() or connected.exception() is not None or connected.result().link.lost.is_set()


async def disconnect_if_stuck(link: Link, seconds: float) -> None:
    """Ask the other side every few seconds whether it is well, and disconnect it if it does not answer."""
    while not link.lost.is_set():
        try:
            async with asyncio.timeout(seconds):
                await link.call(PeerService.ping)
        except TimeoutError:
            logger.warning("another host does not answer any more: it is disconnected")
            link.abort()
        except ServerUnavailableError:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await link.lost.wait()
