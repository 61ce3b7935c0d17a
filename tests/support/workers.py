"""A server of several workers, in threads of this process: the hub has one event loop, each worker its own."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from anyio.from_thread import BlockingPortal, start_blocking_portal
from starlette.applications import Starlette
from starlette.testclient import TestClient

from models.hub.hub import Hub
from server import create_app, lifespan
from tests.support.running_app import RunningApp
from tests.support.serving import OPTIONS, EventfulServer, Served

WORKERS = 2

one_process = pytest.mark.parametrize("own_app", ["one process"], indirect=True)  # for tests that change its parts


class Waiting:
    """The launcher of a hub that a test starts itself."""

    supervisor = os.getpid()

    def launch(self) -> None:
        """Wait for the hub of the test."""


@dataclass
class ServedByWorkers(Served):
    """Running workers, and the app of their hub."""

    hub: BlockingPortal

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the hub."""
        return self.hub.call(current_loop)


@asynccontextmanager
async def hub_of(app: Starlette) -> AsyncIterator[Hub]:
    """The hub that runs the replies of an app, while the context lasts."""
    async with Hub.listening(app.state.settings, Waiting.supervisor) as hub, lifespan(app):
        hub.open(app.state)
        yield hub


@contextmanager
def running_hub(app: Starlette) -> Iterator[BlockingPortal]:
    """The hub of an app, in a thread of its own."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(hub_of(app)):
        yield portal


def worker_of(app: Starlette) -> Starlette:
    """A worker of the hub that runs an app."""
    worker = create_app(app.state.settings)
    worker.state.launcher = Waiting()
    return worker


@contextmanager
def serve_by_workers(app: Starlette, **options: Any) -> Iterator[Served]:
    """Run an app as `python server.py --workers 2` does, on a free port of the loopback address."""
    with socket.create_server(("127.0.0.1", 0)) as listener, running_hub(app) as hub, ExitStack() as stack:
        host, port = listener.getsockname()
        for _ in range(WORKERS):
            config = uvicorn.Config(worker_of(app), "127.0.0.1", **OPTIONS | options)
            server = stack.enter_context(running_worker(config, listener.dup()))
        yield ServedByWorkers(app, f"{host}:{port}", server, hub)


@contextmanager
def running_worker(config: uvicorn.Config, listener: socket.socket) -> Iterator[EventfulServer]:
    """A worker in a thread, which accepts connections of a listener that others have too."""
    server = EventfulServer(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    server.started_or_failed.wait()
    try:
        assert server.started, "the worker did not start"
        yield server
    finally:
        if server.started:
            server.stop()
        thread.join()


class RunningWorkers(RunningApp):
    """An app that runs in a hub, and whose clients are served by workers in turn."""

    def __init__(self, app: Starlette, hub: BlockingPortal, workers: list[TestClient]) -> None:
        super().__init__(app, hub)
        self._workers = workers

    def client(self, url: str = "http://testserver", raise_server_exceptions: bool = True) -> TestClient:
        """A new client of the next worker."""
        self._workers.append(worker := self._workers.pop(0))
        assert isinstance(worker.app, Starlette)
        assert worker.portal
        return self.client_of(worker.app, worker.portal, url, raise_server_exceptions)


@contextmanager
def start_workers(app: Starlette) -> Iterator[RunningApp]:
    """Run an app in a hub, with workers, while the context lasts."""
    with running_hub(app) as hub, ExitStack() as stack:
        workers = [stack.enter_context(TestClient(worker_of(app))) for _ in range(WORKERS)]
        yield RunningWorkers(app, hub, workers)


async def current_loop() -> asyncio.AbstractEventLoop:
    """The event loop that runs this."""
    return asyncio.get_running_loop()
