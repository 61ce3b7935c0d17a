"""The cookies of the login, and how they are read."""

from __future__ import annotations

from starlette.requests import HTTPConnection

SESSION = "parley_session"


def read_cookie(connection: HTTPConnection, name: str) -> str:
    """The value of a cookie; empty if there is none.

    Ours have only characters that need no quotes. `connection.cookies` removes quotes from all cookies, which takes
    seconds for a long one.
    """
    for header in connection.headers.getlist("cookie"):
        for part in header.split(";"):
            found, _, value = part.partition("=")
            if found.strip() == name:
                return value.strip()
    return ""
