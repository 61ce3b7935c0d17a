"""ASGI middleware: trusted proxies, headers for browsers, ids of requests, the API, short messages for bad starts."""

from __future__ import annotations

import re
import uuid
from contextlib import suppress
from typing import Any, cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from models.users.addresses import unmapped

REQUEST_ID = "X-Request-Id"

SECURITY_HEADERS = {  # for every HTTP response that does not set them itself
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with "no-referrer", browsers send our own forms without an Origin
    "X-Content-Type-Options": "nosniff",
}


class SecurityHeadersMiddleware:
    """Adds the security headers to every HTTP response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_with_headers)


class RequestIdMiddleware:
    """Gives every HTTP request an id, which its response has too: the one that the client sends, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent = Headers(scope=scope).get(REQUEST_ID, "")
        id = sent if re.fullmatch(r"[!-~]{1,128}", sent) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = id
            await send(message)

        await self.app(scope, receive, send_with_id)


class APIMiddleware:
    """What is special about `/v1`: pages of the `origins` may use it, and a slash at the end of a path has no meaning.

    Browsers ask first, without a login, whether a page may send its request; Starlette's middleware answers that.
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        self.app = app
        self.api = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            allow_credentials=True,
            expose_headers=[REQUEST_ID, "Retry-After"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not is_api(scope):
            return await self.app(scope, receive, send)
        if path_of(scope) != "/v1/":
            scope = {**scope, "path": scope["path"].rstrip("/")}
        app = self.api if self.api.allow_origins else self.app
        await app(scope, receive, send)


def is_api(scope: Scope) -> bool:
    """Whether a request is for `/v1`."""
    return f"{path_of(scope)}/".startswith("/v1/")


def path_of(scope: Scope) -> str:
    """The path of a request without the root path of the app, such as uvicorn's --root-path."""
    path, root = scope["path"], scope.get("app_root_path", scope.get("root_path", ""))  # mounts change the second
    return str(path.removeprefix(root))


class StartErrorMiddleware:
    """Replaces the traceback of a failed start with one line, `app.state.start_error`, which the web server logs."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_short(message: Message) -> None:
            failed = message["type"] in ("lifespan.startup.failed", "lifespan.shutdown.failed")
            if failed and scope["app"].state.start_error:
                message["message"] = scope["app"].state.start_error
            await send(message)

        await self.app(scope, receive, send_short if scope["type"] == "lifespan" else send)


class ProxiesMiddleware:
    """Believes what the proxies of PARLEY_PROXIES say about their clients, and nobody else."""

    def __init__(self, app: ASGIApp, proxies: tuple[str, ...]) -> None:
        self.app: Any = ProxyHeadersMiddleware(cast(Any, app), list(proxies))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            host, port = scope.get("client") or ("unix", 0)  # a Unix socket gives no address
            with suppress(ValueError):
                host = str(unmapped(host))
            scope["client"] = (host, port)
        await self.app(scope, receive, send)
