"""Folders for unfinished work, so that a result is either complete or absent."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from models.private_files import make_private_folder


@contextmanager
def scratch_folder(cache: Path, name: str) -> Iterator[Path]:
    """A folder in `cache` for unfinished work of one kind; it is removed at the end.

    One process at a time has it; others wait. Removes the folders that killed processes left. Raises OSError, and
    UntrustedPathError if `cache` belongs to another user.
    """
    make_private_folder(cache)
    with FileLock(cache / f"{name}.lock"):
        for left in cache.glob(f"unfinished-{name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f"unfinished-{name}-", dir=cache) as folder:
            yield Path(folder)
