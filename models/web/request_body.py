"""The body of a request, up to a limit."""

from __future__ import annotations

import zlib

from starlette.requests import Request

from models.errors import BodyTooLargeError, InvalidJSONError, UnsupportedEncodingError

BODY_BYTES = 2**20
GZIP = 16 + zlib.MAX_WBITS  # how zlib is told to expect gzip


async def read_body(request: Request) -> bytes:
    """The body of a request, which may be gzip. Raises BodyTooLargeError, UnsupportedEncodingError, InvalidJSONError.

    Starlette's own limit answers a declared length with plain text, but clients of the API expect JSON.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "gzip"):
        raise UnsupportedEncodingError
    body, declared = b"", request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 9 or int(declared) > BODY_BYTES):
        raise _too_large()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise _too_large()
    return body if encoding == "identity" else _decompressed(body)


def _decompressed(body: bytes) -> bytes:
    """What is in a gzip file; no more of it than the limit is ever decompressed."""
    decompressor = zlib.decompressobj(GZIP)
    try:
        content = decompressor.decompress(body, BODY_BYTES + 1)
    except zlib.error:
        raise InvalidJSONError("the body is not gzip, as its Content-Encoding says") from None
    if len(content) > BODY_BYTES:
        raise _too_large()
    if not decompressor.eof or decompressor.unused_data:
        raise InvalidJSONError("the gzip of the body is cut off, or has more after its end")
    return content


def _too_large() -> BodyTooLargeError:
    return BodyTooLargeError(f"the body may have at most {BODY_BYTES} bytes")
