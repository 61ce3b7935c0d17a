"""Where the parts of `gpu.py` put what they measure."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRACEBACK = 15  # lines that are printed


class Report:
    """Prints what is measured, and keeps it in a file, as soon as it is known."""

    def __init__(self, results: Path, deadline: float) -> None:
        self._results = results
        self._deadline = deadline  # by the system's monotonic clock
        self._failed: list[str] = []

    @property
    def left(self) -> float:
        """Seconds until nothing new may begin."""
        return self._deadline - time.monotonic()

    def keep(self, name: str, value: Any, unit: str = "", digits: int = 0) -> None:
        with self._results.open("a") as file:
            file.write(json.dumps([name, value]) + "\n")
        self.say(f"{name}: {value:,.{digits}f} {unit}" if isinstance(value, float) else f"{name}: {value}")

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def attempt(self, name: str, measure: Callable[[], None], needs: float = 3) -> bool:
        """Measure something, if there is time for it. A failure is told, and leaves what comes next."""
        left = self.left
        if left < needs:
            self.say(f"{name}: left out, {left:.0f} s are left")
            return False
        try:
            measure()
        except Exception:
            lines = traceback.format_exc().splitlines()
            print("\n".join([f"  {name}: FAILED", *lines[-TRACEBACK:]]), flush=True)
            self._failed.append(name)
            self.keep("failed", self._failed)
            return False
        self.say(f"  ({name} took {left - self.left:.1f} s)")
        return True
