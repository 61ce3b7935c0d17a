"""Secrets kept out of uvicorn's log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class Redaction(logging.Filter):
    """Cuts queries, which uvicorn prints with each request; drops debug lines, which show headers and frames."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Mend the record; False drops it."""
        if isinstance(record.args, tuple):
            record.args = tuple(
                f"{arg.partition('?')[0]}?..." if isinstance(arg, str) and "?" in arg else arg for arg in record.args
            )
        if str(record.msg).startswith("Invalid UTF-8"):  # a client's mistake needs no traceback
            record.exc_info = None
        return record.levelno >= logging.INFO


@contextmanager
def redacted() -> Iterator[None]:
    """Redaction of uvicorn's loggers while the context lasts."""
    redaction = Redaction()
    loggers = [logging.getLogger(f"uvicorn.{name}") for name in ("error", "access", "asgi")]
    for logger in loggers:
        logger.addFilter(redaction)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(redaction)
