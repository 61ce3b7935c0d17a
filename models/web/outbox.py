"""The frames that wait to be sent to a client."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Protocol

import msgspec

from models.protocols.client import Close

UNSENT_BYTES, UNSENT_SECONDS = 2**20, 30.0
FEW_FRAMES = 8  # may have any size: each of the last events of a long reply has all of it


class Sender(Protocol):
    """The sending side of a WebSocket, as Starlette has it."""

    async def send_text(self, data: str) -> None: ...

    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...


class Outbox:
    """The frames that wait to be sent to one client. Sending never waits. A client that does not read is closed.

    A client does not read if more than `unsent_bytes` wait here, in more than a few frames, or if a frame has waited
    for `seconds`.
    """

    def __init__(self, websocket: Sender, unsent_bytes: int = UNSENT_BYTES, seconds: float = UNSENT_SECONDS) -> None:
        self.closing = False
        self.stalled = False  # the client did not read
        self._encode = msgspec.json.Encoder().encode  # in a tenth of the time of the json module
        self._websocket = websocket
        self._limit = unsent_bytes
        self._seconds = seconds
        self._items: asyncio.Queue[tuple[float, str | Close]] = asyncio.Queue()
        self._unsent = 0
        self._sending: asyncio.Timeout | None = None

    async def wait_sent(self) -> None:
        """Wait until everything is sent; forever if that is not possible."""
        await self._items.join()

    def send_json(self, value: dict[str, Any]) -> None:
        """Send a value as JSON, after all earlier frames."""
        self.send_text(self._encode(value).decode())

    def send_text(self, text: str) -> None:
        """Send a text frame, after all earlier frames."""
        if self.closing:
            return
        is_full = self._unsent > self._limit and self._items.qsize() > FEW_FRAMES
        if is_full and self._sending and not self._sending.expired():
            self._sending.reschedule(self._now())
        self._unsent += len(text.encode())
        self._items.put_nowait((self._now(), text))

    def close(self, code: int, reason: str) -> None:
        """Close the connection, after all earlier frames. Later frames are dropped."""
        if not self.closing:
            self.closing = True
            self._items.put_nowait((self._now(), Close(code, reason)))

    async def deliver(self) -> bool:
        """Send until the connection is closed. Returns False if the client does not even read the close.

        Raises the error of the WebSocket if the client has disconnected.
        """
        try:
            await self._deliver_all()
            return True
        except TimeoutError:
            self.stalled = True
        finally:
            self.closing, self._sending = True, None
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds / 3):  # the client sees this if it begins to read again
                await self._websocket.close(1013, "the client does not read its frames")
                return True
        return False

    async def _deliver_all(self) -> None:
        while True:
            put_at, item = await self._items.get()
            async with asyncio.timeout_at(put_at + self._seconds) as self._sending:
                if not isinstance(item, str):
                    return await self._websocket.close(*item)
                await self._websocket.send_text(item)
            self._sending = None
            self._unsent -= len(item.encode())
            self._items.task_done()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
