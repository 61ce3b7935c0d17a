"""ASGI middleware: proxies that are trusted, headers that protect browsers, and short messages for failed starts."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from models.users.addresses import unmapped

SECURITY_HEADERS = {  # for every HTTP response that does not set them itself
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
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
