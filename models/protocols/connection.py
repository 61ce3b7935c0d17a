"""What the protocols of a WebSocket need from the connection."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

Json = dict[str, Any]


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
