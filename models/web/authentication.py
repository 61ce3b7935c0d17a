"""Finds the user of a request: by header, subprotocol, session cookie or query."""

from __future__ import annotations

import base64
from contextlib import suppress

from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.requests import HTTPConnection

from models.errors import APIError, OriginNotAllowedError, TooManyLoginsError, WrongCredentialsError
from models.ops.logs import log
from models.users.users import User
from models.web.cookies import SESSION, read_cookie


class UserRequired(AuthenticationBackend):
    """The authentication backend of a mount that is for users only."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        """The user of a request. Raises AuthenticationError, whose cause is an APIError."""
        try:
            user = await authenticate(conn)
        except APIError as error:
            raise AuthenticationError from error
        return AuthCredentials(["user"]), SimpleUser(user.id)


async def authenticate(connection: HTTPConnection) -> User:
    """The user of a connection, by the first credentials that are present. Raises APIError.

    The order: the Authorization header, a subprotocol, the session cookie, the query of a WebSocket.
    """
    scheme, _, secret = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return await log_in(connection, secret.strip().encode("latin-1").decode(errors="replace"))
    for protocol in connection.scope.get("subprotocols", ()):
        if protocol.startswith("bearer."):
            return await log_in(connection, _decoded(protocol.removeprefix("bearer.")))
    if user := user_of_cookie(connection):
        if connection.scope.get("method") not in ("GET", "HEAD") and not has_allowed_origin(connection):
            raise OriginNotAllowedError
        if connection.query_params.get("userid", user.id) == user.id:
            return user
    if connection.scope["type"] == "websocket" and (secret := connection.query_params.get("secret", "")):
        return await log_in(connection, secret)
    raise WrongCredentialsError


async def log_in(connection: HTTPConnection, secret: str) -> User:
    """The user with a secret, and with the id that the query names, if any. Raises APIError."""
    address = connection.client.host if connection.client else "local"
    state = connection.app.state
    try:
        user: User = await state.users.log_in(secret, connection.query_params.get("userid"), address)
    except (WrongCredentialsError, TooManyLoginsError) as error:
        state.metrics.login_failures.inc()
        if isinstance(error, WrongCredentialsError):  # a blocked address costs no line
            log("login failed", address=address, code=error.code)
        raise
    _welcome(connection)
    return user


def user_of_cookie(connection: HTTPConnection) -> User | None:
    """The user of the session cookie; None if there is no valid one."""
    user: User | None = connection.app.state.users.user_of_session(read_cookie(connection, SESSION))
    if user:
        _welcome(connection)
    return user


def has_allowed_origin(connection: HTTPConnection) -> bool:
    """Whether the request of a browser comes from our own page, or from one in PARLEY_ORIGINS."""
    host = connection.headers.get("host", "")
    allowed = (f"http://{host}", f"https://{host}", *connection.app.state.settings.origins)
    return connection.headers.get("origin") in allowed


def _welcome(connection: HTTPConnection) -> None:
    """Tell the web server's connection, if it is one of ours, that its client is a user."""
    if open_connection := connection.scope.get("state", {}).get("connection"):
        open_connection.welcome()


def _decoded(value: str) -> str:
    """The text in unpadded base64url; for anything else an empty text, which is never a secret."""
    with suppress(ValueError):
        return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).decode()
    return ""
