"""Errors as OpenAI's APIs have them, over HTTP and on sockets."""

from __future__ import annotations

from models.errors import APIError
from models.validation import Json


def render_error(error: APIError) -> Json:
    """The object that tells a client of an error."""
    return {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
