"""A worker's connection to the hub."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from models.errors import ServerUnavailableError, StartError, one_line
from models.hub.launcher import Launcher, socket_path
from models.hub.link import Link
from models.hub.service import HubService, Opened
from models.hub.worker_calls import WorkerCalls

logger = logging.getLogger("parley")

RETRY_SECONDS = 0.05
TROUBLE_SECONDS = 1.0  # until the next try after an error

P = ParamSpec("P")
T = TypeVar("T")


class HubUser(WorkerCalls, Protocol):
    """What a worker does when the hub calls it, and when the hub comes and goes."""

    def hub_opened(self, opened: Opened) -> None:
        """A hub is ready."""

    async def hub_lost(self) -> None:
        """The hub has ended."""


class HubClient:
    """The hub, for one worker. When it ends, it is started again."""

    def __init__(self, folder: Path, launcher: Launcher, pause: float = TROUBLE_SECONDS) -> None:
        self._folder = folder
        self._launcher = launcher
        self._pause = pause
        self._link: Link | None = None  # to a hub that is ready
        self.stopping = False  # this worker ends, and needs no new hub

    async def call(
        self, method: Callable[Concatenate[HubService, P], Awaitable[T]], *arguments: P.args, **named: P.kwargs
    ) -> T:
        """Call a coroutine method of the hub, by position.

        Raises its APIError, and ServerUnavailableError while it is not ready.
        """
        return await self._ready.call(method, *arguments, **named)

    def start(
        self, method: Callable[Concatenate[HubService, P], None], *arguments: P.args, **named: P.kwargs
    ) -> asyncio.Future[None]:
        """Call a plain method of the hub, by position; the future gets its errors. Raises like `call`."""
        return self._ready.start(method, *arguments, **named)

    def try_tell(
        self, method: Callable[Concatenate[HubService, P], None], *arguments: P.args, **named: P.kwargs
    ) -> None:
        """Call a plain method of the hub, by position, unless it is not ready: a new one would not have to know."""
        if self._link:
            self._link.try_tell(method, *arguments, **named)

    async def wait_lost(self) -> None:
        """Wait until the hub has ended."""
        if self._link:
            await self._link.lost.wait()

    @asynccontextmanager
    async def kept(self, user: HubUser) -> AsyncIterator[None]:
        """Connect to the hub, and again whenever it has ended. Raises StartError if it cannot start at first."""
        link = await self._connected(user)
        try:
            await self._open(link, user)
        except ServerUnavailableError as error:
            reason = "the process that runs the replies has ended: its log says why" if link.lost.is_set() else error
            raise StartError(str(reason)) from error
        keeping = asyncio.create_task(self._keep(link, user))
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])
            if self._link:
                self._link.close()

    @property
    def _ready(self) -> Link:
        if self._link is None:
            raise ServerUnavailableError
        return self._link

    async def _connected(self, user: HubUser) -> Link:
        """A connection to the hub, which is started if it does not run and this worker needs it."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                with socket_path(self._folder) as path:
                    _, link = await loop.create_unix_connection(lambda: Link(lambda _: user), path)
                return link
            except (FileNotFoundError, ConnectionRefusedError):
                if not self.stopping:
                    self._launcher.launch()
            await asyncio.sleep(RETRY_SECONDS)

    async def _open(self, link: Link, user: HubUser) -> None:
        """Wait until the hub is ready. Raises ServerUnavailableError, and closes the connection."""
        try:
            await link.wait_greeted()
            opened = await link.call(HubService.opened, self._launcher.supervisor)
        except BaseException:
            link.close()
            raise
        self._link = link
        user.hub_opened(opened)

    async def _keep(self, link: Link, user: HubUser) -> None:
        while True:
            await link.lost.wait()
            if self._link:
                self._link = None
                await user.hub_lost()
                if self.stopping:
                    return
                logger.error("the process that runs the replies has ended: it is started again")
            try:
                link = await self._connected(user)
                await self._open(link, user)
            except (ServerUnavailableError, OSError) as error:  # too few descriptors or processes, say
                logger.error("the process that runs the replies cannot be reached: %s", one_line(error))
                await asyncio.sleep(self._pause)
