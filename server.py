"""The ASGI app: lifespan, endpoints, routes, the command line."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import uvicorn
from starlette.applications import Starlette
from starlette.config import Config
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from models import database, events, weights
from models.chat import Chat
from models.conversations import Conversation, Conversations
from models.item import Item
from models.listing import Listing, new_title
from models.outbox import Outbox
from models.plain import PlainSession
from models.presence import Presence
from models.redaction import redacted
from models.refused import InvalidValue, Refused
from models.responses import Responses
from models.session import Session
from models.settings import PREFIX, Settings, StartError
from models.user_commands import users
from models.users import TICKET_SECONDS, OriginNotAllowed, User, Users, WrongCredentials

logger = logging.getLogger("parley")

HERE = Path(__file__).parent
COOKIE = "parley_session"
FRAME_BYTES = 2**20
SHUTDOWN_SECONDS = 10  # else one client that does not read could put off the end for ever
UVICORN_FRAME_BYTES = 4 * FRAME_BYTES  # it drops the connection in mid frame, and 1009 is often lost with it

PRIVATE = {"Cache-Control": "no-store"}
STATUSES = {  # of refusals, by code or else by type
    "authentication_error": 401,
    "conversation_busy": 409,
    "conversation_not_found": 404,
    "origin_not_allowed": 403,
    "rate_limit_error": 429,
}
LANGUAGES = json.loads((HERE / "templates" / "languages.json").read_text(encoding="utf-8"))

OpenChat = Callable[[Starlette], AbstractAsyncContextManager[Chat]]
templates = Jinja2Templates(HERE / "templates")


# Start and stop


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Open what the app stands on and put it on `app.state`; close it in reverse."""
    state = app.state
    try:
        async with AsyncExitStack() as stack:
            stack.enter_context(redacted())
            state.settings = settings = state.settings or read_settings()
            opened = await stack.enter_async_context(database.opened(settings))
            state.users, state.conversations = Users.of(settings, opened), Conversations(opened)
            state.presence = Presence(settings.presence, settings.sockets_per_user)
            state.chat = await stack.enter_async_context(state.open_chat(app))
            responses = Responses.running(state.chat, state.conversations, settings)
            state.responses = await stack.enter_async_context(responses)
            greet(state.url, await state.users.add_first())
            yield
    except (StartError, KeyboardInterrupt) as error:
        state.start_error = str(error) or "interrupted"
        raise


@asynccontextmanager
async def open_chat(app: Starlette) -> AsyncIterator[Chat]:
    """Load the model that the settings name and chat with it."""
    state = app.state
    state.tokenizer, state.model = weights.load(state.settings)
    async with Chat.running(state.tokenizer, state.model, state.settings) as chat:
        yield chat


def read_settings() -> Settings:
    """The settings of this process: its environment, then `.env`. Raises SettingsError."""
    config = Config(".env" if Path(".env").is_file() else None, os.environ, PREFIX)
    for name in Settings.unknown([*os.environ, *config.file_values]):
        logger.warning("%s is no setting of Parley and changes nothing", name)
    return Settings.read(lambda name: config(name, default=None))


def greet(url: str | None, secret: str | None) -> None:
    """Tell whoever started the server how to get in; the one place where a secret shows."""
    if secret:
        print(f"\nThe first user is admin. The secret, shown this once: {secret}", file=sys.stderr)
    if url:
        print(f"Parley is ready. Open {url} and log in with your secret.\n", file=sys.stderr)


class ShortStartErrors:
    """ASGI middleware that makes one line of a failed start that the operator can mend; uvicorn logs it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_short(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and scope["app"].state.start_error:
                message["message"] = scope["app"].state.start_error
            await send(message)

        await self.app(scope, receive, send_short if scope["type"] == "lifespan" else send)


# Who is it


async def user_with_secret(connection: HTTPConnection, secret: str) -> User:
    """The user a secret belongs to. Raises Refused."""
    address = connection.client.host if connection.client else "local"
    user: User = await connection.app.state.users.log_in(secret, connection.query_params.get("userid"), address)
    return user


async def user_of(connection: HTTPConnection) -> User:
    """Whose it is: by header, subprotocol, cookie or (a WebSocket's) query, the first there is. Raises Refused."""
    scheme, _, secret = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return await user_with_secret(connection, secret.strip().encode("latin-1").decode(errors="replace"))
    for protocol in connection.scope.get("subprotocols", ()):
        if protocol.startswith("bearer."):
            return await user_with_secret(connection, unpadded_base64(protocol.removeprefix("bearer.")))
    if user := await user_of_cookie(connection):
        if connection.scope.get("method") not in ("GET", "HEAD") and not same_origin(connection):
            raise OriginNotAllowed
        if connection.query_params.get("userid", user.id) == user.id:
            return user
    if connection.scope["type"] == "websocket" and (secret := connection.query_params.get("secret", "")):
        return await user_with_secret(connection, secret)
    raise WrongCredentials


def unpadded_base64(value: str) -> str:
    """The text in base64url without padding; for anything else, text that is no secret."""
    with suppress(ValueError):
        return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).decode()
    return ""


async def user_of_cookie(connection: HTTPConnection) -> User | None:
    """The user of the session cookie, while it is good."""
    user: User | None = await connection.app.state.users.of_ticket(connection.cookies.get(COOKIE, ""))
    return user


def same_origin(connection: HTTPConnection) -> bool:
    """Whether a browser's request comes from our own page, or one that the settings allow."""
    host = connection.headers.get("host", "")
    allowed = (f"http://{host}", f"https://{host}", *connection.app.state.settings.origins)
    return connection.headers.get("origin") in allowed


# HTTP


def page(request: Request, user: User | None, error: str | None = None, status: int = 200) -> Response:
    """The chat for a user, the login form for anybody else, in the first of the browser's languages that we have."""
    wishes = [wish.strip()[:2].lower() for wish in request.headers.get("accept-language", "").split(",")]
    language = next((wish for wish in wishes if wish in LANGUAGES), "en")
    context = {"user": user and user.id, "error": error, "model": request.app.state.chat.model_name}
    context |= {"language": language, "words": LANGUAGES[language]}
    headers = PRIVATE | {"Content-Security-Policy": "default-src 'self'"}
    return templates.TemplateResponse(request, "chat.html", context, status, headers)


async def home(request: Request) -> Response:
    return page(request, await user_of_cookie(request))


async def login(request: Request) -> Response:
    async with request.form(max_files=0, max_fields=4, max_part_size=4096) as form:
        secret = str(form.get("secret", ""))
    try:
        if "origin" in request.headers and not same_origin(request):
            raise OriginNotAllowed
        user = await user_with_secret(request, secret.strip())
    except Refused as refused:
        word = "wrong_secret" if isinstance(refused, WrongCredentials) else f"error_{refused.code}"
        return page(request, None, word, status_of(refused))
    response = RedirectResponse("./", 303)
    ticket, secure = request.app.state.users.ticket(user), request.url.scheme == "https"
    response.set_cookie(COOKIE, ticket, TICKET_SECONDS, httponly=True, samesite="strict", secure=secure)
    return response


async def logout(request: Request) -> Response:
    response = RedirectResponse("./", 303)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


async def health(request: Request) -> Response:
    return PlainTextResponse("ok")


async def ready(request: Request) -> Response:
    trouble: str | None = request.app.state.chat.trouble
    return PlainTextResponse(trouble or "ready", 503 if trouble else 200)


async def args(request: Request) -> Response:
    return JSONResponse({"args": request.app.state.settings.public() | request.app.state.chat.arguments})


async def conversations(request: Request) -> Response:
    user, listing = await user_of(request), Listing.of(request.query_params)
    found, has_more = await request.app.state.conversations.latest(user.id, listing)
    return JSONResponse({"data": [asdict(one) for one in found], "has_more": has_more}, headers=PRIVATE)


class ConversationEndpoint(HTTPEndpoint):
    """`/v1/conversations/{id}`: read it, give it another title, delete it."""

    async def get(self, request: Request) -> Response:
        conversation, items = await conversation_of(request)
        return JSONResponse(conversation.public(items), headers=PRIVATE)

    async def patch(self, request: Request) -> Response:
        user, title = await user_of(request), new_title(await body_of(request))
        renamed = await request.app.state.conversations.rename(user.id, request.path_params["id"], title)
        return JSONResponse(asdict(renamed), headers=PRIVATE)

    async def delete(self, request: Request) -> Response:
        user, id = await user_of(request), request.path_params["id"]
        await request.app.state.responses.end_in(user.id, id)
        await request.app.state.conversations.delete(user.id, id)
        return Response(status_code=204)


async def export(request: Request) -> Response:
    conversation, items = await conversation_of(request)
    format = request.query_params.get("format", "markdown")
    document = await asyncio.to_thread(conversation.document, items, format)
    headers = PRIVATE | {"Content-Disposition": f'attachment; filename="{document.name}"'}
    return Response(document.text, headers=headers, media_type=document.media_type)


async def conversation_of(request: Request) -> tuple[Conversation, list[Item]]:
    """The conversation that a path names, where it is the user's. Raises Refused."""
    user = await user_of(request)
    read: tuple[Conversation, list[Item]]
    read = await request.app.state.conversations.read(user.id, request.path_params["id"])
    return read


async def body_of(request: Request) -> bytes:
    """A request's body, no longer than a frame may be. Raises InvalidValue."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > FRAME_BYTES:
            raise InvalidValue(f"the body may have {FRAME_BYTES} bytes", "body")
    return body


def status_of(refused: Refused) -> int:
    """The HTTP status that says the same; a WebSocket's close code is 4000 more."""
    return STATUSES.get(refused.code) or STATUSES.get(refused.type, 400)


async def refuse(request: Request, refused: Any) -> Response:
    return JSONResponse({"error": events.error(refused)["error"]}, status_of(refused), PRIVATE)


class FreshStaticFiles(StaticFiles):
    """Static files that browsers ask after each time, so that no old script runs beside a new one."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


# WebSocket


class ChatSocket(WebSocketEndpoint):
    """`/ws`: `chat.v1` where the client offers it, else plain text.

    Starlette awaits `on_receive` inside its receive loop, so nothing here waits for a reply: sessions make
    replies in tasks of their own, and one more task sends.
    """

    session: Session | PlainSession | None = None
    gone = False

    async def dispatch(self) -> None:
        self.reading = asyncio.current_task()
        try:
            await super().dispatch()
        except asyncio.CancelledError:
            if not self.gone:
                raise

    async def on_connect(self, websocket: WebSocket) -> None:
        self.plain = "chat.v1" not in websocket.scope["subprotocols"]
        await websocket.accept(None if self.plain else "chat.v1")
        self.outbox = Outbox(websocket)
        self.writing = asyncio.create_task(self.outbox.deliver())
        self.writing.add_done_callback(self.written)
        try:
            await self.open_session(websocket)
        except Refused as refused:
            self.refuse(refused)
        except Exception:
            self.give_up()

    async def open_session(self, websocket: WebSocket) -> None:
        state = websocket.app.state
        self.user = (await user_of(websocket)).id
        state.presence.admit(self.user)
        if self.plain:
            self.session = PlainSession(state.chat, state.responses, self.user, self.outbox.put)
        else:
            limits = {"frame_bytes": FRAME_BYTES, "responses": state.settings.responses_per_user}
            self.session = Session(state.chat, state.responses, self.user, limits, self.outbox)
        state.presence.join(self.user, self.session.presence)

    async def on_receive(self, websocket: WebSocket, data: str | bytes) -> None:
        if self.session is None or self.outbox.closing:
            return
        try:
            if len(data if isinstance(data, bytes) else data.encode()) > FRAME_BYTES:
                self.outbox.close(1009, f"a frame may have {FRAME_BYTES} bytes")
            elif close := self.session.receive(data):
                self.outbox.close(*close)
        except Exception:
            self.give_up()
        await asyncio.sleep(0)  # frames that came together are handed over without a pause: let others run

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        if self.session:
            websocket.app.state.presence.leave(self.user, self.session.presence)
            self.session.close()
        self.writing.cancel()

    def refuse(self, refused: Refused) -> None:
        code = 4000 + status_of(refused)
        if self.plain:
            self.outbox.put(str(refused))
            self.outbox.close(1008 if code in (4401, 4403) else code, refused.code)
        else:
            self.outbox.send(events.error(refused))
            self.outbox.close(code, refused.code)

    def give_up(self) -> None:
        logger.exception("a bug in the handling of a WebSocket")
        self.outbox.close(1011, "the server failed")

    def written(self, writing: asyncio.Task[bool]) -> None:
        """Nothing more can be sent: unless the client is about to answer our close, stop reading too."""
        if not writing.cancelled() and (writing.exception() or not writing.result()) and self.reading:
            self.gone = True
            self.reading.cancel()


routes = [
    Route("/", home),
    Route("/login", login, methods=["POST"]),
    Route("/logout", logout, methods=["POST"]),
    Route("/health", health),
    Route("/ready", ready),
    Route("/args", args),
    Route("/v1/conversations", conversations),
    Route("/v1/conversations/{id}", ConversationEndpoint),
    Route("/v1/conversations/{id}/export", export),
    WebSocketRoute("/ws", ChatSocket),
    Mount("/static", FreshStaticFiles(directory=HERE / "templates" / "static"), name="static"),
]


def create_app(settings: Settings | None = None, open_chat: OpenChat = open_chat) -> Starlette:
    """The app. Settings that are not given are read from the environment when it starts."""
    short_errors, handlers = Middleware(ShortStartErrors), {Refused: refuse}
    app = Starlette(routes=routes, lifespan=lifespan, middleware=[short_errors], exception_handlers=handlers)
    app.state.settings = settings
    app.state.open_chat = open_chat
    app.state.url = None
    app.state.start_error = None
    return app


app = create_app()


# Command line


@click.group(invoke_without_command=True, commands=[users])
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=7777, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.pass_context
def main(context: click.Context, host: str, port: int) -> None:
    """Serve a streaming chat with a language model."""
    context.obj = read_settings
    if context.invoked_subcommand is None:
        serve(host, port)


def serve(host: str, port: int) -> None:
    """Run the app until a signal ends it; exit with 1 where it cannot start."""
    app = create_app()
    listener = listen(host, port)
    app.state.url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    config = uvicorn.Config(app, ws_max_size=UVICORN_FRAME_BYTES, ws_per_message_deflate=False, access_log=False)
    config.timeout_graceful_shutdown = SHUTDOWN_SECONDS
    try:
        uvicorn.Server(config).run([listener])
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit:  # uvicorn's own code for a failed start is 3
        sys.exit(1)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is loaded, so that a port in use is told at once."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}, port {port}: {error.strerror}") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux drops who takes no bytes for a minute; an ASGI app cannot
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
    return listener


if __name__ == "__main__":
    main()
