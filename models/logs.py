"""The log: a line an event, for people or for machines, with no secret and nothing that was said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

logger = logging.getLogger("parley")

JSON_NAMES = {"asctime": "time", "levelname": "level", "name": "logger"}
UNWANTED = ("color_message", "websocket")  # what uvicorn adds for itself


def log(event: str, **details: object) -> None:
    """Log an event with its details, which are fields where the log is JSON."""
    shown = (f"{name}={_word(str(value))}" for name, value in details.items())
    logger.info(" ".join([event, *shown]), extra=details)


def _word(text: str) -> str:
    """A text that can pass for nothing else in a line."""
    return text if text.isprintable() and not {*" ='\""} & {*text} else repr(text)


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
def configured(format: str) -> Iterator[None]:
    """While the context lasts our log is shown, as `text` or `json`; uvicorn's is redacted, and JSON too if ours is."""
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    machines = JsonFormatter(
        ["asctime", "levelname", "name", "message"],
        rename_fields=JSON_NAMES,
        reserved_attrs=[*RESERVED_ATTRS, *UNWANTED],
    )
    redaction, handler = Redaction(), logging.StreamHandler()
    handler.setFormatter(machines if format == "json" else text)
    theirs = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")]
    theirs.append(logging.getLogger("aiosqlite"))  # its debug lines show what is said
    formatters = {handler: handler.formatter for their in theirs for handler in their.handlers}
    level = logger.level
    for their in theirs:
        their.addFilter(redaction)
    for their_handler in formatters if format == "json" else ():
        their_handler.setFormatter(machines)
    if not logger.hasHandlers():  # else somebody has set up logging for the whole process
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
