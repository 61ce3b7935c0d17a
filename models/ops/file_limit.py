"""Raises the limit of open files and sockets of the process."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
from contextlib import suppress
from typing import Any

logger = logging.getLogger("parley")

ENOUGH = 2**20  # for systems without a limit; some of them still need a number
LOG_SECONDS = 60  # between two log lines


def raise_file_limit() -> int:
    """Raise the limit as far as the system allows, and return it. If it is reached, log one line, not tracebacks."""
    limit = ENOUGH
    with suppress(ImportError):  # Windows has no such limit
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
        with suppress(OSError, ValueError):  # a system may not allow it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    asyncio.get_running_loop().set_exception_handler(FileLimitLogger())
    return limit


class FileLimitLogger:
    """Handles the errors that asyncio cannot raise. Logs at most once a minute that the limit is reached.

    Without this, asyncio logs a traceback for each try to accept a connection.
    """

    def __init__(self) -> None:
        self._logged_at = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() > self._logged_at + LOG_SECONDS:
            self._logged_at = loop.time()
            logger.error("too many files and sockets are open: new connections wait; raise `ulimit -n`")
