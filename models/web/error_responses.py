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
from starlette.routing import Mount, Route
from starlette.types import ExceptionHandler

from models.errors import APIError, DatabaseUnavailableError, ServerError, one_line
from models.protocols.error_object import render_error
from models.web.middleware import REQUEST_ID, SECURITY_HEADERS, is_api

logger = logging.getLogger("parley")


async def api_error(request: Request, error: Any) -> Response:
    """One of our own errors, in the format of OpenAI's API."""
    return rendered(error)


def authentication_error(connection: HTTPConnection, error: AuthenticationError) -> Response:
    """The reason why a backend of AuthenticationMiddleware refuses a request."""
    reason = error.__cause__
    assert isinstance(reason, APIError)
    return rendered(reason)


def rendered(error: APIError) -> Response:
    """An error in the format of OpenAI's API."""
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if error.retry_after:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse({"error": render_error(error)}, error.status, headers)


async def http_exception(request: Request, error: Any) -> Response:
    """An error of Starlette: in the format of OpenAI's API under `/v1`, else as text."""
    if not is_api(request.scope):
        return PlainTextResponse(error.detail, error.status_code, error.headers)
    details = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
    if error.status_code == 404:
        details |= {"message": f"there is no such path here: {_paths(request)}", "code": "unknown_url"}
    return JSONResponse({"error": details}, error.status_code, error.headers)


def _paths(request: Request) -> str:
    """What there is under `/v1`."""
    mounts = (route for route in request.app.routes if isinstance(route, Mount) and route.path == "/v1")
    paths = [f"/v1{route.path}" for mount in mounts for route in mount.routes if isinstance(route, Route)]
    return f"use {', '.join(path for path in paths if '{' not in path)}"


async def database_error(request: Request, error: Exception) -> Response:
    """The database or a file cannot be used."""
    logger.error("the database or a file cannot be used: %s", one_line(error))
    return rendered(DatabaseUnavailableError())


async def client_disconnect(request: Request, error: Exception) -> Response:
    """The client disconnected during its request, so nobody reads this response."""
    return Response(status_code=400)


async def unexpected_error(request: Request, error: Exception) -> Response:
    """Any other error is a bug. Starlette raises it again, so it is logged; no middleware sees this response."""
    response = rendered(ServerError())
    response.headers.update(SECURITY_HEADERS)
    response.headers[REQUEST_ID] = request.scope["state"]["request_id"]
    return response


HANDLERS: Mapping[Any, ExceptionHandler] = {
    APIError: api_error,
    HTTPException: http_exception,
    SQLAlchemyError: database_error,
    OSError: database_error,  # asyncpg raises it if there is no server
    ClientDisconnect: client_disconnect,
    Exception: unexpected_error,
}
