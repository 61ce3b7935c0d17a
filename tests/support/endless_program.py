"""A program that does not end for a long time, and tells tests whether all of it has been ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = """#!/bin/sh
folder=$(dirname "$0")
exec 9> "$folder/alive"
echo began > "$folder/began"
sh -c 'sleep 20; echo ended >&9'
exit 1
"""


class EndlessProgram:
    """A program of two processes, one of which waits for the other, as a compiler's driver does."""

    def __init__(self, path: Path, began: int, alive: int) -> None:
        self.path = path
        self._began = began
        self._alive = alive

    @classmethod
    @contextmanager
    def written(cls, folder: Path) -> Iterator[EndlessProgram]:
        """The program in a folder."""
        path = folder / "endless"
        path.write_text(SCRIPT)
        path.chmod(0o755)
        for name in ("began", "alive"):
            os.mkfifo(folder / name)
        began = os.open(folder / "began", os.O_RDWR)  # so that it opens at once
        alive = os.open(folder / "alive", os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(alive, True)
        try:
            yield cls(path, began, alive)
        finally:
            os.close(began)
            os.close(alive)

    def wait_until_it_runs(self) -> None:
        """Wait until one more call of the program has begun."""
        os.read(self._began, len("began\n"))

    def came_to_its_end(self) -> bool:
        """Wait until no process of any call is left. Returns whether one of them came to its own end."""
        return bool(os.read(self._alive, 1))
