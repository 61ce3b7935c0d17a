"""The endpoints for operators: health, readiness, metrics, effective arguments."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from models.errors import ServerStoppingError
from models.ops.metrics import MEDIA_TYPE


async def health(request: Request) -> Response:
    """The process is alive."""
    return PlainTextResponse("ok")


async def ready(request: Request) -> Response:
    """Whether the model can answer; if so, with a warning if anything else is wrong."""
    state = request.app.state
    if trouble := state.chat.trouble or (state.admission.closed and ServerStoppingError.message):
        return PlainTextResponse(trouble, 503)
    warning = state.users.trouble or state.responses.trouble
    return PlainTextResponse(f"ready, but {warning}" if warning else "ready")


async def metrics(request: Request) -> Response:
    """The metrics for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type=MEDIA_TYPE)


async def args(request: Request) -> Response:
    """The settings without secrets, and the values in effect for this model."""
    state = request.app.state
    return JSONResponse({"args": state.settings.without_secrets() | state.chat.arguments})
