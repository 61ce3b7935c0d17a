from __future__ import annotations

import json
import logging
import logging.config
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from starlette.testclient import TestClient
from uvicorn.config import LOGGING_CONFIG
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from models.chat_request import ChatRequest
from models.errors import MessagesRejectedError
from models.ops.logs import Redaction, log, logging_configured
from models.settings import Settings
from models.web.cookies import SESSION as COOKIE
from server import create_app
from tests.support.client import ENDS, bearer, bearer_subprotocol, complete
from tests.support.scripted import ScriptedChat, ScriptedReply, keeping_in
from tests.support.serving import Served, serve
from tests.support.sockets import ask, chat_v2, close_code, events_until, events_until_done
from tests.support.stores import SlowConversations

SECRET = "hunter2"
LOGGERS = ["uvicorn.error", "uvicorn.access", "uvicorn.asgi"]


class LineHandler(logging.Handler):
    """Keeps the lines that a log would show, tracebacks included."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """The lines of uvicorn's loggers, debug lines included."""
    logger = logging.getLogger("uvicorn")
    handler, level = LineHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler.lines
    logger.setLevel(level)
    logger.removeHandler(handler)


# Redaction of uvicorn's log


@pytest.mark.parametrize("name", LOGGERS)
def test_the_query_of_a_request_is_cut_off(lines: list[str], name: str) -> None:
    with logging_configured("text"):
        logging.getLogger(name).info(
            '%s - "%s %s HTTP/%s" %d', "10.0.0.1:5", "GET", f"/ws?userid=ann&secret={SECRET}", "1.1", 101
        )
    assert lines == ['10.0.0.1:5 - "GET /ws?... HTTP/1.1" 101']


@pytest.mark.parametrize("name", LOGGERS)
def test_debug_lines_are_dropped_since_they_show_headers(lines: list[str], name: str) -> None:
    with logging_configured("text"):
        logging.getLogger(name).debug("< Authorization: Bearer %s", SECRET)
    assert lines == []


@pytest.mark.parametrize("path", ["/", "/static/chat.js"])
def test_a_line_without_a_query_is_not_changed(lines: list[str], path: str) -> None:
    with logging_configured("text"):
        logging.getLogger("uvicorn.access").info("%s %s %d %s", "GET", path, 200, None)
    assert lines == [f"GET {path} 200 None"]


def test_a_line_with_a_mapping_of_arguments_is_not_changed(lines: list[str]) -> None:
    with logging_configured("text"):
        logging.getLogger("uvicorn.error").info("%(count)d workers", {"count": 2})
    assert lines == ["2 workers"]


def test_bad_utf8_from_a_client_leaves_no_traceback(lines: list[str]) -> None:
    try:
        b"\xff".decode()
    except UnicodeDecodeError:
        with logging_configured("text"):
            logging.getLogger("uvicorn.error").exception("Invalid UTF-8 sequence received from client.")
    assert lines == ["Invalid UTF-8 sequence received from client."]


def test_a_bug_leaves_its_traceback(lines: list[str]) -> None:
    with logging_configured("text"):
        try:
            raise RuntimeError("a bug")
        except RuntimeError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    assert lines[0].startswith("Exception in ASGI application\nTraceback")


@pytest.mark.parametrize("name", LOGGERS)
def test_the_filters_are_removed_when_the_context_ends_by_an_error(name: str) -> None:
    before = list(logging.getLogger(name).filters)

    def fail() -> None:
        with logging_configured("text"):
            assert any(isinstance(filter, Redaction) for filter in logging.getLogger(name).filters)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert logging.getLogger(name).filters == before


# Text and JSON

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) \S.*")
LOGGING = [*LOGGERS, "uvicorn", "parley"]


@contextmanager
def unconfigured() -> Iterator[None]:
    """While the context lasts, no logger has a handler or a level, as in a new process; pytest adds some."""
    loggers = [logging.getLogger(name) for name in LOGGING]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers.clear()
        logger.propagate = logger.name not in ("parley", "uvicorn")  # pytest's handlers are at the root
        logger.setLevel(logging.NOTSET)
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The events of a log in which each line is a JSON object."""
    events = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "message"} <= event.keys() for event in events)
    return events


def test_as_json_every_line_of_parley_and_uvicorn_is_an_object(
    settings: Settings, scripted: ScriptedChat, capfd: pytest.CaptureFixture[str]
) -> None:
    app = create_app(replace(settings, log="json"), scripted.opened)
    with unconfigured(), serve(app, log_config=LOGGING_CONFIG) as served:
        body = {"model": "scripted", "messages": [{"role": "user", "content": "say yes"}], "user": 'a\nb="c"'}
        for _ in range(2):
            response = httpx2.post(f"{served.url}/v1/chat/completions?a=b", json=body, headers=bearer())
            assert response.status_code == 200
        with chat_v2(served) as connection:
            ask(connection, "break it")
            done = events_until_done(connection)[-1]["response"]
        httpx2.get(f"{served.url}/v1/models", headers=bearer("wrong"))
    out, err = capfd.readouterr()
    # Before this line and after the other, there are no settings yet or no longer.
    _, _, rest = err.partition("Waiting for application startup.\n")
    within, _, after = rest.partition("INFO:     Finished server process")
    events = parse_lines(out + within.removesuffix("INFO:     Application shutdown complete.\n"))
    assert len(after.splitlines()) == 1
    replies = [event for event in events if event["message"].startswith("reply ")]
    assert [(event["user"], event["status"], event["reason"]) for event in replies] == [
        ("ann", "completed", "stop"),
        ("ann", "completed", "stop"),
        ("ann", "failed", "server_error"),
    ]
    assert replies[-1]["response"] == done["id"]
    assert all({"input_tokens", "output_tokens", "cached_tokens", "seconds"} <= event.keys() for event in replies)
    assert all(event["logger"] == "parley" and event["level"] == "INFO" for event in replies)
    assert [event["end_user"] for event in events if event["message"].startswith("completion ")] == ['a\nb="c"'] * 2
    (failed,) = [event for event in events if "exc_info" in event]
    assert failed["message"] == f"{done['id']} failed"
    assert failed["exc_info"].endswith("RuntimeError: the script says so")
    (refused,) = [event for event in events if event["message"].startswith("login failed")]
    assert (refused["address"], refused["code"]) == ("127.0.0.1", "invalid_credentials")
    requests = [event["message"] for event in events if event["logger"] == "uvicorn.access"]
    assert sum('"POST /v1/chat/completions?... HTTP/1.1" 200' in request for request in requests) == 2
    assert any(event["logger"] == "uvicorn.error" for event in events)
    assert not any({"color_message", "websocket"} & event.keys() for event in events)


def test_as_text_every_event_is_one_line(
    settings: Settings, scripted: ScriptedChat, capfd: pytest.CaptureFixture[str]
) -> None:
    with unconfigured(), TestClient(create_app(settings, scripted.opened)) as client:
        capfd.readouterr()
        for label in ("plain", "two\nlines", "2026-01-01 00:00:00,000 INFO revoked user=ann", "\u2028\x85\x1b[2J"):
            assert complete(client, "say yes", user=label).status_code == 200
        with client.websocket_connect("/ws", ["chat.v2"], headers=bearer("wrong")) as socket:
            socket.receive_json()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 9
    assert all(LINE.fullmatch(line) for line in lines)
    replies = [line.split(" ", 3)[3] for line in lines if " reply " in line]
    assert len(replies) == 4
    details = r"reply response=resp_\w{32} user=ann status=completed reason=stop input_tokens=1 cached_tokens=0 "
    details += r"output_tokens=1 reasoning_tokens=0 total_tokens=2 seconds=[\d.e-]+"
    assert all(re.fullmatch(details, reply) for reply in replies)
    assert lines[-1].endswith("login failed address=testclient code=invalid_credentials")


@pytest.mark.parametrize("format", ["text", "json"])
def test_the_end_of_the_context_restores_handlers_levels_and_formatters(format: str) -> None:
    def state() -> list[Any]:
        loggers = [logging.getLogger(name) for name in LOGGING]
        return [
            (logger.level, logger.filters[:], [(handler, handler.formatter) for handler in logger.handlers])
            for logger in loggers
        ]

    with unconfigured():
        logging.config.dictConfig(LOGGING_CONFIG)
        logging.getLogger("parley").setLevel(logging.WARNING)
        before = state()
        with logging_configured(format):
            within = state()
            assert logging.getLogger("parley").getEffectiveLevel() == logging.INFO
            assert len(logging.getLogger("parley").handlers) == 1
            of_uvicorn = [handler.formatter for name in LOGGING[:-1] for handler in logging.getLogger(name).handlers]
            assert len({*of_uvicorn}) == (1 if format == "json" else 2)
        assert within != before
        assert state() == before


def test_no_handler_is_added_where_logging_is_configured_already() -> None:
    with unconfigured():
        logger, handler = logging.getLogger("parley"), LineHandler()
        logger.addHandler(handler)
        with logging_configured("text"):
            assert logger.handlers == [handler]
            log("event", user="ann")
        assert handler.lines == ["event user=ann"]
        assert logger.handlers == [handler]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("ann", "ann"),
        (3, "3"),
        ("", ""),
        ("a b", "'a b'"),
        ("a=b", "'a=b'"),
        ("a'b", '"a\'b"'),
        ("a\nb", r"'a\nb'"),
        ("\u2028", r"'\u2028'"),
        ("姓名", "姓名"),
    ],
    ids=["word", "number", "empty", "space", "equals sign", "quote", "line break", "line separator", "Chinese"],
)
def test_a_value_is_quoted_where_it_could_be_mistaken_for_a_field(
    value: object, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "parley"):
        log("event", user=value)
    (record,) = caplog.records
    assert record.getMessage() == f"event user={shown}"
    assert record.__dict__["user"] == value


# No secrets and no messages

WORD = "zanzibar"  # in all messages and replies, and in all secrets
GOOD = f"good {WORD} secret"
WRONG = f"wrong {WORD}"


class EverythingHandler(LineHandler):
    """Keeps the lines of all loggers but those of the clients in this process."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s %(args)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith(("httpx", "httpcore", "websockets.client")):
            super().emit(record)


@pytest.fixture
def everything() -> Iterator[list[str]]:
    """All lines of any level, with tracebacks."""
    handler, loggers = EverythingHandler(), [logging.getLogger(name) for name in (None, "uvicorn", *LOGGERS)]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield handler.lines
    for logger, level in zip(loggers, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


class RejectingChat(ScriptedChat):
    """Rejects messages that begin with "reject", by an error that shows them, as those of chat templates do."""

    async def prepare(self, request: ChatRequest) -> ScriptedReply:
        if request.messages[-1]["content"].startswith("reject"):
            raise MessagesRejectedError(
                f"the chat template of the model does not accept the messages: {request.messages}"
            )
        return await super().prepare(request)


def use_websockets(served: Served, **options: Any) -> None:
    """Send good and bad frames by both protocols."""
    with connect(served.ws, subprotocols=[Subprotocol("chat.v2")], max_size=None, **options) as socket:
        socket.recv()
        for order in ("say", "break", "reject"):
            ask(socket, f"{order} {WORD}", conversation="new", instructions=f"be {WORD}")
            events_until(socket, *ENDS, "error")
        for frame in (WORD, json.dumps({"type": WORD}), b"\xff" + WORD.encode(), "[" * 100_000 + WORD):
            socket.send(frame)
            socket.recv()
        socket.send(b"\xff" + WORD.encode(), text=True)
        assert close_code(socket) == 1007
    with connect(served.ws, **options) as socket:
        for order in ("say", "break", "reject"):
            socket.send(f"{order} {WORD}")
            socket.recv()


def use_wrong_credentials(served: Served, client: httpx2.Client) -> None:
    """Send wrong secrets in every place where a secret can stand, and secrets where none belongs."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    client.post("/login", data={"secret": WRONG})
    client.post("/login", content=f"secret={WORD}&" * 9, headers=form)
    client.post("/login", files={"secret": WORD.encode()})
    client.post("/login", content=f"--x{WORD}", headers=multipart)
    for headers in (bearer(WRONG), {"Cookie": f"{COOKIE}={WORD}"}, {"Authorization": f"Basic {WORD}"}):
        client.get("/v1/models", headers=headers)
    quoted = quote(WORD)
    for path in (f"/?secret={quoted}", f"/v1/conversations?query={quoted}&secret={quoted}", f"/nothing?{quoted}"):
        client.get(path, headers=bearer(GOOD))
    for options in ({"subprotocols": [bearer_subprotocol(WRONG)]}, {"additional_headers": bearer(WRONG)}):
        with connect(served.ws, **options) as socket:
            socket.recv()
    with connect(f"{served.ws}?secret={quoted}&userid={quoted}") as socket:
        socket.recv()


def use_http(client: httpx2.Client) -> str:
    """Ask for completions, good and bad, and change a conversation; returns the path of the conversation."""
    for stream in (False, True):
        for order in ("say", "break", "reject"):
            complete(client, f"{order} {WORD}", GOOD, stream=stream, stop=WORD[::-1])
        complete(client, WORD, WRONG, stream=stream)
    for body in (WORD, f'{{"{WORD}": 1}}', f'{{"model": "{WORD}"}}', f"\\u0000{WORD}"):
        client.post("/v1/chat/completions", content=body, headers=bearer(GOOD))
    found = client.get("/v1/conversations", headers=bearer(GOOD)).json()["data"]
    path = f"/v1/conversations/{found[0]['id']}"
    client.post(path, json={"title": WORD}, headers=bearer(GOOD))
    client.get(f"{path}/export", headers=bearer(GOOD))
    return path


def test_no_log_of_any_level_has_a_secret_or_a_message(settings: Settings, everything: list[str]) -> None:
    app = create_app(replace(settings, users={"ann": GOOD}), keeping_in(SlowConversations, RejectingChat().opened))
    with serve(app) as served, httpx2.Client(base_url=served.url) as client:
        assert "parley INFO" not in "".join(everything)
        use_wrong_credentials(served, client)
        assert client.post("/login", data={"secret": GOOD}).status_code == 303
        cookie = str(client.cookies[COOKIE])
        use_websockets(served, additional_headers=bearer(GOOD))
        use_websockets(served, additional_headers={"Cookie": f"{COOKIE}={cookie}", "Origin": served.url})
        path = use_http(client)
        served.app.state.conversations.broken = True
        use_websockets(served, additional_headers=bearer(GOOD))
        served.app.state.conversations.broken = False
        client.delete(path, headers=bearer(GOOD))
    log = "\n".join(everything)
    for expected in (
        "status=completed",
        "status=refused reason=invalid_value",
        "login failed",
        "the script says so",
        "the disk is full",
    ):
        assert expected in log
    tokens = [bearer_subprotocol(secret).removeprefix("bearer.") for secret in (WRONG, WORD)]
    for secret in (WORD, cookie, cookie.split(".")[-1], *tokens):
        assert [line for line in everything if secret in line] == []
