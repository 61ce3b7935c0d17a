"""What a host does for another one."""

from __future__ import annotations

from models.errors import ResponseNotFoundError
from models.generation.manager import ResponseManager
from models.hub.link import Link
from models.hub.remote_listener import RemoteListener
from models.hub.wire import OnceEncoder


class PeerService:
    """What another host may ask about the responses that run on this one. Its listeners have numbers."""

    def __init__(self, responses: ResponseManager, encoder: OnceEncoder, link: Link) -> None:
        self._responses = responses
        self._encoder = encoder
        self._link = link
        self._following: set[RemoteListener] = set()

    async def ping(self) -> None:
        """Answer, which shows that this host is well."""

    async def follow(self, user: str, id: str, listener: int) -> None:
        """Send a listener all events of a response. Raises ResponseNotFoundError if it does not run here."""
        if not self._responses.runs(user, id):
            raise ResponseNotFoundError("no such reply is running")
        remote = RemoteListener(self._link, listener, self._encoder)
        self._following.add(remote)
        await self._responses.follow(user, id, remote)

    def leave(self, listener: int) -> None:
        """Stop sending events to a listener, for ever."""
        remote = RemoteListener(self._link, listener, self._encoder)
        self._responses.leave(remote)
        self._following.discard(remote)

    async def cancel(self, user: str, id: str, steered: bool) -> None:
        """End a response. Raises ResponseNotFoundError if it does not run here."""
        await self._responses.cancel(user, id, steered)

    async def wait_ended(self, user: str, id: str) -> None:
        """Wait until a response has ended."""
        await self._responses.wait_ended(user, id)

    async def end(self, user: str, id: str) -> None:
        """End a response that is about to be deleted, and wait until it has ended."""
        self._responses.abandon(user, id)
        await self._responses.wait_ended(user, id)

    def leave_all(self) -> None:
        """The other host is gone: leave what it followed."""
        for listener in [*self._following]:
            self.leave(listener.number)
