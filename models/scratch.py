"""Folders for work that must be finished or not be there at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def scratch_folder(cache: Path, name: str) -> Iterator[Path]:
    """A folder in `cache` for unfinished work of one kind, which one process at a time has; removed afterwards.

    Waits for another process that has one. Removes what killed processes left. Raises OSError.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        for left in cache.glob(f"unfinished-{name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f"unfinished-{name}-", dir=cache) as folder:
            yield Path(folder)
