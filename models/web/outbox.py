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
        self._sending: float | None = None  # when the frame that is being sent was put here
        self._patience = asyncio.timeout(None)  # of all sending
        self._timer: asyncio.TimerHandle | None = None

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
        if is_full and self._sending is not None:
            self._give_up()
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
            if self._timer:
                self._timer.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds / 3):  # the client sees this if it begins to read again
                await self._websocket.close(1013, "the client does not read its frames")
                return True
        return False

    async def _deliver_all(self) -> None:
        self._check_time()
        async with self._patience:
            while True:
                self._sending, item = await self._items.get()
                if not isinstance(item, str):
                    return await self._websocket.close(*item)
                await self._websocket.send_text(item)
                self._sending = None
                self._unsent -= len(item.encode())
                self._items.task_done()

    def _check_time(self) -> None:
        """Give up if a frame has waited too long, else look again when it may have. A timer a frame would cost 4 µs."""
        due = (self._now() if self._sending is None else self._sending) + self._seconds
        if self._sending is not None and due <= self._now():
            return self._give_up()
        self._timer = asyncio.get_running_loop().call_at(due, self._check_time)

    def _give_up(self) -> None:
        if not self._patience.expired():
            self._patience.reschedule(self._now())

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
