"""Folders and files that only their owner can use: secrets, messages, and programs that this process runs."""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from models.errors import UntrustedPathError

logger = logging.getLogger("parley")

OTHERS = stat.S_IRWXG | stat.S_IRWXO
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_private_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter, or close an existing one to others.

    Raises OSError, and UntrustedPathError if it belongs to another user. What the administrator has made may be read
    by others, but not written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _close_to_others(folder, OTHERS_WRITE)


def make_private_file(file: Path) -> None:
    """Make an empty file that only its owner can read, or close an existing one to others.

    Raises OSError, and UntrustedPathError if it belongs to another user.
    """
    with suppress(FileExistsError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # EXCL: not where a link leads
        os.close(descriptor)
    _close_to_others(file, OTHERS)


def check_owners(folder: Path) -> None:
    """Check that no other user has written a folder or a file in it. Raises UntrustedPathError."""
    for path in [folder, *folder.rglob("*")]:
        _check_owner(path)


def check_program(program: Path) -> None:
    """Check a library, or all files of a folder, before their code runs. Raises OSError or UntrustedPathError.

    The folder around it is closed to others, who could else replace it after the check.
    """
    make_private_folder(program.parent)
    for path in [program, *program.rglob("*")]:
        _check_owner(path)
        if others_can_write(path):
            raise UntrustedPathError(path, "can be written by other users")


def others_can_write(path: Path) -> bool:
    """Whether the mode of a file or folder lets other users write."""
    return bool(path.stat().st_mode & OTHERS_WRITE) and _has_owners()


def _close_to_others(path: Path, harmful: int) -> None:
    """Take all rights from others; if that is not allowed, they must not have `harmful` ones."""
    _check_owner(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_ISVTX and mode & OTHERS_WRITE:
        raise UntrustedPathError(path, "is a folder for all users, such as /tmp")
    if mode & OTHERS and _has_owners():
        try:
            path.chmod(mode & ~OTHERS)
        except OSError as error:
            if mode & harmful:
                raise UntrustedPathError(path, "can be used by other users") from error
        else:
            logger.warning("%s was open to other users and is closed to them now", path)


def _check_owner(path: Path) -> None:
    """Check that a path, and what it links to, belongs to this user or to the administrator."""
    if _has_owners() and not {path.lstat().st_uid, path.stat().st_uid} <= {os.getuid(), 0}:
        raise UntrustedPathError(path, "belongs to another user")


def _has_owners() -> bool:
    """Whether the system has owners and modes; Windows has other means."""
    return hasattr(os, "getuid")
