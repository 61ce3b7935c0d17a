"""Turns exceptions into HTTP responses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.authentication import AuthenticationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ExceptionHandler

from models.errors import APIError, DatabaseUnavailableError, ServerError, one_line
from models.protocols.chat_completions import render_error
from models.web.middleware import SECURITY_HEADERS

logger = logging.getLogger("parley")


async def api_error(request: Request, error: Any) -> Response:
    """One of our own errors, in the format of OpenAI's API."""
    return _rendered(error)


def authentication_error(connection: HTTPConnection, error: AuthenticationError) -> Response:
    """The reason why a backend of AuthenticationMiddleware refuses a request."""
    reason = error.__cause__
    assert isinstance(reason, APIError)
    return _rendered(reason)


def _rendered(error: APIError) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if error.retry_after:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse({"error": render_error(error)}, error.status, headers)


async def http_exception(request: Request, error: Any) -> Response:
    """An error of Starlette: in the format of OpenAI's API under `/v1/`, else as text."""
    root = request.scope.get("app_root_path", request.scope.get("root_path", ""))  # uvicorn's --root-path
    if not request.url.path.removeprefix(root).startswith("/v1/"):
        return PlainTextResponse(error.detail, error.status_code, error.headers)
    details = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": details}, error.status_code, error.headers)


async def database_error(request: Request, error: Exception) -> Response:
    """The database or a file cannot be used."""
    logger.error("the database or a file cannot be used: %s", one_line(error))
    return _rendered(DatabaseUnavailableError())


async def client_disconnect(request: Request, error: Exception) -> Response:
    """The client disconnected during its request, so nobody reads this response."""
    return Response(status_code=400)


async def unexpected_error(request: Request, error: Exception) -> Response:
    """Any other error is a bug. Starlette raises it again, so it is logged; no middleware sees this response."""
    response = _rendered(ServerError())
    response.headers.update(SECURITY_HEADERS)
    return response


HANDLERS: Mapping[Any, ExceptionHandler] = {
    APIError: api_error,
    HTTPException: http_exception,
    SQLAlchemyError: database_error,
    OSError: database_error,  # asyncpg raises it if there is no server
    ClientDisconnect: client_disconnect,
    Exception: unexpected_error,
}
