"""The hub: it runs the replies of one server for its workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from models.errors import ServerUnavailableError
from models.generation.parts import Parts
from models.hub.launcher import socket_path
from models.hub.link import Link
from models.hub.service import HubService
from models.hub.wire import OnceEncoder
from models.hub.worker_calls import WorkerCalls
from models.model_info import ModelList
from models.settings import Settings
from models.store.database import make_data_folder
from models.users.users import Logins

BACKLOG = 1000  # workers that may wait until the model is loaded, which nothing interrupts
CLOSE_SECONDS = 1.0  # for the answers to calls that are still running


class Hub:
    """Listens for workers. `open` says that replies can be run; a worker that comes earlier waits for it."""

    def __init__(self, supervisor: int) -> None:
        self.unused = asyncio.Event()  # all workers are about to end, or have ended
        self.hurried = asyncio.Event()  # and they do not wait for replies
        self._supervisor = supervisor
        self._told_failure = asyncio.Event()
        self._server: asyncio.Server
        self._opening: asyncio.Future[Parts] = asyncio.get_running_loop().create_future()
        self._encoder = OnceEncoder()
        self._workers: dict[Link, HubService] = {}

    @classmethod
    @asynccontextmanager
    async def listening(cls, settings: Settings, supervisor: int) -> AsyncIterator[Hub]:
        """A hub for the workers of a supervisor, which listens in the data folder while the context lasts.

        Only the owner of its socket can use it. It replaces the socket of a hub that has ended: the launcher sees to it
        that no other one runs.
        """
        hub = cls(supervisor)
        make_data_folder(settings)
        with socket_path(settings.data) as path:
            hub._server = await asyncio.get_running_loop().create_unix_server(hub._new_link, path, backlog=BACKLOG)
            os.chmod(path, 0o600)
            try:
                yield hub
            finally:
                hub.refuse_workers()
                with suppress(FileNotFoundError):  # later Pythons remove it themselves
                    os.unlink(path)
                await hub._end_links()

    def open(self, parts: Parts) -> None:
        """Begin to run replies."""
        parts.users.on_changed = self._tell_logins
        parts.models.on_change = partial(self._tell_models, parts.models)
        self._opening.set_result(parts)

    def fail(self, message: str) -> None:
        """Tell the workers that the server cannot start."""
        self._opening.set_exception(ServerUnavailableError(message))
        self._opening.exception()  # else asyncio complains if there is no worker yet

    async def wait_told(self) -> None:
        """Wait until a worker knows that the server cannot start."""
        await self._told_failure.wait()

    def refuse_workers(self) -> None:
        """Accept no more workers: new ones wait for the next hub."""
        self._server.close()

    def _new_link(self) -> Link:
        return Link(self._new_service, self._on_lost)

    def _new_service(self, link: Link) -> HubService:
        service = self._workers[link] = HubService(self._parts_for, self._encoder, self._on_stopping, link)
        return service

    async def _parts_for(self, supervisor: int) -> Parts:
        """The parts, once they are there, for a worker of a supervisor. Raises ServerUnavailableError."""
        if supervisor != self._supervisor:
            raise ServerUnavailableError(
                f"another server uses this PARLEY_DATA, process {self._supervisor}: stop it, or give this one another"
            )
        try:
            return await asyncio.shield(self._opening)
        except ServerUnavailableError:
            self._told_failure.set()
            raise

    def _on_stopping(self, stopping: HubService) -> bool:
        """A worker is stopping, or has left. Returns whether the hub ends too."""
        if all(service.is_stopping for service in self._workers.values()):
            self.refuse_workers()
            self.unused.set()
            if any(service.at_once for service in [stopping, *self._workers.values()]):
                self.hurried.set()
        return self.unused.is_set()

    def _on_lost(self, link: Link) -> None:
        service = self._workers.pop(link)
        service.end()
        if service.is_stopping:
            self._on_stopping(service)

    def _tell_logins(self, logins: Logins) -> None:
        for link in self._workers:
            link.try_tell(WorkerCalls.logins_changed, logins)

    def _tell_models(self, models: ModelList) -> None:
        for link in self._workers:
            link.try_tell(WorkerCalls.models_changed, models.all)

    async def _end_links(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                for link in [*self._workers]:
                    await link.wait_answered()
        for link in [*self._workers]:
            link.close()
