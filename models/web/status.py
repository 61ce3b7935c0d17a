"""The endpoints for operators: health, readiness, metrics, effective arguments."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from models.ops.metrics import MEDIA_TYPE


async def health(request: Request) -> Response:
    """The process is alive."""
    return PlainTextResponse("ok")


async def ready(request: Request) -> Response:
    """Whether the model can answer; if so, with a warning if anything else is wrong."""
    readiness = await request.app.state.status.ready()
    if readiness.trouble:
        return PlainTextResponse(readiness.trouble, 503)
    return PlainTextResponse(f"ready, but {readiness.warning}" if readiness.warning else "ready")


async def metrics(request: Request) -> Response:
    """The metrics for Prometheus."""
    return Response(await request.app.state.status.metrics(), media_type=MEDIA_TYPE)


async def args(request: Request) -> Response:
    """The settings without secrets, and the values in effect for this model."""
    return JSONResponse({"args": await request.app.state.status.arguments()})
