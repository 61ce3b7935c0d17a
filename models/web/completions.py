"""The endpoints of OpenAI's API: models and chat completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from models.errors import ModelNotFoundError
from models.ops.logs import log
from models.protocols.chat_completions import BaseChatCompletion, ChatCompletion, ChatCompletionChunks, render_model
from models.protocols.chat_completions_request import ChatCompletionRequest
from models.web.authentication import authenticate
from models.web.request_body import read_body


async def models(request: Request) -> Response:
    """`GET /v1/models`: the one model."""
    state = request.app.state
    return JSONResponse({"object": "list", "data": [render_model(state.model_info, state.started)]})


async def model(request: Request) -> Response:
    """`GET /v1/models/{id}`: the model with this id. Raises ModelNotFoundError."""
    state = request.app.state
    if request.path_params["id"] != state.model_info.name:
        raise ModelNotFoundError(state.model_info.name)
    return JSONResponse(render_model(state.model_info, state.started))


async def chat_completions(request: Request) -> Response:
    """`POST /v1/chat/completions`: a completion, whole or streamed."""
    state, user = request.app.state, request.user.username
    body = await read_body(request)
    await authenticate(request)  # again: the user may have been removed while the body was on its way
    asked = ChatCompletionRequest.parse(body, state.model_info.name)
    kind = ChatCompletionChunks if asked.stream else ChatCompletion
    completion = kind(state.responses, state.model_info, user, asked)
    if asked.end_user:
        log("completion", response=completion.response_id, user=user, end_user=asked.end_user)
    if isinstance(completion, ChatCompletionChunks):
        await completion.wait_started()
        return CompletionStreamResponse(completion)
    async with _cancelled_at_disconnect(completion, request.receive):
        return JSONResponse(await completion.result())


class CompletionStreamResponse(StreamingResponse):
    """Sends a completion as server-sent events, and cancels it when the client disconnects."""

    def __init__(self, completion: ChatCompletionChunks) -> None:
        headers = {"X-Accel-Buffering": "no"}  # nginx passes each event on at once
        super().__init__(completion.frames(), media_type="text/event-stream", headers=headers)
        self.completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with _cancelled_at_disconnect(self.completion, receive):
            await self.stream_response(send)


@asynccontextmanager
async def _cancelled_at_disconnect(completion: BaseChatCompletion, receive: Receive) -> AsyncIterator[None]:
    """Cancel a completion as soon as the client disconnects, even while nothing is being sent."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    listening = asyncio.create_task(disconnected())
    listening.add_done_callback(lambda _: completion.cancel())
    try:
        yield
    finally:
        listening.cancel()
