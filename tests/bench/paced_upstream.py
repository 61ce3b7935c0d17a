"""A server with OpenAI's API whose replies come at a fixed pace: `paced_upstream.py port [host]`.

"count N R" as the last message makes it count up to N, R numbers a second.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence

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
    body = await request.json()
    match str(body["messages"][-1]["content"]).split():
        case ["count", count, rate]:
            reply = chunks([f"{number} " for number in range(int(count))], 1 / int(rate))
        case _:
            reply = chunks([" word"] * body.get("max_tokens", 128), STEP_SECONDS)
    return StreamingResponse(reply, media_type="text/event-stream")


async def chunks(pieces: Sequence[str], step: float) -> AsyncIterator[str]:
    """The chunks of a reply, one each `step` seconds; a late one does not delay those after it."""
    loop, tokens = asyncio.get_running_loop(), len(pieces)
    begin = loop.time() + FIRST_SECONDS
    for number, piece in enumerate(pieces):
        await asyncio.sleep(begin + number * step - loop.time())
        usage = {"prompt_tokens": 20, "completion_tokens": number + 1, "total_tokens": 21 + number}
        yield frame([{"index": 0, "delta": {"content": piece}, "finish_reason": None}], usage)
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
    port, *host = sys.argv[1:]
    uvicorn.run(app, host=host[0] if host else "127.0.0.1", port=int(port), log_level="warning")
