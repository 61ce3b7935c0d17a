"""The chat socket, `/ws`."""

from __future__ import annotations

from functools import partial

from starlette.websockets import WebSocket

from models.errors import APIError
from models.protocols.plain_text import PlainTextSession
from models.protocols.responses.chat_session import SUBPROTOCOL, ChatSession
from models.protocols.responses.events import render_error_event
from models.web.authentication import authenticate
from models.web.session_socket import FRAME_BYTES, Session, SessionSocket


class ChatSocket(SessionSocket):
    """`/ws`: chat.v2 if the client offers it, else plain text."""

    async def open(self, websocket: WebSocket) -> None:
        """Accept the connection, then authenticate: errors can be sent only on an accepted connection."""
        self.is_plain_text = SUBPROTOCOL not in websocket.scope["subprotocols"]
        await self.accept(websocket, None if self.is_plain_text else SUBPROTOCOL)
        try:
            login = await authenticate(websocket, by_query=True)
            await self.join(login, partial(self._session, login.user.id))
        except APIError as error:
            self._refuse(error)
        except Exception:
            self.give_up()

    def _session(self, user: str) -> Session:
        state = self.state
        if self.is_plain_text:
            return PlainTextSession(state.responses, state.models, user, self.outbox)
        limits = {"frame_bytes": FRAME_BYTES, "responses": state.settings.responses_per_user}
        return ChatSession(state.responses, state.models, user, limits, self.outbox)

    def _refuse(self, error: APIError) -> None:
        code = 4000 + error.status
        if self.is_plain_text:
            self.outbox.send_text(str(error))
            self.outbox.close(1008 if code in (4401, 4403) else code, error.code)
        else:
            self.outbox.send_json(render_error_event(error))
            self.outbox.close(code, error.code)
