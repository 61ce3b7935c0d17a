"""The app: settings, middleware, routes, lifespan, and the command line."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import click
from starlette.applications import Starlette
from starlette.config import Config
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount, Route, WebSocketRoute

from models.env_file import read_env_file
from models.errors import SettingsError, StartError, WrongCredentialsError
from models.generation.admission import Admission
from models.generation.manager import ResponseManager
from models.generation.parts import Status
from models.hosts.host_responses import HostResponses
from models.hosts.peers import Peers
from models.hub.launcher import Launcher
from models.hub.program import run_hub
from models.hub.worker import Worker
from models.language.chat import Chat
from models.ops.file_limit import raise_file_limit
from models.ops.logs import log, logging_configured
from models.ops.metrics import Metrics
from models.ops.shutdown import Broken, Drain, Shutdown, cancelled_by, interruptible, terminable
from models.ops.waiting import wait_for_any, wait_process_ended
from models.settings import PREFIX, Settings
from models.shared.shared_state import open_shared_state
from models.store.conversations import Conversations
from models.store.database import open_database
from models.store.ownership import Ownership
from models.store.storage_limits import StorageLimits
from models.users.commands import users
from models.users.connections import ConnectionRegistry
from models.users.conversation_feed import ConversationFeed
from models.users.sessions import Session
from models.users.users import User, Users
from models.web import completions, conversations, pages, responses, status
from models.web.authentication import UserRequired
from models.web.chat_socket import ChatSocket
from models.web.error_responses import HANDLERS, authentication_error
from models.web.middleware import (
    APIMiddleware,
    ProxiesMiddleware,
    RequestIdMiddleware,
    SecurityHeadersMiddleware,
    StartErrorMiddleware,
)
from models.web.open_connections import OpenConnections
from models.web.responses_socket import ResponsesSocket
from models.web.serving import is_worker, serve, serve_in_workers

logger = logging.getLogger("parley")

CLOSE_SECONDS = 5  # how long clients may take to answer a close
ECHO_SECONDS = 1.5  # within which a supervisor passes on a signal that its workers have got too

OpenChat = Callable[[Starlette], AbstractAsyncContextManager[Chat]]


# Start and stop


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, object]]:
    """Open everything that requests share, on `app.state`, and close it in reverse order.

    The web server gets the open connections, which it keeps up to date.
    """
    state = app.state
    settings: Settings = state.settings
    try:
        async with AsyncExitStack() as stack:
            stack.enter_context(logging_configured(settings.log))
            stack.enter_context(terminable())
            state.open_connections = OpenConnections.within(raise_file_limit(), settings.proxies)
            if is_worker():
                state.launcher = Launcher.of(settings, state.hub_command, supervisor=os.getppid())
            parts = remote_parts(app) if state.launcher else local_parts(app)
            drain, broken = await stack.enter_async_context(parts)
            echo = ECHO_SECONDS if state.launcher or state.is_hub else 0
            shutdown = Shutdown.installed(drain, settings.drain, broken, echo)
            state.shutdown = await stack.enter_async_context(shutdown)
            yield {"open_connections": state.open_connections}
    except (StartError, KeyboardInterrupt, asyncio.CancelledError) as error:
        state.start_error = str(error) or "interrupted"
        raise


@asynccontextmanager
async def local_parts(app: Starlette) -> AsyncIterator[tuple[Drain, Broken]]:
    """Run the replies in this process."""
    state = app.state
    settings: Settings = state.settings
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_database(settings))
        state.shared = await stack.enter_async_context(open_shared_state(settings.redis_url))
        state.users = Users.open(settings, database, state.shared.limits)
        peers = await stack.enter_async_context(Peers.opened(settings.peer_address, state.users.key_for(b"hosts")))
        ownership = await stack.enter_async_context(Ownership.taken(database, address=peers.address))
        await state.users.check_key(ownership)
        state.conversations = Conversations(database, ownership.owner.id, StorageLimits.of(settings))
        state.connections = ConnectionRegistry(
            settings.presence, settings.sockets_per_user, state.shared.limits, state.shared.presence
        )
        state.metrics, state.started = Metrics(), int(time.time())
        state.admission = Admission.of(settings, state.shared.limits)
        state.chat = await stack.enter_async_context(state.open_chat(app))
        state.models = state.chat.models
        state.feed = await stack.enter_async_context(
            ConversationFeed.opened(state.conversations, state.connections, state.shared.news)
        )
        await stack.enter_async_context(ownership.watched(state.conversations, state.feed.changed))
        manager = ResponseManager.opened(
            state.chat, state.admission, state.conversations, state.feed, settings, state.metrics
        )
        state.manager = state.responses = await stack.enter_async_context(manager)
        if not ownership.alone:
            responses = HostResponses.opened(state.manager, state.conversations, peers)
            state.responses = await stack.enter_async_context(responses)
        state.status = Status(state)
        register_gauges(app)
        print_login_help(state.url, await state.users.create_first())
        await stack.enter_async_context(state.users.watched(partial(revoke, app), partial(end_session, app)))
        broken = partial(wait_for_any, state.chat.died.wait, ownership.lost.wait)
        yield partial(drain, app, state.manager.drain), broken


@asynccontextmanager
async def remote_parts(app: Starlette) -> AsyncIterator[tuple[Drain, Broken]]:
    """Leave the replies to the hub, which several workers have together."""
    state, supervisor_ended = app.state, partial(wait_process_ended, app.state.launcher.supervisor)
    async with AsyncExitStack() as stack:
        async with cancelled_by(supervisor_ended):
            opening = Worker.opened(state, state.settings, state.launcher)
            worker = await stack.enter_async_context(opening)
        yield partial(drain, app, worker.drain), supervisor_ended


@asynccontextmanager
async def open_chat(app: Starlette) -> AsyncIterator[Chat]:
    """Load the model that the settings name, or find upstreams, and run a chat with it."""
    state = app.state
    if state.settings.upstream:
        from models.upstream.upstream_chat import UpstreamChat  # only here: most servers need no HTTP client

        state.tokenizer = state.model = None
        async with AsyncExitStack() as stack:
            async with cancelled_by(asyncio.Event().wait):
                upstream = await stack.enter_async_context(UpstreamChat.opened(state.settings, state.metrics))
            yield upstream
        return
    with interruptible():
        # Imported only here: torch takes seconds, and the commands for users do without it.
        from models.language import loader
        from models.language.engine_chat import EngineChat

        state.tokenizer, state.model = loader.load(state.settings)
    async with EngineChat.opened(
        state.tokenizer,
        state.model,
        state.settings,
        on_shrink=state.admission.shrink,
        on_step=state.metrics.step.observe,
    ) as chat:
        yield chat


def register_gauges(app: Starlette) -> None:
    """Add gauges of slots, waiting responses, cache and sockets to the metrics."""
    state = app.state
    state.metrics.add_gauges(
        {
            "num_requests_running": lambda: state.admission.running,
            "num_requests_waiting": lambda: len(state.admission.waiting),
            "num_slots": lambda: state.admission.slots,
            "kv_cache_usage_perc": lambda: state.chat.cache_usage,
            "sockets_open": lambda: len(state.connections),
        }
    )


async def drain(app: Starlette, end_responses: Drain, seconds: float) -> None:
    """Let running responses finish for up to `seconds`, then close all connections."""
    await end_responses(seconds)
    with suppress(TimeoutError):
        async with asyncio.timeout(min(seconds + 1, CLOSE_SECONDS)):
            await app.state.connections.close_all(1012, "the server restarts")


def revoke(app: Starlette, user: User) -> None:
    """End the replies of a user whose secret is no longer valid, and close the user's connections."""
    log("revoked", user=user.id)
    app.state.manager.revoke(user.id)
    app.state.connections.close_user(user.id, 4401, WrongCredentialsError.code)


def end_session(app: Starlette, session: Session) -> None:
    """Close the connections of a browser that has logged out."""
    app.state.connections.close_session(session.user_id, session.id, 4401, WrongCredentialsError.code)


def print_login_help(url: str | None, secret: str | None) -> None:
    """Print how to log in, for the person who starts the server; `secret` is that of a new first user."""
    if secret:
        print(f"\nThe first user is admin. The secret, shown only this once: {secret}", file=sys.stderr)
    if url:
        print(f"Parley is ready. Open {url} and log in with your secret.\n", file=sys.stderr)


# The app

users_only = Middleware(AuthenticationMiddleware, backend=UserRequired(), on_error=authentication_error)
api = [  # behind `users_only`
    Route("/models", completions.models),
    Route("/models/{id:path}", completions.model),
    Route("/chat/completions", completions.chat_completions, methods=["POST"]),
    Route("/completions", completions.text_completions, methods=["POST"]),
    Route("/responses", responses.create, methods=["POST"]),
    Route("/responses/{id}", responses.ResponseEndpoint),
    Route("/responses/{id}/cancel", responses.cancel, methods=["POST"]),
    Route("/responses/{id}/input_items", responses.input_items),
    Route("/conversations", conversations.ConversationsEndpoint),
    Route("/conversations/{id}", conversations.ConversationEndpoint),
    Route("/conversations/{id}/items", conversations.ItemsEndpoint),
    Route("/conversations/{id}/items/{item}", conversations.ItemEndpoint),
    Route("/conversations/{id}/branch", conversations.branch),
    Route("/conversations/{id}/export", conversations.export),
]
routes = [
    Route("/", pages.home),
    Route("/login", pages.login, methods=["POST"], max_body_size=2**16),
    Route("/logout", pages.logout, methods=["POST"]),
    Route("/health", status.health),
    Route("/ready", status.ready),
    Route("/metrics", status.metrics),
    Route("/args", status.args),
    WebSocketRoute("/ws", ChatSocket),  # authenticates after it accepts, so that it can send errors
    WebSocketRoute("/v1/responses", ResponsesSocket),
    Mount("/v1", routes=api, middleware=[users_only]),
    Mount("/static", pages.static_files, name="static"),
]


def create_app(settings: Settings | None = None, open_chat: OpenChat = open_chat) -> Starlette:
    """The app. Settings that are not given are read from the environment and `.env`. Raises SettingsError."""
    settings = settings or read_settings()
    middleware = [
        Middleware(StartErrorMiddleware),
        Middleware(RequestIdMiddleware),
        *([Middleware(ProxiesMiddleware, proxies=settings.proxies)] if settings.proxies else []),
        Middleware(SecurityHeadersMiddleware),
        Middleware(TrustedHostMiddleware, allowed_hosts=settings.hosts or ["*"], www_redirect=False),
        Middleware(APIMiddleware, origins=settings.origins),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, middleware=middleware, exception_handlers=HANDLERS)
    app.state.settings = settings
    app.state.open_chat = open_chat
    app.state.hub_command = [sys.executable, __file__, "hub"]  # starts the process that runs replies for workers
    app.state.is_hub = False  # whether this is that process
    app.state.launcher = None  # of that process, in a worker; None: this process runs the replies itself
    app.state.url = None  # where to open the page, if known
    app.state.start_error = None  # why the start failed, in one line
    return app


def read_settings() -> Settings:
    """The settings of this process: its environment, then `.env`. Raises SettingsError."""
    config = Config(None, os.environ, PREFIX)
    config.file_values = read_env_file(Path(".env"))
    for name in Settings.unknown([*os.environ, *config.file_values]):
        logger.warning("%s is not a setting of Parley and has no effect", name)
    return Settings.read(lambda name: config(name, default=None))


try:
    app = create_app()
except SettingsError as error:
    sys.exit(str(error))


# Command line


@click.group(invoke_without_command=True, commands=[users])
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=7777, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 256), help="Processes for clients.")
@click.pass_context
def main(context: click.Context, host: str, port: int, workers: int) -> None:
    """Serve a streaming chat with a language model."""
    context.obj = app.state.settings
    if context.invoked_subcommand is not None:
        return
    if workers == 1:
        serve(app, host, port)
    else:
        serve_in_workers(host, port, workers, launch_hub)


def launch_hub(url: str) -> None:
    """Start the process that runs the replies, for workers of this one."""
    try:
        Launcher.of(app.state.settings, app.state.hub_command, os.getpid(), url).launch()
    except StartError as error:
        raise click.ClickException(str(error)) from error


@main.command(hidden=True)
@click.option("--supervisor", type=int, required=True, help="The process that starts and stops the workers.")
@click.option("--url", help="Where the page is.")
@click.argument("lock", type=int)
def hub(supervisor: int, url: str | None, lock: int) -> None:
    """Run the replies for workers, which start this themselves; `lock` is a descriptor that stays open."""
    app.state.url = url
    os.set_inheritable(lock, False)  # a program that the hub starts must not hold the lock after its end
    asyncio.run(run_hub(app.state, lifespan(app), supervisor))


if __name__ == "__main__":
    main()
