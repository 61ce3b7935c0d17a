"""The chat socket, `/ws`."""

from __future__ import annotations

import asyncio
import logging

from starlette.endpoints import WebSocketEndpoint
from starlette.websockets import WebSocket

from models.errors import APIError
from models.ops.logs import log
from models.protocols.chat_v1 import ChatV1Session
from models.protocols.chat_v1_events import render_error
from models.protocols.plain_text import PlainTextSession
from models.users.connections import Change
from models.web.authentication import authenticate
from models.web.outbox import UNSENT_SECONDS, Outbox

logger = logging.getLogger("parley")

FRAME_BYTES = 2**20


class ChatSocket(WebSocketEndpoint):
    """`/ws`: chat.v1 if the client offers it, else plain text.

    Starlette awaits `on_receive` in its receive loop, so nothing here waits for a reply. Responses run in their own
    tasks, and one more task sends.
    """

    unsent_seconds = UNSENT_SECONDS  # how long a frame may wait for a client that does not read
    user: str | None = None
    session: ChatV1Session | PlainTextSession | None = None
    login_session: str | None = None  # the id of the browser's session, if a cookie opened the socket
    sending_ended = False  # nothing can be sent any more, not even the close

    async def dispatch(self) -> None:
        """Handle the connection until it ends, or until nothing can be sent any more."""
        self.receiving = asyncio.current_task()
        try:
            await super().dispatch()
        except asyncio.CancelledError:
            if not self.sending_ended:
                raise

    async def on_connect(self, websocket: WebSocket) -> None:
        """Accept the connection, then authenticate: errors can be sent only on an accepted connection."""
        self.state = websocket.app.state
        self.is_plain_text = "chat.v1" not in websocket.scope["subprotocols"]
        await websocket.accept(None if self.is_plain_text else "chat.v1")
        self.outbox = Outbox(websocket, seconds=self.unsent_seconds)
        self.sending = asyncio.create_task(self.outbox.deliver())
        self.sending.add_done_callback(self._on_sending_ended)
        try:
            await self._open_session(websocket)
        except APIError as error:
            self._refuse(error)
        except Exception:
            self._give_up()

    async def _open_session(self, websocket: WebSocket) -> None:
        state, login = self.state, await authenticate(websocket)
        user = login.user.id
        state.connections.check(user)
        if self.is_plain_text:
            self.session = PlainTextSession(state.responses, state.model_info, user, self.outbox)
        else:
            limits = {"frame_bytes": FRAME_BYTES, "responses": state.settings.responses_per_user}
            self.session = ChatV1Session(state.responses, state.model_info, user, limits, self.outbox)
        self.user, self.login_session = user, login.session.id if login.session else None
        state.connections.join(user, self)

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
            self._give_up()
        await asyncio.sleep(0)  # frames that came together arrive without a pause: let others run

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """The client has disconnected: leave its responses, which go on for a while."""
        if self.session and self.user:
            self.state.connections.leave(self.user, self)
            self.session.close()
        self.sending.cancel()

    def presence_changed(self, change: Change, user: str) -> None:
        """Tell the client that another user has joined or left."""
        assert self.session
        self.session.presence_changed(change, user)

    def close(self, code: int, reason: str) -> None:
        """Close the connection, after all earlier frames."""
        self.outbox.close(code, reason)

    def _refuse(self, error: APIError) -> None:
        code = 4000 + error.status
        if self.is_plain_text:
            self.outbox.send_text(str(error))
            self.outbox.close(1008 if code in (4401, 4403) else code, error.code)
        else:
            self.outbox.send_json(render_error(error))
            self.outbox.close(code, error.code)

    def _give_up(self) -> None:
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
