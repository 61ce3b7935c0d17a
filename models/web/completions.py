"""The endpoints of OpenAI's API: models, chat completions, and the older completions."""

from __future__ import annotations

from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from models.model_info import ModelList
from models.ops.logs import log
from models.protocols.chat_completions import ChatChoice, render_model
from models.protocols.chat_completions_request import parse_chat_completion
from models.protocols.completion import Choice, Completion
from models.protocols.completion_request import CompletionRequest
from models.protocols.text_completions import TextChoice, parse_text_completion
from models.web.authentication import authenticate
from models.web.event_stream import EventStreamResponse, calls_at_disconnect
from models.web.request_body import read_body

Parse = Callable[[bytes, ModelList, str], CompletionRequest]


async def models(request: Request) -> Response:
    """`GET /v1/models`: the models, each by all its names."""
    state = request.app.state
    listed = [render_model(model, state.started, name) for model in state.models.all for name in model.names]
    return JSONResponse({"object": "list", "data": listed})


async def model(request: Request) -> Response:
    """`GET /v1/models/{id}`: the model with this name. Raises ModelNotFoundError."""
    state, name = request.app.state, request.path_params["id"]
    return JSONResponse(render_model(state.models.choose(name), state.started, name))


async def chat_completions(request: Request) -> Response:
    """`POST /v1/chat/completions`: replies to messages, whole or streamed."""
    return await _complete(request, parse_chat_completion, ChatChoice)


async def text_completions(request: Request) -> Response:
    """`POST /v1/completions`: continuations of a text, whole or streamed."""
    return await _complete(request, parse_text_completion, TextChoice)


async def _complete(request: Request, parse: Parse, choice: type[Choice]) -> Response:
    state, user = request.app.state, request.user.username
    body = await read_body(request)
    await authenticate(request)  # again: the user may have been removed while the body was on its way
    asked = parse(body, state.models, user)
    completion = Completion(state.responses, asked, choice)
    end_user = {"end_user": asked.end_user} if asked.end_user else {}
    ids = ",".join(completion.response_ids)
    log("completion", response=ids, user=user, request=request.state.request_id, **end_user)
    if asked.stream:
        await completion.wait_started()
        return EventStreamResponse(completion.frames(), completion.cancel)
    async with calls_at_disconnect(completion.cancel, request.receive):
        return await run_in_threadpool(JSONResponse, await completion.result())
