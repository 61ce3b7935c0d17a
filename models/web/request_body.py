"""The body of a request, up to a limit."""

from __future__ import annotations

from starlette.requests import Request

from models.errors import BodyTooLargeError

BODY_BYTES = 2**20


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises BodyTooLargeError.

    Starlette's own limit answers a declared length with plain text, but clients of the API expect JSON.
    """
    too_large = BodyTooLargeError(f"the body may have at most {BODY_BYTES} bytes")
    body, declared = b"", request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 9 or int(declared) > BODY_BYTES):
        raise too_large
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise too_large
    return body
