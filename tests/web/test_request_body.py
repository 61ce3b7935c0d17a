"""How much of a request the server reads."""

from __future__ import annotations

import gzip
import json
import socket
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from models.validation import Json
from models.web.request_body import BODY_BYTES
from server import routes
from tests.support.client import ANN, bearer
from tests.support.routes import http_routes, methods_of
from tests.support.running_app import RunningApp
from tests.support.serving import Served


class Body:
    """A body that a client sends in chunks, one when the server wants one; `read` counts the bytes."""

    def __init__(self, chunk: bytes, chunks: int = 1000) -> None:
        self.chunk = chunk
        self.left = chunks
        self.read = 0

    async def receive(self) -> Json:
        if not self.left:
            return {"type": "http.disconnect"}
        self.left -= 1
        self.read += len(self.chunk)
        return {"type": "http.request", "body": self.chunk, "more_body": bool(self.left)}


def send_body(
    running: RunningApp, method: str, path: str, body: Body, *headers: tuple[bytes, bytes], secret: str = ANN
) -> int:
    """The status of the response to a body, of which no more is sent than the server reads."""
    messages: list[Any] = []
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"testserver"), (b"authorization", f"Bearer {secret}".encode()), *headers],
        "client": ("10.0.0.1", 5),
    }

    async def send(message: Any) -> None:
        messages.append(message)

    running.call(running.app, scope, body.receive, send)
    return int(messages[0]["status"])


WITH_BODY = [
    (method, path)
    for path, route in http_routes(routes)
    for method in ("POST", "PATCH", "PUT")
    if path.startswith("/v1/") and method in methods_of(route) and not path.endswith("/cancel")
]


def test_these_routes_read_a_body() -> None:
    assert WITH_BODY == [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/conversations"),
        ("POST", "/v1/conversations/{id}"),
        ("POST", "/v1/conversations/{id}/items"),
    ]


def test_a_cancel_reads_no_body(shared_app: RunningApp) -> None:
    body = Body(b" " * 2**16)
    assert send_body(shared_app, "POST", "/v1/responses/resp_1/cancel", body) == 404
    assert body.read == 0


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
@pytest.mark.parametrize("declared", [True, False], ids=["length declared", "chunked"])
def test_a_body_over_a_mebibyte_is_refused_in_json(client: TestClient, method: str, path: str, declared: bool) -> None:
    def chunks() -> Iterator[bytes]:
        yield b" " * BODY_BYTES
        yield b"{"

    content = b" " * BODY_BYTES + b"{" if declared else chunks()
    response = client.request(method, path, content=content, headers=bearer())
    assert response.status_code == 413
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"] == {
        "message": f"the body may have at most {BODY_BYTES} bytes",
        "type": "invalid_request_error",
        "param": None,
        "code": "body_too_large",
    }


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_a_body_of_a_mebibyte_is_read(client: TestClient, method: str, path: str) -> None:
    response = client.request(method, path, content=b"[".ljust(BODY_BYTES), headers=bearer())
    assert response.status_code == 400


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_an_endless_body_is_read_up_to_the_limit(shared_app: RunningApp, method: str, path: str) -> None:
    body = Body(b" " * 2**16)
    assert send_body(shared_app, method, path, body) == 413
    assert body.read == BODY_BYTES + 2**16


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
@pytest.mark.parametrize("length", [str(1000 * 2**16), "9" * 5000], ids=["65 million", "5000 digits"])
def test_a_body_declared_too_large_is_not_read(shared_app: RunningApp, method: str, path: str, length: str) -> None:
    body = Body(b" " * 2**16)
    assert send_body(shared_app, method, path, body, (b"content-length", length.encode())) == 413
    assert body.read == 0


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_a_body_without_credentials_is_not_read(shared_app: RunningApp, method: str, path: str) -> None:
    body = Body(b" " * 2**16)
    assert send_body(shared_app, method, path, body, secret="wrong") == 401
    assert body.read == 0


# Compressed bodies

GZIP = {"Content-Encoding": "gzip"}


def test_a_body_may_be_gzip(client: TestClient) -> None:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "say " + "yes" * 1000}]}
    compressed = gzip.compress(json.dumps(body).encode())
    response = client.post("/v1/chat/completions", content=compressed, headers=bearer() | GZIP)
    assert response.json()["choices"][0]["message"]["content"] == "yes" * 1000
    response = client.post("/v1/chat/completions", json=body, headers=bearer() | {"Content-Encoding": "identity"})
    assert response.status_code == 200


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_a_body_that_decompresses_to_too_much_is_refused(client: TestClient, method: str, path: str) -> None:
    for length, status in ((BODY_BYTES, 400), (BODY_BYTES + 1, 413), (500 * BODY_BYTES, 413)):
        compressed = gzip.compress(b"[".ljust(length))
        assert len(compressed) < BODY_BYTES
        response = client.request(method, path, content=compressed, headers=bearer() | GZIP)
        assert response.status_code == status


def test_a_body_that_decompresses_to_too_much_is_not_held_in_memory(client: TestClient) -> None:
    compressed = gzip.compress(b" " * 500 * BODY_BYTES)
    tracemalloc.start()
    try:
        response = client.post("/v1/chat/completions", content=compressed, headers=bearer() | GZIP)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert response.status_code == 413
    assert peak < 20 * BODY_BYTES


WHOLE = gzip.compress(b'{"model": "scripted"}')


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", WHOLE[:-1], WHOLE[:12], WHOLE + b"x", WHOLE + WHOLE, WHOLE[:-8] + bytes(8), zlib.compress(b"{}")],
    ids=["empty", "plain", "cut", "cut early", "more", "twice", "wrong checksum", "zlib"],
)
def test_a_body_that_is_no_whole_gzip_is_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/chat/completions", content=body, headers=bearer() | GZIP)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    assert "gzip" in response.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip", "x"])
def test_another_encoding_is_refused(client: TestClient, encoding: str) -> None:
    headers = bearer() | {"Content-Encoding": encoding}
    response = client.post("/v1/chat/completions", content=b"{}", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_encoding")


FORM = (b"content-type", b"application/x-www-form-urlencoded")
MULTIPART = (b"content-type", b"multipart/form-data; boundary=x")


@pytest.mark.parametrize(
    ("type", "beginning", "chunk"),
    [
        (FORM, b"secret=", b"x" * 2**16),
        (FORM, b"", b"a=1&" * 2**14),
        (FORM, b"", b"&" * 2**16),
        (MULTIPART, b'--x\r\nContent-Disposition: form-data; name="secret"\r\n\r\n', b"x" * 2**16),
        (MULTIPART, b'--x\r\nContent-Disposition: form-data; name="secret"\r\n', b"X: y\r\n" * 2**13),
        (MULTIPART, b"--x--\r\n", b"x" * 2**16),
    ],
    ids=["large field", "many fields", "empty fields", "large part", "many headers", "data after the end"],
)
def test_a_login_form_that_is_too_large_is_not_read_to_its_end(
    shared_app: RunningApp, type: tuple[bytes, bytes], beginning: bytes, chunk: bytes
) -> None:
    body = Body(beginning + chunk)
    assert send_body(shared_app, "POST", "/login", body, type) in (400, 413)
    assert body.read <= 2 * BODY_BYTES


def test_headers_over_the_limit_are_refused_and_others_still_served(scripted_server: Served) -> None:
    with socket.create_connection(("127.0.0.1", scripted_server.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2**17)  # and no end
        assert connection.makefile("rb").readline() == b"HTTP/1.1 400 Bad Request\r\n"
    assert httpx2.get(f"{scripted_server.url}/health").status_code == 200
