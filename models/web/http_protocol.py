"""uvicorn's HTTP protocol, with limits for clients that stall."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from models.web.open_connections import OpenConnection, OpenConnections

HEAD_SECONDS = 15.0
BODY_SECONDS = 30.0
IDLE_SECONDS = 15  # between two requests of a stranger; users have uvicorn's keep-alive timeout
STRANGER_SECONDS = 60.0  # for a stranger to take a response, or to log in on a WebSocket

TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

Stage = Literal["head", "body", "response"]


class HTTPProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with time limits: for the head and the body of a request, and for all that strangers do.

    It keeps the `OpenConnections` of the lifespan's state up to date. Requests and WebSockets find their own
    `OpenConnection` in `scope["state"]`, as "connection".
    """

    head_seconds = HEAD_SECONDS
    body_seconds = BODY_SECONDS
    idle_seconds = IDLE_SECONDS
    stranger_seconds = STRANGER_SECONDS

    connection: OpenConnection
    upgraded = False
    stage: tuple[Stage, object] | None = None  # what the timer limits, and of which request
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and wait for a request."""
        super().connection_made(transport)
        send_at_once(transport)
        open_connections: OpenConnections = self.app_state["open_connections"]
        self.connection = open_connections.open(self.client[0] if self.client else None, transport.abort)
        self.app_state = self.app_state | {"connection": self.connection}
        self._limit_stage()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._end_stage()
        self.connection.closed()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Handle what the client has sent, and limit the time for the rest."""
        before = self.scope
        super().handle_events()
        if self.scope is not before:
            self.connection.request_began()
        self._limit_stage()

    def on_response_complete(self) -> None:
        """Limit the time for the next request, or for the rest of a body that nobody has read."""
        keep_alive = self.config.timeout_keep_alive
        self.timeout_keep_alive = min(keep_alive, self.idle_seconds) if self.connection.is_stranger else keep_alive
        super().on_response_complete()
        self._limit_stage()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over to uvicorn's WebSocket protocol, and still learn when it is lost."""
        self._end_stage()
        self.upgraded = True
        super().handle_websocket_upgrade(event)
        self.transport.set_protocol(_Upgraded(self.transport, self.connection, self.stranger_seconds))

    def _limit_stage(self) -> None:
        """Limit the time for what comes next."""
        state = self.conn.their_state
        if self.upgraded or self.transport.is_closing():
            return
        if state is h11.SEND_BODY:
            self._begin("body", self.body_seconds)
        elif state is not h11.IDLE:
            self._begin("response", self.stranger_seconds)
        elif self.timeout_keep_alive_task is None:
            self._begin("head", self.head_seconds)
        else:  # uvicorn waits for the next request
            self._end_stage()

    def _begin(self, stage: Stage, seconds: float) -> None:
        if self.stage != (stage, self.cycle):
            self._end_stage()
            self.stage = stage, self.cycle
            self.timer = self.loop.call_later(seconds, self._on_timeout, stage)

    def _end_stage(self) -> None:
        if self.timer:
            self.timer.cancel()
        self.stage = self.timer = None

    def _on_timeout(self, stage: Stage) -> None:
        if self.transport.is_closing():  # and the client does not take what was sent before
            self.transport.abort()
        elif stage == "response":
            self.connection.close_stranger()
        else:
            has_begun = self.conn.trailing_data[0] if stage == "head" else not self.cycle.response_started
            if has_begun:
                self.transport.write(TIMEOUT)
            self.transport.close()


def send_at_once(transport: asyncio.Transport) -> None:
    """Let each write leave at once. asyncio sees to it, but not for a socket that somebody else has opened.

    Otherwise a write waits for the acknowledgement of the one before, which takes 40 ms on many systems.
    """
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _Upgraded(asyncio.Protocol):
    """Passes everything on to the protocol of a WebSocket. A stranger has some seconds to log in.

    It keeps no HTTP protocol in memory: that takes as much as the WebSocket.
    """

    def __init__(self, transport: asyncio.Transport, connection: OpenConnection, seconds: float) -> None:
        self._inner: Any = transport.get_protocol()
        self._connection = connection
        self._timer = asyncio.get_running_loop().call_later(seconds, connection.close_stranger)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        keep_open: bool | None = self._inner.eof_received()
        return keep_open

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._connection.closed()
        self._inner.connection_lost(exc)
