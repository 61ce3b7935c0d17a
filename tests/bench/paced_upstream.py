"""A server with OpenAI's API whose replies come at a fixed pace: `paced_upstream.py port`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

FIRST_SECONDS, STEP_SECONDS = 0.03, 0.02


async def health(request: Request) -> Response:
    return Response()


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": "model", "owned_by": "vllm", "max_model_len": 4096}]})


async def complete(request: Request) -> Response:
    tokens = (await request.json()).get("max_tokens", 128)
    return StreamingResponse(chunks(tokens), media_type="text/event-stream")


async def chunks(tokens: int) -> AsyncIterator[str]:
    """The chunks of a reply; a late one does not delay those after it."""
    loop = asyncio.get_running_loop()
    begin = loop.time() + FIRST_SECONDS
    for number in range(tokens):
        await asyncio.sleep(begin + number * STEP_SECONDS - loop.time())
        usage = {"prompt_tokens": 20, "completion_tokens": number + 1, "total_tokens": 21 + number}
        yield frame([{"index": 0, "delta": {"content": " word"}, "finish_reason": None}], usage)
    yield frame([{"index": 0, "delta": {}, "finish_reason": "stop"}], None)
    yield frame([], {"prompt_tokens": 20, "completion_tokens": tokens, "total_tokens": 20 + tokens})
    yield "data: [DONE]\n\n"


def frame(choices: list[dict[str, object]], usage: dict[str, int] | None) -> str:
    """One chunk."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "model"}
    return f"data: {json.dumps({**head, 'choices': choices, 'usage': usage})}\n\n"


app = Starlette(
    routes=[
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/chat/completions", complete, methods=["POST"]),
    ]
)

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
