"""Which version of a file is read: one that changes while a model is loaded would give it weights of two models."""

from __future__ import annotations

import os
from pathlib import Path

from models.errors import ModelError


class FileVersion:
    """A file as it is now, by its size and time. `check` tells later if it has changed, or if another took its place.

    The number of its inode says nothing: some file systems give a new one each time. `descriptor` is that of the file
    if it is open.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self._path = path
        self._identity = _identity(path if descriptor is None else descriptor)

    def check(self, descriptor: int | None = None) -> None:
        """Raises ModelError if the file is not the same any more, and OSError if it is gone."""
        if _identity(self._path if descriptor is None else descriptor) != self._identity:
            raise ModelError(f"{self._path} has changed while it was read: start again")


def _identity(file: Path | int) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
