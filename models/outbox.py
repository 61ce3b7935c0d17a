"""What a client has yet to read."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

UNSENT_BYTES, UNSENT_SECONDS = 2**20, 30.0


class Close(NamedTuple):
    """With what to close a WebSocket."""

    code: int
    reason: str


class Client(Protocol):
    """The sending half of a WebSocket."""

    async def send_text(self, data: str) -> None: ...

    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...


class Outbox:
    """Texts on their way to one client. Putting in never waits; a client that lets them pile up is let go.

    That is: `unsent_bytes` of them lie here, or one has for `seconds`.
    """

    def __init__(self, client: Client, unsent_bytes: int = UNSENT_BYTES, seconds: float = UNSENT_SECONDS) -> None:
        self.closing = False
        self.unread = False  # the client let too much pile up
        self._client = client
        self._limit = unsent_bytes
        self._seconds = seconds
        self._items: asyncio.Queue[tuple[float, str | Close]] = asyncio.Queue()
        self._unsent = 0
        self._sending: asyncio.Timeout | None = None

    def send(self, event: dict[str, Any]) -> None:
        """Send an event of chat.v1 after what was put in before."""
        self.put(json.dumps(event, ensure_ascii=False, separators=(",", ":")))

    async def drained(self) -> None:
        """Wait until all is sent; for ever where it cannot be."""
        await self._items.join()

    def put(self, text: str) -> None:
        """Send a text after those before it."""
        if self.closing:
            return
        if self._unsent > self._limit and self._sending and not self._sending.expired():
            self._sending.reschedule(self._now())
        self._unsent += len(text.encode())
        self._items.put_nowait((self._now(), text))

    def close(self, code: int, reason: str) -> None:
        """Close after what was put in before; nothing put in later is sent."""
        if not self.closing:
            self.closing = True
            self._items.put_nowait((self._now(), Close(code, reason)))

    async def deliver(self) -> bool:
        """Send until the connection is closed; False where the client would not even read that.

        Raises what the client's methods raise once it has left.
        """
        try:
            await self._deliver_all()
            return True
        except TimeoutError:
            self.unread = True
        finally:
            self.closing, self._sending = True, None
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds / 3):  # it sees this if it begins to read after all
                await self._client.close(1013, "what is sent to you is not read")
                return True
        return False

    async def _deliver_all(self) -> None:
        while True:
            put_at, item = await self._items.get()
            async with asyncio.timeout_at(put_at + self._seconds) as self._sending:
                if not isinstance(item, str):
                    return await self._client.close(*item)
                await self._client.send_text(item)
            self._sending = None
            self._unsent -= len(item.encode())
            self._items.task_done()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
