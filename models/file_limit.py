"""How many files and sockets the process may have open."""

from __future__ import annotations

import asyncio
import errno
import logging
from contextlib import suppress
from typing import Any

logger = logging.getLogger("parley")

ENOUGH = 2**20  # where there is no limit, some systems still want a number


def raise_file_limit() -> None:
    """Open as many as the system lets us, and say in a line, instead of a traceback, when that is not enough."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit; others may not let us
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    asyncio.get_running_loop().set_exception_handler(_explain)


def _explain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        logger.error("as many files and sockets are open as may be: new connections wait; raise `ulimit -n`")
    else:
        loop.default_exception_handler(context)
