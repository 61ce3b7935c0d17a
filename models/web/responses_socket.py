"""The socket of the Responses API, `/v1/responses`."""

from __future__ import annotations

from starlette.websockets import WebSocket

from models.errors import APIError
from models.protocols.responses.session import ResponsesSession
from models.web.authentication import authenticate
from models.web.error_responses import rendered
from models.web.session_socket import SessionSocket


class ResponsesSocket(SessionSocket):
    """`WS /v1/responses`: OpenAI's protocol, to the letter."""

    async def open(self, websocket: WebSocket) -> None:
        """Authenticate, then accept the connection: a client of OpenAI's API expects an HTTP error."""
        state = self.state
        try:
            login = await authenticate(websocket)
            user = login.user.id
            await self.join(login, lambda: ResponsesSession(state.responses, state.models, user, self.outbox))
        except APIError as error:
            return await websocket.send_denial_response(rendered(error))
        offered = websocket.scope["subprotocols"]
        await self.accept(websocket, next((one for one in offered if not one.startswith("bearer.")), None))
