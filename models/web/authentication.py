"""Finds the user of a request: by header, subprotocol, session cookie or query."""

from __future__ import annotations

import base64
from contextlib import suppress
from dataclasses import dataclass

from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.requests import HTTPConnection

from models.errors import APIError, OriginNotAllowedError, TooManyLoginsError, WrongCredentialsError
from models.ops.logs import log
from models.users.sessions import Session
from models.users.users import User
from models.web.cookies import DEVICE, SESSION, read_cookie


@dataclass(frozen=True)
class Login:
    """Who uses a connection, and by which session, if it was not by a secret."""

    user: User
    session: Session | None = None


class UserRequired(AuthenticationBackend):
    """The authentication backend of a mount that is for users only."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        """The user of a request. Raises AuthenticationError, whose cause is an APIError."""
        try:
            login = await authenticate(conn)
        except APIError as error:
            raise AuthenticationError from error
        return AuthCredentials(["user"]), SimpleUser(login.user.id)


async def authenticate(connection: HTTPConnection, by_query: bool = False) -> Login:
    """The user of a connection, by the first credentials that are present. Raises APIError.

    The order: the Authorization header, a subprotocol, the session cookie, the query if `by_query` is set.
    """
    check_origin(connection)
    scheme, _, secret = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return await log_in(connection, secret.strip().encode("latin-1").decode(errors="replace"))
    for protocol in connection.scope.get("subprotocols", ()):
        if protocol.startswith("bearer."):
            return await log_in(connection, _decoded(protocol.removeprefix("bearer.")))
    if login := login_of_cookie(connection):
        if connection.scope.get("method") not in ("GET", "HEAD") and "origin" not in connection.headers:
            raise OriginNotAllowedError
        if connection.query_params.get("userid", login.user.id) == login.user.id:
            return login
    if by_query and (secret := connection.query_params.get("secret", "")):
        return await log_in(connection, secret)
    raise WrongCredentialsError


async def log_in(connection: HTTPConnection, secret: str) -> Login:
    """The user with a secret, and with the id that the query names, if any. Raises APIError."""
    address = connection.client.host if connection.client else "local"
    state, device = connection.app.state, read_cookie(connection, DEVICE)
    try:
        user = await state.users.log_in(secret, connection.query_params.get("userid"), address, device)
    except (WrongCredentialsError, TooManyLoginsError) as error:
        state.metrics.login_failures.inc()
        if isinstance(error, WrongCredentialsError):  # a blocked address costs no line
            log("login failed", address=address, code=error.code)
        raise
    _welcome(connection)
    return Login(user)


def login_of_cookie(connection: HTTPConnection) -> Login | None:
    """The login of the session cookie; None if there is no valid one."""
    found = connection.app.state.users.session(read_cookie(connection, SESSION))
    if not found:
        return None
    _welcome(connection)
    return Login(*found)


def check_origin(connection: HTTPConnection) -> None:
    """Raise OriginNotAllowedError if a page sends the request that is not ours, and not of PARLEY_ORIGINS.

    Such a page could else guess secrets, and lock users out, from the browsers of all its visitors.
    """
    host = connection.headers.get("host", "")
    allowed = (f"http://{host}", f"https://{host}", *connection.app.state.settings.origins)
    if any(origin not in allowed for origin in connection.headers.getlist("origin")):
        raise OriginNotAllowedError


def _welcome(connection: HTTPConnection) -> None:
    """Tell the web server's connection, if it is one of ours, that its client is a user."""
    if open_connection := connection.scope.get("state", {}).get("connection"):
        open_connection.welcome()


def _decoded(value: str) -> str:
    """The text in unpadded base64url; for anything else an empty text, which is never a secret."""
    with suppress(ValueError):
        return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).decode()
    return ""
