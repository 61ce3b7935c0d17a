"""How many files and sockets the process may have open."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
from contextlib import suppress
from typing import Any

logger = logging.getLogger("parley")

ENOUGH = 2**20  # where there is no limit, some systems still want a number
SILENT_SECONDS = 60


def raise_file_limit() -> None:
    """Open as many as the system lets us, and say in a line, instead of tracebacks, when that is not enough."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit; others may not let us
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    asyncio.get_running_loop().set_exception_handler(Explanation())


class Explanation:
    """Handles what asyncio cannot raise: that the limit is reached, once a minute, since it tries on and on."""

    def __init__(self) -> None:
        self._said_at = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() > self._said_at + SILENT_SECONDS:
            self._said_at = loop.time()
            logger.error("as many files and sockets are open as may be: new connections wait; raise `ulimit -n`")
