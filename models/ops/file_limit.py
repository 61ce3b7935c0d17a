"""How many files and sockets the process may have open."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
from contextlib import suppress
from typing import Any

logger = logging.getLogger("parley")

ENOUGH = 2**20  # for systems without a limit, some of which still want a number
LOG_SECONDS = 60  # from one log line to the next


def raise_file_limit() -> None:
    """Raise the limit as far as the system allows, and log one line, not tracebacks, when it is reached."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit; other systems may not allow it
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    asyncio.get_running_loop().set_exception_handler(FileLimitLogger())


class FileLimitLogger:
    """Handles the errors that asyncio cannot raise. Logs once a minute that the limit is reached, since asyncio tries
    to accept connections again and again."""

    def __init__(self) -> None:
        self._logged_at = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() > self._logged_at + LOG_SECONDS:
            self._logged_at = loop.time()
            logger.error("too many files and sockets are open: new connections wait; raise `ulimit -n`")
