"""A clock of the process that can jump, for modules that are imported after this one.

Tests cannot set the clock of the system, so this module replaces `time.time`. The fork server of `process.py` imports
it before all others.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class JumpingClock:
    """Tells the real time plus an offset, in seconds."""

    def __init__(self, real: Callable[[], float]) -> None:
        self.offset = 0.0
        self._real = real

    def __call__(self) -> float:
        return self._real() + self.offset


clock = JumpingClock(time.time)
time.time = clock
