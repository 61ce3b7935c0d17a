"""Folders and files that only their owner can use: secrets, messages, and programs that this process runs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from models.errors import UntrustedPathError

OTHERS = stat.S_IRWXG | stat.S_IRWXO
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_private_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter, or close an existing one to others.

    Raises OSError, and UntrustedPathError if it belongs to another user.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _close_to_others(folder, 0o700)


def make_private_file(file: Path) -> None:
    """Make an empty file that only its owner can read, or close an existing one to others.

    Raises OSError, and UntrustedPathError if it belongs to another user.
    """
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    _close_to_others(file, 0o600)


def check_program(program: Path) -> None:
    """Check a library, or all files of a folder, before their code runs. Raises UntrustedPathError."""
    for path in [program, *program.rglob("*")]:
        _check_owner(path)
        if path.stat().st_mode & OTHERS_WRITE and _has_owners():
            raise UntrustedPathError(path, "can be written by other users")


def _close_to_others(path: Path, mode: int) -> None:
    _check_owner(path)
    if path.stat().st_mode & OTHERS and _has_owners():
        try:
            path.chmod(mode)
        except OSError as error:
            raise UntrustedPathError(path, "can be used by other users") from error


def _check_owner(path: Path) -> None:
    """Check that a path, and what it links to, belongs to this user or to the administrator."""
    if _has_owners() and not {path.lstat().st_uid, path.stat().st_uid} <= {os.getuid(), 0}:
        raise UntrustedPathError(path, "belongs to another user")


def _has_owners() -> bool:
    """Whether the system has owners and modes; Windows has other means."""
    return hasattr(os, "getuid")
