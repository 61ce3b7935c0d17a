from __future__ import annotations

import json
import logging
import logging.config
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from starlette.testclient import TestClient
from uvicorn.config import LOGGING_CONFIG
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from models.admission import Ticket
from models.item import Message
from models.logs import Redaction, configured, log
from models.options import Options
from models.reply import Event, MessagesRefused
from models.settings import Settings
from server import COOKIE, create_app
from tests.conftest import ANN
from tests.scripted import ScriptedChat, keeping_in
from tests.serving import Served, serve
from tests.test_responses import SlowConversations
from tests.test_server import bearer, encoded
from tests.test_uvicorn import ask, chat_v1, closed_with, until

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


# One log, for people or for machines

EVENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) \S.*")
LOGGING = [*LOGGERS, "uvicorn", "parley"]


@contextmanager
def unconfigured() -> Iterator[None]:
    """While it lasts, logging is as in a process where nobody has set it up, which pytest has."""
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


def parsed(text: str) -> list[dict[str, Any]]:
    """The events of a log for machines, each of which has to be a line."""
    events = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "message"} <= event.keys() for event in events)
    return events


def test_for_machines_every_event_of_ours_and_of_uvicorns_is_a_json_object(
    settings: Settings, scripted: ScriptedChat, capfd: pytest.CaptureFixture[str]
) -> None:
    app = create_app(replace(settings, log="json"), scripted.opened)
    with unconfigured(), serve(app, log_config=LOGGING_CONFIG) as served:
        body = {"model": "scripted", "messages": [{"role": "user", "content": "say yes"}], "user": 'a\nb="c"'}
        for _ in range(2):
            answer = httpx2.post(f"{served.url}/v1/chat/completions?a=b", json=body, headers=bearer())
            assert answer.status_code == 200
        with chat_v1(served) as connection:
            ask(connection, "break it")
            done = until(connection, "response.done")[-1]["response"]
        httpx2.get(f"{served.url}/v1/models", headers=bearer("wrong"))
    out, err = capfd.readouterr()
    _, _, rest = err.partition(
        "Waiting for application startup.\n"
    )  # before that there are no settings, nor at the end
    within, _, after = rest.partition("INFO:     Finished server process")
    events = parsed(out + within.removesuffix("INFO:     Application shutdown complete.\n"))
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


def test_for_people_every_event_is_a_line(
    settings: Settings, scripted: ScriptedChat, capfd: pytest.CaptureFixture[str]
) -> None:
    with unconfigured(), TestClient(create_app(settings, scripted.opened)) as client:
        capfd.readouterr()
        for label in ("plain", "two\nlines", "2026-01-01 00:00:00,000 INFO revoked user=ann", "\u2028\x85\x1b[2J"):
            complete(client, "say yes", user=label)
        with client.websocket_connect("/ws", ["chat.v1"], headers=bearer("wrong")) as socket:
            socket.receive_json()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 9
    assert all(EVENT.fullmatch(line) for line in lines)
    replies = [line.split(" ", 3)[3] for line in lines if " reply " in line]
    assert len(replies) == 4
    form = r"reply response=resp_\w{32} user=ann status=completed reason=stop input_tokens=1 cached_tokens=0 "
    assert all(re.fullmatch(form + r"output_tokens=1 total_tokens=2 seconds=[\d.e-]+", reply) for reply in replies)
    assert lines[-1].endswith("login failed address=testclient code=invalid_credentials")


@pytest.mark.parametrize("format", ["text", "json"])
def test_handlers_levels_and_formatters_are_as_before_when_the_context_ends(format: str) -> None:
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
        with configured(format):
            within = state()
            assert logging.getLogger("parley").getEffectiveLevel() == logging.INFO
            assert len(logging.getLogger("parley").handlers) == 1
            theirs = [handler.formatter for name in LOGGING[:-1] for handler in logging.getLogger(name).handlers]
            assert len({*theirs}) == (1 if format == "json" else 2)
        assert within != before
        assert state() == before


def test_where_somebody_has_set_up_logging_we_add_no_handler() -> None:
    with unconfigured():
        logger, handler = logging.getLogger("parley"), Lines()
        logger.addHandler(handler)
        with configured("text"):
            assert logger.handlers == [handler]
            log("event", user="ann")
        assert handler.lines == ["event user=ann"]
        assert logger.handlers == [handler]


# Nothing that is secret, and nothing that was said

SAID = "zanzibar"  # in all that is said, to us and by us, and in all that is a secret
GOOD = f"good {SAID} secret"


class Everything(Lines):
    """Keeps what each logger of the process says, but for those of the clients that tests are."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s %(args)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith(("httpx", "httpcore", "websockets.client")):
            super().emit(record)


@pytest.fixture
def everything() -> Iterator[list[str]]:
    """All that is logged at any level, with tracebacks."""
    handler, loggers = Everything(), [logging.getLogger(name) for name in (None, "uvicorn", *LOGGERS)]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield handler.lines
    for logger, level in zip(loggers, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


class RefusingChat(ScriptedChat):
    """Refuses what it is asked to "refuse", and says why as templates do: with what was said."""

    async def reply(
        self, ticket: Ticket, messages: Sequence[Message], options: Options, whole: bool = False
    ) -> AsyncGenerator[Event, None]:
        if messages[-1]["content"].startswith("refuse"):
            raise MessagesRefused(f"the model's chat template refuses these messages: {messages}")
        async with aclosing(super().reply(ticket, messages, options)) as reply:
            async for event in reply:
                yield event


def complete(client: Any, said: str, secret: str = ANN, **more: Any) -> Any:
    body = {"model": "scripted", "messages": [{"role": "user", "content": said}], **more}
    return client.post("/v1/chat/completions", json=body, headers=bearer(secret))


def chat(served: Served, **arguments: Any) -> None:
    """Say much by a socket, both what is good and what is not."""
    with connect(served.ws, subprotocols=[Subprotocol("chat.v1")], max_size=None, **arguments) as socket:
        socket.recv()
        for said in ("say", "break", "refuse"):
            ask(socket, f"{said} {SAID}", conversation="new", instructions=f"be {SAID}")
            while json.loads(socket.recv())["type"] not in ("response.done", "error"):
                pass
        for frame in (SAID, json.dumps({"type": SAID}), b"\xff" + SAID.encode(), "[" * 100_000 + SAID):
            socket.send(frame)
            socket.recv()
        socket.send(b"\xff" + SAID.encode(), text=True)
        assert closed_with(socket) == 1007
    with connect(served.ws, **arguments) as socket:
        for said in ("say", "break", "refuse"):
            socket.send(f"{said} {SAID}")
            socket.recv()


def test_no_log_at_any_level_has_a_secret_or_what_was_said(settings: Settings, everything: list[str]) -> None:
    settings = replace(settings, users={"ann": GOOD})
    quoted = quote(SAID)
    wrong = f"wrong {SAID}"
    with (
        serve(create_app(settings, keeping_in(SlowConversations, RefusingChat().opened))) as served,
        httpx2.Client(base_url=served.url) as client,
    ):
        assert "parley INFO" not in "".join(everything)
        client.post("/login", data={"secret": wrong})
        client.post(
            "/login", content=f"secret={SAID}&" * 9, headers={"Content-Type": "application/x-www-form-urlencoded"}
        )
        client.post("/login", files={"secret": SAID.encode()})
        client.post("/login", content=f"--x{SAID}", headers={"Content-Type": "multipart/form-data; boundary=x"})
        for headers in (bearer(wrong), {"Cookie": f"{COOKIE}={SAID}"}, {"Authorization": f"Basic {SAID}"}):
            client.get("/v1/models", headers=headers)
        for path in (f"/?secret={quoted}", f"/v1/conversations?query={quoted}&secret={quoted}", f"/nothing?{quoted}"):
            client.get(path, headers=bearer(GOOD))
        for options in ({"subprotocols": [encoded(wrong)]}, {"additional_headers": bearer(wrong)}):
            with connect(served.ws, **options) as socket:  # type: ignore[arg-type]
                socket.recv()
        with connect(f"{served.ws}?secret={quoted}&userid={quoted}") as socket:
            socket.recv()
        assert client.post("/login", data={"secret": GOOD}).status_code == 303
        cookie = str(client.cookies[COOKIE])
        chat(served, additional_headers=bearer(GOOD))
        chat(served, additional_headers={"Cookie": f"{COOKIE}={cookie}", "Origin": served.url})
        for stream in (False, True):
            for said in ("say", "break", "refuse"):
                complete(client, f"{said} {SAID}", GOOD, stream=stream, stop=SAID[::-1])
            complete(client, SAID, wrong, stream=stream)
        for body in (SAID, f'{{"{SAID}": 1}}', f'{{"model": "{SAID}"}}', f"\\u0000{SAID}"):
            client.post("/v1/chat/completions", content=body, headers=bearer(GOOD))
        found = client.get("/v1/conversations", headers=bearer(GOOD)).json()["data"]
        path = f"/v1/conversations/{found[0]['id']}"
        client.patch(path, json={"title": SAID}, headers=bearer(GOOD))
        client.get(f"{path}/export", headers=bearer(GOOD))
        served.app.state.conversations.broken = True
        chat(served, additional_headers=bearer(GOOD))
        served.app.state.conversations.broken = False
        client.delete(path, headers=bearer(GOOD))
    log = "\n".join(everything)
    assert "status=completed" in log
    assert "login failed" in log
    assert "the script says so" in log
    assert "the disk is full" in log
    for secret in (SAID, cookie, cookie.split(".")[-1], encoded(wrong).removeprefix("bearer."), encoded(SAID)[7:]):
        assert [line for line in everything if secret in line] == []
