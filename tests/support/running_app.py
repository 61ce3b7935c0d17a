"""An app in this process that many tests use, each as a client of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar

from anyio.from_thread import BlockingPortal
from starlette.applications import Starlette
from starlette.testclient import TestClient

T = TypeVar("T")


class RunningApp:
    """An app that has started."""

    def __init__(self, app: Starlette, portal: BlockingPortal) -> None:
        self.app = app
        self._portal = portal
        self._numbers = count(1)

    def client(self, url: str = "http://testserver", raise_server_exceptions: bool = True) -> TestClient:
        """A new client: it has no cookies, and no login from its address has failed."""
        return self.client_of(self.app, self._portal, url, raise_server_exceptions)

    def client_of(self, app: Starlette, portal: BlockingPortal, url: str, raise_server_exceptions: bool) -> TestClient:
        """A new client of an app that runs in the event loop of a portal."""
        address = (f"client-{next(self._numbers)}", 50000)
        client = TestClient(app, url, raise_server_exceptions, client=address)
        client.portal = portal
        return client

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Run a coroutine function in the event loop of the app."""
        return self._portal.call(function, *arguments)

    def new_user(self) -> str:
        """Add a user, who has no conversations yet; returns the secret."""
        secret: str = self.call(self.app.state.users.create, f"user-{next(self._numbers)}")
        return secret


@contextmanager
def start(app: Starlette) -> Iterator[RunningApp]:
    """Run an app while the context lasts."""
    with TestClient(app) as client:
        assert client.portal
        yield RunningApp(app, client.portal)
