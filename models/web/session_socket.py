"""A socket of a user, whose frames go to the session of a protocol."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from starlette.endpoints import WebSocketEndpoint
from starlette.websockets import WebSocket

from models.ops.logs import log
from models.protocols.client import Close
from models.store.conversations import Conversation
from models.users.connections import Change
from models.web.authentication import Login
from models.web.outbox import UNSENT_SECONDS, Outbox

logger = logging.getLogger("parley")

FRAME_BYTES = 2**20


class Session(Protocol):
    """What a protocol does with one socket."""

    def receive(self, frame: str | bytes) -> Close | None:
        """Act on one frame. Returns how to close the connection, if it has to close."""

    def presence_changed(self, change: Change, user: str) -> None:
        """Another user has joined or left."""

    def conversation_changed(self, id: str, conversation: Conversation | None) -> None:
        """A conversation of the user has changed; None: it is deleted."""

    def close(self) -> None:
        """The client has disconnected."""


class SessionSocket(WebSocketEndpoint):
    """A socket of a user. A subclass accepts the connection, authenticates it, and joins with a session.

    Starlette awaits `on_receive` in its receive loop, so nothing here waits for a reply. Responses run in their own
    tasks, and one more task sends.
    """

    unsent_seconds = UNSENT_SECONDS  # how long a frame may wait for a client that does not read
    user: str | None = None
    session: Session | None = None
    login_session: str | None = None  # the id of the browser's session, if a cookie opened the socket
    sending: asyncio.Task[bool] | None = None
    sending_ended = False  # nothing can be sent any more, not even the close

    async def dispatch(self) -> None:
        """Handle the connection until it ends, or until nothing can be sent any more."""
        self.receiving = asyncio.current_task()
        self.state = self.scope["app"].state
        try:
            await super().dispatch()
        except asyncio.CancelledError:
            if not self.sending_ended:
                raise

    async def on_connect(self, websocket: WebSocket) -> None:
        """Open the connection."""
        self.outbox = Outbox(websocket, seconds=self.unsent_seconds)
        try:
            await self.open(websocket)
        except BaseException:  # Starlette calls `on_disconnect` only after this
            self.leave()
            raise

    async def open(self, websocket: WebSocket) -> None:
        """Accept the connection, and begin its session."""
        raise NotImplementedError

    async def accept(self, websocket: WebSocket, subprotocol: str | None) -> None:
        """Accept the connection, and begin to send."""
        await websocket.accept(subprotocol)
        self.sending = asyncio.create_task(self.outbox.deliver())
        self.sending.add_done_callback(self._on_sending_ended)

    async def join(self, login: Login, session: Callable[[], Session]) -> None:
        """Begin the session of a user. Raises APIError."""
        self.user, self.login_session = login.user.id, login.session.id if login.session else None
        await self.state.connections.join(self.user, self)
        self.session = session()

    def leave(self) -> None:
        """End the session, if it has begun; its responses go on for a while."""
        if session := self.session:
            self.session = None
            self.state.connections.leave(self.user, self)
            session.close()

    async def on_receive(self, websocket: WebSocket, data: str | bytes) -> None:
        """Pass a frame on to the session."""
        if self.session is None or self.outbox.closing:
            return
        try:
            if len(data if isinstance(data, bytes) else data.encode()) > FRAME_BYTES:
                self.outbox.close(1009, f"a frame may have at most {FRAME_BYTES} bytes")
            elif close := self.session.receive(data):
                self.outbox.close(*close)
        except Exception:
            self.give_up()
        await asyncio.sleep(0)  # frames that came together arrive without a pause: let others run

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """The client has disconnected."""
        self.leave()
        if self.sending:
            self.sending.cancel()

    def presence_changed(self, change: Change, user: str) -> None:
        """Tell the client that another user has joined or left."""
        if self.session:
            self.session.presence_changed(change, user)

    def conversation_changed(self, id: str, conversation: Conversation | None) -> None:
        """Tell the client that a conversation of its user has changed; None: that it is deleted."""
        if self.session:
            self.session.conversation_changed(id, conversation)

    def close(self, code: int, reason: str) -> None:
        """Close the connection, after all earlier frames."""
        self.outbox.close(code, reason)

    def give_up(self) -> None:
        """Close the connection after an error of ours."""
        logger.exception("unexpected error in a WebSocket")
        self.outbox.close(1011, "the server failed")

    def _on_sending_ended(self, sending: asyncio.Task[bool]) -> None:
        """Nothing more can be sent: stop receiving too, unless the client is about to answer our close."""
        if self.outbox.stalled:
            self.state.metrics.slow_clients.inc()
            log("closed slow client", user=self.user)
        if not sending.cancelled() and (sending.exception() or not sending.result()) and self.receiving:
            self.sending_ended = True
            self.receiving.cancel()
