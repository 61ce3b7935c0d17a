from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from models.web.cookies import SESSION as COOKIE
from tests.support.client import ANN, assert_security_headers, log_in

STATIC = Path(__file__).parents[2] / "templates" / "static"


def test_the_page_is_a_login_form_and_after_login_the_chat(client: TestClient) -> None:
    assert 'name="secret"' in client.get("/").text
    response = log_in(client)
    assert (response.status_code, response.headers["location"]) == (303, "./")
    page = client.get("/")
    assert 'id="composer"' in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'self'; ")
    client.post("/logout")
    assert 'name="secret"' in client.get("/").text


def test_a_wrong_secret_shows_the_form_with_an_error(client: TestClient) -> None:
    response = log_in(client, "wrong")
    assert response.status_code == 401
    assert 'name="secret"' in response.text
    assert "That secret is not right." in response.text
    assert COOKIE not in client.cookies


@pytest.mark.parametrize("origin", ["http://evil.example", "http://[", "null"])
def test_a_login_from_another_site_is_refused(client: TestClient, origin: str) -> None:
    response = client.post("/login", data={"secret": ANN}, headers={"Origin": origin})
    assert (response.status_code, COOKIE in client.cookies) == (403, False)


def test_a_login_from_the_own_page_is_accepted(client: TestClient) -> None:
    response = client.post("/login", data={"secret": ANN}, headers={"Origin": "http://testserver"})
    assert (response.status_code, COOKIE in client.cookies) == (200, True)


def test_a_login_form_with_files_is_refused(client: TestClient) -> None:
    assert client.post("/login", files={"secret": b"x" * 10_000}).status_code == 400
    assert client.post("/login", files={"secret": b"x" * 100_000}).status_code == 413


def test_a_logout_deletes_the_cookie(client: TestClient) -> None:
    log_in(client)
    assert COOKIE in client.cookies
    response = client.post("/logout", follow_redirects=False)
    assert response.status_code == 303
    assert COOKIE not in client.cookies


@pytest.mark.parametrize(
    ("wanted", "language"),
    [("", "en"), ("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("de-DE, en;q=0.9, zh;q=0.8", "en"), ("fr", "en")],
    ids=["none", "Chinese", "English before Chinese", "unknown"],
)
def test_the_page_is_in_a_language_of_the_browser(client: TestClient, wanted: str, language: str) -> None:
    page = client.get("/", headers={"Accept-Language": wanted}).text
    assert ("登录" in page) == (language == "zh")


@pytest.mark.parametrize("file", sorted(file.name for file in STATIC.iterdir() if file.is_file()))
def test_browsers_check_a_static_file_each_time(client: TestClient, file: str) -> None:
    response = client.get(f"/static/{file}")
    assert (response.status_code, response.content) == (200, (STATIC / file).read_bytes())
    assert_security_headers(response, "no-cache")
    again = client.get(f"/static/{file}", headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert_security_headers(again, "no-cache")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_static_files_are_read_only(client: TestClient, method: str) -> None:
    response = client.request(method, "/static/chat.js")
    assert response.status_code == 405
    assert_security_headers(response)
