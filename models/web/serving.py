"""Runs an app with uvicorn, as `python server.py` does."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable

import click
import uvicorn
from starlette.applications import Starlette
from uvicorn.supervisors import Multiprocess

from models.web.http_protocol import HTTPProtocol
from models.web.paced_listener import PacedListener
from models.web.session_socket import FRAME_BYTES

KEEP_ALIVE_SECONDS = 75  # longer than clients wait, else the server may close a connection just as a request arrives
SHUTDOWN_SECONDS = 10  # for uvicorn to close connections; a client that does not read could delay it forever
UVICORN_FRAME_BYTES = 4 * FRAME_BYTES  # uvicorn's own limit closes without our 1009, so it must be higher than ours
APP_OF_WORKERS = "__mp_main__:app"  # multiprocessing has run server.py by that name: "server" would run it again


def serve(app: Starlette, host: str, port: int) -> None:
    """Serve an app until a signal; exit with 1 if it cannot start."""
    listener = listen(host, port)
    app.state.url = page_url(host, *listener.getsockname()[:2])
    server = uvicorn.Server(_config(app))
    try:
        server.run([listener])
    except KeyboardInterrupt:  # how uvicorn ends at a signal
        sys.exit(0 if server.started and not server.force_exit else 130)
    except SystemExit:  # uvicorn's own code for a failed start is 3
        sys.exit(1)


def serve_in_workers(host: str, port: int, workers: int, on_listening: Callable[[str], None]) -> None:
    """Serve the app of server.py in some processes, which are replaced when they end, until a signal.

    `on_listening` is called with the URL of the page, before they start.
    """
    listener = listen(host, port)
    on_listening(page_url(host, *listener.getsockname()[:2]))
    config = _config(APP_OF_WORKERS)
    config.workers = workers
    supervisor = Multiprocess(config, [listener])
    supervisor.run()
    sys.exit(1 if any(process.exitcode for process in supervisor.processes) else 0)


def is_worker() -> bool:
    """Whether this process is one of several workers of a uvicorn."""
    server = getattr(signal.getsignal(signal.SIGINT), "__self__", None)  # it has installed its signal handlers
    return isinstance(server, uvicorn.Server) and server.config.workers > 1 and not server.config.reload


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. It is opened before the model is loaded, so that a port in use is reported at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()  # then it answers IPv4 too
    try:
        listener = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}, port {port}: {error.strerror}") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux drops a client that takes no bytes for a minute; ASGI cannot
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
    return PacedListener.of(listener)


def page_url(host: str, address: str, port: int) -> str:
    """Where a browser on this machine opens the page of a listener; no browser opens the address that means all."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def _config(app: Starlette | str) -> uvicorn.Config:
    config = uvicorn.Config(app, ws_max_size=UVICORN_FRAME_BYTES, ws_per_message_deflate=False, access_log=False)
    config.workers = 1  # whatever WEB_CONCURRENCY says
    config.timeout_graceful_shutdown = SHUTDOWN_SECONDS
    config.timeout_keep_alive = KEEP_ALIVE_SECONDS
    config.http = HTTPProtocol
    config.proxy_headers = False  # PARLEY_PROXIES names the proxies that are believed
    return config
