"""The endpoints of conversations."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from models.protocols.conversations import parse_listing, parse_page, parse_title, render_conversation
from models.protocols.documents import create_document
from models.web.request_body import read_body


async def conversations(request: Request) -> Response:
    """`GET /v1/conversations`: a page of the user's conversations."""
    user, listing = request.user.username, parse_listing(request.query_params)
    found, has_more = await request.app.state.conversations.list_page(user, listing)
    return JSONResponse({"data": [render_conversation(one) for one in found], "has_more": has_more})


class ConversationEndpoint(HTTPEndpoint):
    """`/v1/conversations/{id}`: read, rename or delete a conversation."""

    async def get(self, request: Request) -> Response:
        """The conversation with its last items, or those before another one."""
        store, user, id = request.app.state.conversations, request.user.username, request.path_params["id"]
        limit, before = parse_page(request.query_params)
        conversation = await store.find(user, id)
        page = await store.read_page(user, id, limit, before)
        return JSONResponse(render_conversation(conversation, page))

    async def patch(self, request: Request) -> Response:
        """Change the title."""
        title = parse_title(await read_body(request))
        id = request.path_params["id"]
        renamed = await request.app.state.conversations.rename(request.user.username, id, title)
        return JSONResponse(render_conversation(renamed))

    async def delete(self, request: Request) -> Response:
        """Delete the conversation."""
        id = request.path_params["id"]
        await request.app.state.responses.delete_conversation(request.user.username, id)
        return Response(status_code=204)


async def export(request: Request) -> Response:
    """`GET /v1/conversations/{id}/export`: the conversation as a download."""
    store, user, id = request.app.state.conversations, request.user.username, request.path_params["id"]
    document = create_document(await store.find(user, id), request.query_params.get("format", "markdown"))

    async def pieces() -> AsyncIterator[str]:
        yield document.beginning()
        is_first = True
        async for items in store.pages(user, id):
            yield document.piece(items, is_first)
            is_first = False
        yield document.end()

    headers = {"Content-Disposition": f'attachment; filename="{document.name}"'}
    return StreamingResponse(pieces(), headers=headers, media_type=document.media_type)
