from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from models.logs import Redaction, configured

SECRET = "hunter2"
LOGGERS = ["uvicorn.error", "uvicorn.access", "uvicorn.asgi"]


class Lines(logging.Handler):
    """Keeps what a log would show, tracebacks included."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What uvicorn's loggers print, debug lines included."""
    logger = logging.getLogger("uvicorn")
    handler, level = Lines(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler.lines
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.mark.parametrize("name", LOGGERS)
def test_the_query_of_a_request_is_cut(lines: list[str], name: str) -> None:
    with configured("text"):
        logging.getLogger(name).info(
            '%s - "%s %s HTTP/%s" %d', "10.0.0.1:5", "GET", f"/ws?userid=ann&secret={SECRET}", "1.1", 101
        )
    assert lines == ['10.0.0.1:5 - "GET /ws?... HTTP/1.1" 101']


@pytest.mark.parametrize("name", LOGGERS)
def test_debug_lines_which_show_headers_are_dropped(lines: list[str], name: str) -> None:
    with configured("text"):
        logging.getLogger(name).debug("< Authorization: Bearer %s", SECRET)
    assert lines == []


@pytest.mark.parametrize("path", ["/", "/static/chat.js"])
def test_a_line_without_a_query_stays_as_it_is(lines: list[str], path: str) -> None:
    with configured("text"):
        logging.getLogger("uvicorn.access").info("%s %s %d %s", "GET", path, 200, None)
    assert lines == [f"GET {path} 200 None"]


def test_a_line_whose_arguments_are_a_mapping_stays_as_it_is(lines: list[str]) -> None:
    with configured("text"):
        logging.getLogger("uvicorn.error").info("%(count)d workers", {"count": 2})
    assert lines == ["2 workers"]


def test_a_clients_bad_utf8_leaves_no_traceback(lines: list[str]) -> None:
    try:
        b"\xff".decode()
    except UnicodeDecodeError:
        with configured("text"):
            logging.getLogger("uvicorn.error").exception("Invalid UTF-8 sequence received from client.")
    assert lines == ["Invalid UTF-8 sequence received from client."]


def test_the_traceback_of_a_bug_stays(lines: list[str]) -> None:
    with configured("text"):
        try:
            raise RuntimeError("a bug")
        except RuntimeError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    assert lines[0].startswith("Exception in ASGI application\nTraceback")


@pytest.mark.parametrize("name", LOGGERS)
def test_logging_is_as_before_when_the_context_ends_even_by_an_error(name: str) -> None:
    before = list(logging.getLogger(name).filters)

    def fail() -> None:
        with configured("text"):
            assert any(isinstance(filter, Redaction) for filter in logging.getLogger(name).filters)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert logging.getLogger(name).filters == before
