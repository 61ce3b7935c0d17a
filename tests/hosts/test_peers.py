"""Connections between hosts, and who is let in."""

from __future__ import annotations

import asyncio
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from models.errors import ResponseNotFoundError, ServerUnavailableError, StartError
from models.generation.manager import ResponseManager
from models.hosts.door import Door, enter, proof_of
from models.hosts.peer import Peer
from models.hosts.peer_service import PeerService
from models.hosts.peers import STRANGER_BYTES, STRANGERS, Peers
from models.hub.link import Link
from models.hub.wire import VERSION, Hello, encode, frame_of
from tests.support.cable import Cable
from tests.support.hosts import KEY

pytestmark = pytest.mark.anyio

SECONDS = 0.5


@pytest.fixture
async def host(responses: ResponseManager) -> AsyncIterator[Peers]:
    """A host that lets others in."""
    async with Peers.opened("127.0.0.1:0", KEY, SECONDS) as peers:
        await peers.serve(responses)
        yield peers


@pytest.fixture
async def guest() -> AsyncIterator[Peers]:
    """A host that connects to others, and has no address."""
    async with Peers.opened(None, KEY, SECONDS) as peers:
        yield peers


def port_of(host: Peers) -> int:
    return int((host.address or "").rpartition(":")[2])


@asynccontextmanager
async def stranger(host: Peers) -> AsyncIterator[Link]:
    """A link to a host that has proved nothing."""
    loop = asyncio.get_running_loop()
    _, link = await loop.create_connection(lambda: Link(lambda link: None), "127.0.0.1", port_of(host))
    await link.wait_greeted()
    yield link
    link.abort()
    await link.lost.wait()


async def works(peer: Peer) -> bool:
    """Whether a host answers."""
    with pytest.raises(ResponseNotFoundError):
        await peer.cancel("ann", "resp_none", False)
    return True


async def test_a_host_with_the_key_is_let_in_and_asked_once(host: Peers, guest: Peers) -> None:
    peers = await asyncio.gather(*(guest.at(host.address or "") for _ in range(10)))
    assert len({*peers}) == 1
    assert await works(peers[0])
    assert host._strangers == {}


async def test_a_host_with_another_key_is_not_let_in(host: Peers, caplog: pytest.LogCaptureFixture) -> None:
    async with Peers.opened(None, b"another key") as guest:
        with pytest.raises(ServerUnavailableError, match="runs on another host, which does not answer"):
            await guest.at(host.address or "")
    assert "the other host has another key" in caplog.text
    assert host._guests == {}


async def test_a_host_that_cannot_prove_itself_is_not_believed() -> None:
    class Impostor(Door):
        async def prove(self, proof: bytes, nonce: bytes) -> bytes:
            return proof_of(b"a guess", b"host", nonce, self._nonce)

    server = await asyncio.get_running_loop().create_server(
        lambda: Link(lambda link: Impostor(KEY, lambda: None)), "127.0.0.1", 0
    )
    _, link = await asyncio.get_running_loop().create_connection(
        lambda: Link(lambda link: None), *server.sockets[0].getsockname()
    )
    with pytest.raises(ServerUnavailableError, match="the other host has another key"):
        await enter(link, KEY)
    link.abort()
    server.close()


def test_no_side_can_send_back_what_it_has_got() -> None:
    assert proof_of(KEY, b"guest", b"a", b"b") != proof_of(KEY, b"host", b"a", b"b")
    assert proof_of(KEY, b"guest", b"a", b"b") != proof_of(KEY, b"guest", b"b", b"a")


async def test_each_connection_is_asked_something_else(host: Peers) -> None:
    async with stranger(host) as one, stranger(host) as two:
        assert await one.call(Door.challenge) != await two.call(Door.challenge)


async def test_a_stranger_can_call_nothing_else(host: Peers, caplog: pytest.LogCaptureFixture) -> None:
    async with stranger(host) as link:
        with pytest.raises(ServerUnavailableError):
            await link.call(PeerService.cancel, "ann", "resp_1", False)
        await link.lost.wait()
    assert "there is no method cancel" in caplog.text


async def test_a_stranger_that_says_nothing_is_disconnected(host: Peers) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(host))
    assert await whole(reader)
    writer.close()


async def test_a_stranger_with_a_long_frame_is_disconnected(host: Peers) -> None:
    async with stranger(host) as link:
        with pytest.raises(ServerUnavailableError):
            await link.call(Door.prove, b"x" * STRANGER_BYTES, b"")


async def test_a_stranger_of_another_version_is_disconnected(host: Peers) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(host))
    writer.write(frame_of(encode(Hello(VERSION + 1, 1))))
    assert await whole(reader)
    writer.close()


async def whole(reader: StreamReader) -> bool:
    """Wait until the other side has disconnected."""
    try:
        return len(await reader.read()) > 0
    except ConnectionResetError:
        return True


async def test_the_oldest_of_too_many_strangers_makes_room(host: Peers, guest: Peers) -> None:
    readers = list[StreamReader]()
    writers = list[StreamWriter]()
    for _ in range(STRANGERS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(host))
        await reader.readexactly(4)
        readers.append(reader)
        writers.append(writer)
    assert await works(await guest.at(host.address or ""))
    assert await whole(readers[0])
    for writer in writers:
        writer.close()


async def test_a_host_that_takes_connections_and_says_nothing_is_given_up(guest: Peers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerUnavailableError, match="does not answer"):
            await guest.at(address)


async def test_a_host_that_is_not_there_is_tried_again_and_told_once(
    guest: Peers, responses: ResponseManager, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for _ in range(2):
        with pytest.raises(ServerUnavailableError):
            await guest.at(address)
    assert caplog.text.count("cannot be reached") == 1
    async with Peers.opened(address, KEY) as late:
        await late.serve(responses)
        assert await works(await guest.at(address))


async def test_a_host_that_does_not_answer_any_more_is_disconnected_by_both(host: Peers, guest: Peers) -> None:
    async with Cable.to(host.address or "") as cable:
        peer = await guest.at(cable.address)
        (link,) = host._guests
        cable.cut()
        await peer.link.lost.wait()
        await link.lost.wait()
        with pytest.raises(ServerUnavailableError):
            await peer.wait_ended("ann", "resp_1")
        cable.mend()
        assert await works(await guest.at(cable.address))


async def test_a_call_that_nobody_waits_for_does_not_end_the_connecting_of_others(host: Peers, guest: Peers) -> None:
    first = asyncio.create_task(guest.at(host.address or ""))
    second = asyncio.create_task(guest.at(host.address or ""))
    await asyncio.sleep(0)
    first.cancel()
    assert await works(await second)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "192.0.2.1:7778", "no-such-host.invalid:7778"])
async def test_an_address_that_cannot_be_used_stops_the_start(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        address = address.format(port=used.getsockname()[1])
        with pytest.raises(StartError, match=f"^PARLEY_PEER_ADDRESS={address} cannot be used: "):
            async with Peers.opened(address, KEY):
                pass


async def test_nobody_is_let_in_before_the_host_serves(guest: Peers) -> None:
    async with Peers.opened("127.0.0.1:0", KEY) as early:
        with pytest.raises(ServerUnavailableError):
            await guest.at(early.address or "")
