"""The ASGI app: lifespan, endpoints, routes, the command line."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import uvicorn
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.config import Config
from starlette.datastructures import MutableHeaders
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from models import completion, database, events, weights
from models.admission import ServerStopping
from models.chat import Chat
from models.completion import Completion
from models.completion_request import CompletionRequest, ModelNotFound
from models.conversations import Conversation, Conversations
from models.database import DatabaseUnavailable, explained
from models.file_limit import raise_file_limit
from models.item import Item
from models.listing import Listing, new_title
from models.logs import configured, log
from models.metrics import MEDIA_TYPE, Metrics
from models.outbox import UNSENT_SECONDS, Outbox
from models.plain import PlainSession
from models.presence import Change, Presence
from models.refused import Refused, ServerFailed
from models.responses import Responses
from models.session import Session
from models.settings import PREFIX, Settings, StartError
from models.stopping import Stopping
from models.throttle import TooManyFailures
from models.user_commands import users
from models.users import TICKET_SECONDS, OriginNotAllowed, User, Users, WrongCredentials

logger = logging.getLogger("parley")

HERE = Path(__file__).parent
COOKIE = "parley_session"
FRAME_BYTES = 2**20
CLOSE_SECONDS = 5  # for clients to answer that their connection is closed
KEEP_ALIVE_SECONDS = 75  # most clients let go of a quiet connection after 5; if we do too, a request may meet that
SHUTDOWN_SECONDS = 10  # else one client that does not read could put off the end for ever
UVICORN_FRAME_BYTES = 4 * FRAME_BYTES  # it drops the connection in mid frame, and 1009 is often lost with it

HEADERS = {  # of every answer, unless it says otherwise
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with "no-referrer" our own forms would have no Origin
    "X-Content-Type-Options": "nosniff",
}
STATUSES = {  # of refusals, by code or else by type
    "authentication_error": 401,
    "body_too_large": 413,
    "conversation_busy": 409,
    "conversation_not_found": 404,
    "database_unavailable": 503,
    "model_not_found": 404,
    "origin_not_allowed": 403,
    "queue_full": 503,
    "rate_limit_error": 429,
    "server_error": 500,
    "server_shutdown": 503,
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
            state.settings = settings = state.settings or read_settings()
            stack.enter_context(configured(settings.log))
            raise_file_limit()
            opened = await stack.enter_async_context(database.opened(settings))
            state.users, state.conversations = Users.of(settings, opened), Conversations(opened)
            state.presence = Presence(settings.presence, settings.sockets_per_user)
            state.metrics, state.started = Metrics(), int(time.time())
            state.chat = await stack.enter_async_context(state.open_chat(app))
            responses = Responses.running(state.chat, state.conversations, settings, state.metrics)
            state.responses = await stack.enter_async_context(responses)
            state.metrics.watch(state.chat, state.presence)
            greet(state.url, await state.users.add_first())
            await stack.enter_async_context(state.users.watched(partial(revoke, app)))
            stopping = Stopping.prepared(partial(drain, app), settings.drain, state.chat.died.wait)
            await stack.enter_async_context(stopping)
            yield
    except (StartError, KeyboardInterrupt, asyncio.CancelledError) as error:
        state.end = str(error) or "interrupted"
        raise


@asynccontextmanager
async def open_chat(app: Starlette) -> AsyncIterator[Chat]:
    """Load the model that the settings name and chat with it."""
    state = app.state
    state.tokenizer, state.model = weights.load(state.settings)
    async with Chat.running(state.tokenizer, state.model, state.settings, state.metrics.step.observe) as chat:
        yield chat


async def drain(app: Starlette, seconds: float) -> None:
    """Let replies come to their end, for so long, and then close what is open."""
    await app.state.responses.drain(seconds)
    with suppress(TimeoutError):
        async with asyncio.timeout(min(seconds + 1, CLOSE_SECONDS)):
            await app.state.presence.close_all(1012, "the server restarts")


def revoke(app: Starlette, user: User) -> None:
    """Close the connections of a user whose secret is no longer good, and end what is asked over HTTP."""
    log("revoked", user=user.id)
    app.state.responses.revoke(user.id)
    app.state.presence.close(user.id, 4401, WrongCredentials.code)


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


class ShortEnds:
    """ASGI middleware that makes one line of a start that failed, or of an end at once; uvicorn logs it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_short(message: Message) -> None:
            if message["type"] in ("lifespan.startup.failed", "lifespan.shutdown.failed") and scope["app"].state.end:
                message["message"] = scope["app"].state.end
            await send(message)

        await self.app(scope, receive, send_short if scope["type"] == "lifespan" else send)


class Guard:
    """ASGI middleware that knows by which names we may be called, and has browsers treat all answers with care."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        # Settings are there when the server has started, which is after Starlette wants its middleware.
        hosts = scope["type"] != "lifespan" and scope["app"].state.settings.hosts
        app = TrustedHostMiddleware(self.app, hosts, www_redirect=False) if hosts else self.app
        await app(scope, receive, send_with_headers)


# Who is it


async def user_with_secret(connection: HTTPConnection, secret: str) -> User:
    """The user a secret belongs to. Raises Refused."""
    address = connection.client.host if connection.client else "local"
    try:
        user: User = await connection.app.state.users.log_in(secret, connection.query_params.get("userid"), address)
        return user
    except (WrongCredentials, TooManyFailures) as refused:
        connection.app.state.metrics.login_failures.inc()
        log("login failed", address=address, code=refused.code)
        raise


async def user_of(connection: HTTPConnection) -> User:
    """Whose it is: by header, subprotocol, cookie or (a WebSocket's) query, the first there is. Raises Refused."""
    scheme, _, secret = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return await user_with_secret(connection, secret.strip().encode("latin-1").decode(errors="replace"))
    for protocol in connection.scope.get("subprotocols", ()):
        if protocol.startswith("bearer."):
            return await user_with_secret(connection, unpadded_base64(protocol.removeprefix("bearer.")))
    if user := user_of_cookie(connection):
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


def user_of_cookie(connection: HTTPConnection) -> User | None:
    """The user of the session cookie, while it is good."""
    user: User | None = connection.app.state.users.of_ticket(connection.cookies.get(COOKIE, ""))
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
    return templates.TemplateResponse(request, "chat.html", context, status)


async def home(request: Request) -> Response:
    return page(request, user_of_cookie(request))


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
    state = request.app.state
    if trouble := state.chat.trouble or (state.chat.admission.closed and ServerStopping.message):
        return PlainTextResponse(trouble, 503)
    warning = state.users.trouble or state.responses.trouble
    return PlainTextResponse(f"ready, but {warning}" if warning else "ready")


async def metrics(request: Request) -> Response:
    return Response(request.app.state.metrics.text(), media_type=MEDIA_TYPE)


async def args(request: Request) -> Response:
    return JSONResponse({"args": request.app.state.settings.public() | request.app.state.chat.arguments})


async def conversations(request: Request) -> Response:
    user, listing = await user_of(request), Listing.of(request.query_params)
    found, has_more = await request.app.state.conversations.latest(user.id, listing)
    return JSONResponse({"data": [asdict(one) for one in found], "has_more": has_more})


class ConversationEndpoint(HTTPEndpoint):
    """`/v1/conversations/{id}`: read it, give it another title, delete it."""

    async def get(self, request: Request) -> Response:
        conversation, items = await conversation_of(request)
        return JSONResponse(conversation.public(items))

    async def patch(self, request: Request) -> Response:
        user, title = await user_of(request), new_title(await body_of(request))
        renamed = await request.app.state.conversations.rename(user.id, request.path_params["id"], title)
        return JSONResponse(asdict(renamed))

    async def delete(self, request: Request) -> Response:
        user, id = await user_of(request), request.path_params["id"]
        await request.app.state.responses.delete(user.id, id)
        return Response(status_code=204)


async def export(request: Request) -> Response:
    conversation, items = await conversation_of(request)
    format = request.query_params.get("format", "markdown")
    document = await asyncio.to_thread(conversation.document, items, format)
    headers = {"Content-Disposition": f'attachment; filename="{document.name}"'}
    return Response(document.text, headers=headers, media_type=document.media_type)


async def conversation_of(request: Request) -> tuple[Conversation, list[Item]]:
    """The conversation that a path names, where it is the user's. Raises Refused."""
    user = await user_of(request)
    read: tuple[Conversation, list[Item]]
    read = await request.app.state.conversations.read(user.id, request.path_params["id"])
    return read


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [await model_of(request)]})


async def model(request: Request) -> Response:
    found = await model_of(request)
    if request.path_params["id"] != found["id"]:
        raise ModelNotFound(found["id"])
    return JSONResponse(found)


async def model_of(request: Request) -> dict[str, Any]:
    """The one model that answers, as users may know it. Raises Refused."""
    await user_of(request)
    return completion.model(request.app.state.chat, request.app.state.started)


async def completions(request: Request) -> Response:
    user, state = await user_of(request), request.app.state
    asked = CompletionRequest.parse(await body_of(request), state.chat.model_name)
    reply = Completion(user.id, asked, state.chat)
    state.responses.create(reply.response, reply)
    if asked.end_user:
        log("completion", response=reply.response.id, user=user.id, end_user=asked.end_user)
    if asked.stream:
        await reply.begun()
        return CompletionStream(reply)
    async with cancelled_when_gone(reply, request.receive):
        return JSONResponse(await reply.whole())


class CompletionStream(StreamingResponse):
    """Server-sent events of a completion, which ends when nobody hears them any more."""

    def __init__(self, reply: Completion) -> None:
        super().__init__(reply.frames(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_when_gone(self.reply, receive):
            await self.stream_response(send)


@asynccontextmanager
async def cancelled_when_gone(reply: Completion, receive: Receive) -> AsyncIterator[None]:
    """Cancel a completion as soon as the client hangs up, also while it waits and nothing is sent."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    listening = asyncio.create_task(listen())
    listening.add_done_callback(lambda _: reply.cancel())
    try:
        yield
    finally:
        listening.cancel()


class BodyTooLarge(Refused):
    """A body longer than a frame may be."""

    code = "body_too_large"
    message = f"the body may have {FRAME_BYTES} bytes"


async def body_of(request: Request) -> bytes:
    """A request's body, refused in OpenAI's words, which Starlette's own limit would replace. Raises BodyTooLarge."""
    body, declared = b"", request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 9 or int(declared) > FRAME_BYTES):
        raise BodyTooLarge
    async for chunk in request.stream():
        body += chunk
        if len(body) > FRAME_BYTES:
            raise BodyTooLarge
    return body


def status_of(refused: Refused) -> int:
    """The HTTP status that says the same; a WebSocket's close code is 4000 more."""
    return STATUSES.get(refused.code) or STATUSES.get(refused.type, 400)


async def refuse(request: Request, refused: Any) -> Response:
    status = status_of(refused)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if refused.retry_after:
        headers["Retry-After"] = str(refused.retry_after)
    return JSONResponse({"error": completion.error(refused)}, status, headers)


async def refuse_http(request: Request, error: Any) -> Response:
    """What Starlette refuses, in the words of the API where that is asked."""
    if not request.url.path.startswith("/v1/"):
        return PlainTextResponse(error.detail, error.status_code, error.headers)
    told = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": told}, error.status_code, error.headers)


async def refuse_without_database(request: Request, error: Exception) -> Response:
    logger.error("the database, or a file, cannot be used: %s", explained(error))
    return await refuse(request, DatabaseUnavailable())


async def hear_nothing(request: Request, error: Exception) -> Response:
    """The client hung up in the middle of its request: nobody reads this."""
    return Response(status_code=400)


async def fail(request: Request, error: Exception) -> Response:
    """A bug, which Starlette raises again to be logged; its answer passes by the middleware."""
    response = await refuse(request, ServerFailed())
    response.headers.update(HEADERS)
    return response


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

    patience = UNSENT_SECONDS  # with a client that does not read
    user: str | None = None
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
        self.state = websocket.app.state
        self.plain = "chat.v1" not in websocket.scope["subprotocols"]
        await websocket.accept(None if self.plain else "chat.v1")
        self.outbox = Outbox(websocket, seconds=self.patience)
        self.writing = asyncio.create_task(self.outbox.deliver())
        self.writing.add_done_callback(self.written)
        try:
            await self.open_session(websocket)
        except Refused as refused:
            self.refuse(refused)
        except Exception:
            self.give_up()

    async def open_session(self, websocket: WebSocket) -> None:
        state, user = self.state, (await user_of(websocket)).id
        state.presence.admit(user)
        if self.plain:
            self.session = PlainSession(state.chat, state.responses, user, self.outbox.put)
        else:
            limits = {"frame_bytes": FRAME_BYTES, "responses": state.settings.responses_per_user}
            self.session = Session(state.chat, state.responses, user, limits, self.outbox)
        self.user = user
        state.presence.join(user, self)

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
        if self.session and self.user:
            self.state.presence.leave(self.user, self)
            self.session.close()
        self.writing.cancel()

    def notify(self, change: Change, user: str) -> None:
        assert self.session
        self.session.presence(change, user)

    def close(self, code: int, reason: str) -> None:
        self.outbox.close(code, reason)

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
        if self.outbox.unread:
            self.state.metrics.slow_clients.inc()
            log("closed since nobody reads", user=self.user)
        if not writing.cancelled() and (writing.exception() or not writing.result()) and self.reading:
            self.gone = True
            self.reading.cancel()


routes = [
    Route("/", home),
    Route("/login", login, methods=["POST"], max_body_size=2**16),
    Route("/logout", logout, methods=["POST"]),
    Route("/health", health),
    Route("/ready", ready),
    Route("/metrics", metrics),
    Route("/args", args),
    Route("/v1/models", models),
    Route("/v1/models/{id:path}", model),
    Route("/v1/chat/completions", completions, methods=["POST"]),
    Route("/v1/conversations", conversations),
    Route("/v1/conversations/{id}", ConversationEndpoint),
    Route("/v1/conversations/{id}/export", export),
    WebSocketRoute("/ws", ChatSocket),
    Mount("/static", FreshStaticFiles(directory=HERE / "templates" / "static"), name="static"),
]


REFUSALS: Mapping[Any, ExceptionHandler] = {
    Refused: refuse,
    HTTPException: refuse_http,
    SQLAlchemyError: refuse_without_database,
    OSError: refuse_without_database,  # asyncpg's, where there is no server
    ClientDisconnect: hear_nothing,
    Exception: fail,
}


def create_app(settings: Settings | None = None, open_chat: OpenChat = open_chat) -> Starlette:
    """The app. Settings that are not given are read from the environment when it starts."""
    middleware = [Middleware(ShortEnds), Middleware(Guard)]
    app = Starlette(routes=routes, lifespan=lifespan, middleware=middleware, exception_handlers=REFUSALS)
    app.state.settings = settings
    app.state.open_chat = open_chat
    app.state.url = None
    app.state.end = None
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
        serve(host, port, app)


def serve(host: str, port: int, app: Starlette) -> None:
    """Run an app until a signal ends it; exit with 1 where it cannot start."""
    listener = listen(host, port)
    app.state.url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    config = uvicorn.Config(app, ws_max_size=UVICORN_FRAME_BYTES, ws_per_message_deflate=False, access_log=False)
    config.timeout_graceful_shutdown = SHUTDOWN_SECONDS
    config.timeout_keep_alive = KEEP_ALIVE_SECONDS
    config.http = "h11"  # which bounds headers; httptools, where it happens to be there, does not
    server = uvicorn.Server(config)
    try:
        server.run([listener])
    except KeyboardInterrupt:  # how uvicorn ends at a signal
        sys.exit(0 if server.started and not server.force_exit else 130)
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
