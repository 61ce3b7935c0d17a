"""The cookies of the login: their names, how they are read and how they are set."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.responses import Response

SESSION = "parley_session"
DEVICE = "parley_device"  # says whose login this browser has seen


def cookie_name(connection: HTTPConnection, name: str) -> str:
    """The name of a cookie on this connection. Over TLS it has a prefix, so that no other host can set it."""
    return f"__Host-{name}" if _is_secure(connection) else name


def read_cookie(connection: HTTPConnection, name: str) -> str:
    """The value of a cookie; empty if there is none.

    Ours have only characters that need no quotes. `connection.cookies` removes quotes from all cookies, which takes
    seconds for a long one.
    """
    wanted = cookie_name(connection, name)
    for header in connection.headers.getlist("cookie"):
        for part in header.split(";"):
            found, _, value = part.partition("=")
            if found.strip() == wanted:
                return value.strip()
    return ""


def set_cookie(connection: HTTPConnection, response: Response, name: str, value: str, seconds: int) -> None:
    """Set a cookie that no script and no other site can use. With 0 seconds, it is deleted."""
    response.set_cookie(
        cookie_name(connection, name),
        value,
        max_age=seconds,
        path="/",
        secure=_is_secure(connection),
        httponly=True,
        samesite="strict",
    )


def _is_secure(connection: HTTPConnection) -> bool:
    return connection.scope.get("scheme") in ("https", "wss")
