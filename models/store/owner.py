"""A process that runs replies of a database."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncConnection

from models.store.database import owners_table

OWNER = owners_table.c


class Owner(NamedTuple):
    """A process, as it is stored. `beats` grows while it runs, and other hosts reach it at `address`, if it has one."""

    id: str
    machine: str
    pid: int
    address: str | None
    beats: int

    @classmethod
    def of_this_process(cls, address: str | None = None) -> Owner:
        """A new owner, which is this process."""
        return cls(uuid.uuid4().hex, _machine(), os.getpid(), address, 0)

    @property
    def host(self) -> str:
        """The name of its host."""
        return self.machine.partition(" ")[0]

    @property
    def has_ended(self) -> bool:
        """Whether the process has certainly ended: it ran on this machine, and is not there any more."""
        if self.machine != _machine() or os.name != "posix":  # on Windows, `kill` with 0 would not only ask
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return _is_zombie(self.pid)


async def remove_owners(connection: AsyncConnection, owners: Iterable[Owner]) -> None:
    """Remove owners that have ended, but none that has beaten since it was read."""
    for owner in owners:
        await connection.execute(delete(owners_table).where(OWNER.id == owner.id, OWNER.beats == owner.beats))


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended, but is still listed, since its parent has not noticed."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def _machine() -> str:
    """The host, and the space in which its process ids are unique, which may be that of a container.

    Two hosts may have the same name and the same number of that space, but not the same boot id.
    """
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    boot_id = boot.read_text().strip() if boot.exists() else ""
    return f"{platform.node()} {boot_id} {space.stat().st_ino if space.exists() else ''}"
