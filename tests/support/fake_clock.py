"""A clock that tests set."""

from __future__ import annotations


class FakeClock:
    """Tells the time that it is set to, in seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
