"""The endpoints of the Responses API."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from models.errors import ResponseNotFoundError
from models.ops.logs import log
from models.protocols.responses.input_items import resolve
from models.protocols.responses.lists import ListQuery, render_nodes
from models.protocols.responses.request import ResponsesRequest
from models.protocols.responses.resource import render_response
from models.protocols.responses.retrieval import Retrieval
from models.protocols.responses.stream import ResponseResult, ResponseStream
from models.validation import parse_object
from models.web.authentication import authenticate
from models.web.event_stream import EventStreamResponse, calls_at_disconnect
from models.web.request_body import read_body


async def create(request: Request) -> Response:
    """`POST /v1/responses`: a response, whole, streamed, or in the background."""
    state, user = request.app.state, request.user.username
    body = await read_body(request)
    await authenticate(request)  # again: the user may have been removed while the body was on its way
    asked = ResponsesRequest.parse(parse_object(body, "the body"), state.models)
    messages = await resolve(asked.input, partial(state.responses.find_message, user))
    listener = ResponseStream(state.models) if asked.stream else ResponseResult(state.models)
    wanted = asked.response_request(user, messages)
    state.responses.create(wanted, listener)
    end_user = {"end_user": asked.end_user} if asked.end_user else {}
    log("response", response=wanted.id, user=user, request=request.state.request_id, **end_user)
    abandon = partial(state.responses.abandon, user, wanted.id)
    if isinstance(listener, ResponseStream):
        await listener.wait_accepted()
        leave = partial(_leave, request, listener)
        return EventStreamResponse(listener.frames(), leave if asked.store else abandon)  # a stored one can be resumed
    if asked.background:
        return JSONResponse(await listener.created())
    async with calls_at_disconnect(abandon, request.receive):
        return await run_in_threadpool(JSONResponse, await listener.finished())


def _leave(request: Request, stream: ResponseStream) -> None:
    """The client of a stream has disconnected; the response goes on for a while."""
    request.app.state.responses.leave(stream)
    stream.close()


class ResponseEndpoint(HTTPEndpoint):
    """`/v1/responses/{id}`: read, follow or delete a response."""

    async def get(self, request: Request) -> Response:
        """The response as far as it is, or its events after a number, past and future ones."""
        state, user, id = request.app.state, request.user.username, request.path_params["id"]
        retrieval = Retrieval.parse(request.query_params)
        conversation, reply = await state.responses.find(user, id)
        if not retrieval.stream:
            return JSONResponse(render_response(state.models, conversation, reply))
        stream = ResponseStream(state.models, retrieval.starting_after)
        frames = stream.followed(state.responses.follow(user, id, stream))
        return EventStreamResponse(frames, partial(_leave, request, stream))

    async def delete(self, request: Request) -> Response:
        """Delete the response."""
        id = request.path_params["id"]
        await request.app.state.responses.delete(request.user.username, id)
        return JSONResponse({"id": id, "object": "response", "deleted": True})


async def cancel(request: Request) -> Response:
    """`POST /v1/responses/{id}/cancel`: end a response, and return it."""
    state, user, id = request.app.state, request.user.username, request.path_params["id"]
    with suppress(ResponseNotFoundError):  # it may have ended already
        await state.responses.cancel(user, id)
    await state.responses.wait_ended(user, id)
    return JSONResponse(render_response(state.models, *await state.responses.find(user, id)))


async def input_items(request: Request) -> Response:
    """`GET /v1/responses/{id}/input_items`: a page of the items of its request."""
    query = ListQuery.parse(request.query_params)
    store, user, id = request.app.state.conversations, request.user.username, request.path_params["id"]
    nodes, has_more = await store.input_items_of(user, id, query.limit, query.after, query.ascending)
    return JSONResponse(render_nodes(nodes, has_more, query))
