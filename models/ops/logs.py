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
LIBRARIES = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "aiosqlite")  # aiosqlite logs messages


def log(event: str, **details: object) -> None:
    """Log an event with its details, which are fields if the log is JSON."""
    shown = (f"{name}={_quoted(str(value))}" for name, value in details.items())
    logger.info(" ".join([event, *shown]), extra=details)


def _quoted(text: str) -> str:
    """The text, quoted if it could look like another field or line."""
    return text if text.isprintable() and not {*" ='\""} & {*text} else repr(text)


class Redaction(logging.Filter):
    """Removes URL queries, which uvicorn logs with each request, and debug lines, which show headers and frames."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the record; False drops it."""
        if isinstance(record.args, tuple):
            record.args = tuple(
                f"{arg.partition('?')[0]}?..." if isinstance(arg, str) and "?" in arg else arg for arg in record.args
            )
        if str(record.msg).startswith("Invalid UTF-8"):  # a client's mistake needs no traceback
            record.exc_info = None
        return record.levelno >= logging.INFO


@contextmanager
def logging_configured(format: str) -> Iterator[None]:
    """While the context lasts, log as `text` or `json`, redact the logs of libraries, and make them JSON if ours is."""
    formatter = _formatter(format)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    level = logger.level
    if not logger.hasHandlers():  # else the whole process has logging already
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with _libraries_redacted(formatter if format == "json" else None):
            yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _formatter(format: str) -> logging.Formatter:
    if format == "json":
        fields, reserved = ["asctime", "levelname", "name", "message"], [*RESERVED_ATTRS, *UNWANTED]
        return JsonFormatter(fields, rename_fields=JSON_NAMES, reserved_attrs=reserved)
    return logging.Formatter("%(asctime)s %(levelname)s %(message)s")


@contextmanager
def _libraries_redacted(formatter: logging.Formatter | None) -> Iterator[None]:
    """While the context lasts, redact the logs of libraries, and format them with `formatter`, if it is given."""
    redaction = Redaction()
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = {handler: handler.formatter for library in loggers for handler in library.handlers}
    for library in loggers:
        library.addFilter(redaction)
    for handler in before if formatter else ():
        handler.setFormatter(formatter)
    try:
        yield
    finally:
        for handler, its_formatter in before.items():
            handler.setFormatter(its_formatter)
        for library in loggers:
            library.removeFilter(redaction)
