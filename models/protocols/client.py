"""The client of a WebSocket, as its protocol sees it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from models.validation import Json


class Close(NamedTuple):
    """The code and the reason to close a WebSocket with."""

    code: int
    reason: str


class Client(Protocol):
    """The sending side of a WebSocket. Sending never waits."""

    def send_text(self, text: str) -> None:
        """Send a text frame, after all earlier frames."""

    def send_json(self, value: Json) -> None:
        """Send a value as JSON, after all earlier frames."""

    async def wait_sent(self) -> None:
        """Wait until everything is sent."""
