"""The log: one line for each event, as text or JSON, without secrets and without messages of users."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

logger = logging.getLogger("parley")

JSON_NAMES = {"asctime": "time", "levelname": "level", "name": "logger"}
UNWANTED = ("color_message", "websocket")  # fields that uvicorn adds for itself


def log(event: str, **details: object) -> None:
    """Log an event with its details, which are fields where the log is JSON."""
    shown = (f"{name}={_quoted(str(value))}" for name, value in details.items())
    logger.info(" ".join([event, *shown]), extra=details)


def _quoted(text: str) -> str:
    """A text that cannot be mistaken for another field or line."""
    return text if text.isprintable() and not {*" ='\""} & {*text} else repr(text)


class Redaction(logging.Filter):
    """Removes URL queries, which uvicorn logs with each request, and debug lines, which show headers and frames."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the record; False drops it."""
        if isinstance(record.args, tuple):
            record.args = tuple(
                f"{arg.partition('?')[0]}?..." if isinstance(arg, str) and "?" in arg else arg for arg in record.args
            )
        if str(record.msg).startswith("Invalid UTF-8"):  # a mistake of a client needs no traceback
            record.exc_info = None
        return record.levelno >= logging.INFO


@contextmanager
def configured(format: str) -> Iterator[None]:
    """While the context lasts, log as `text` or `json`, and redact uvicorn's log; it becomes JSON too if ours is."""
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    json = JsonFormatter(
        ["asctime", "levelname", "name", "message"],
        rename_fields=JSON_NAMES,
        reserved_attrs=[*RESERVED_ATTRS, *UNWANTED],
    )
    redaction, handler = Redaction(), logging.StreamHandler()
    handler.setFormatter(json if format == "json" else text)
    theirs = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")]
    theirs.append(logging.getLogger("aiosqlite"))  # its debug lines show messages
    formatters = {handler: handler.formatter for their in theirs for handler in their.handlers}
    level = logger.level
    for their in theirs:
        their.addFilter(redaction)
    for their_handler in formatters if format == "json" else ():
        their_handler.setFormatter(json)
    if not logger.hasHandlers():  # else the whole process has logging already
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        for their_handler, formatter in formatters.items():
            their_handler.setFormatter(formatter)
        for their in theirs:
            their.removeFilter(redaction)
