"""The endpoints of conversations."""

from __future__ import annotations

import asyncio

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from models.protocols.conversations import parse_listing, parse_title, render_conversation, render_document
from models.store.conversations import Conversation
from models.store.item import Item
from models.web.request_body import read_body


async def conversations(request: Request) -> Response:
    """`GET /v1/conversations`: a page of the user's conversations."""
    user, listing = request.user.username, parse_listing(request.query_params)
    found, has_more = await request.app.state.conversations.list_page(user, listing)
    return JSONResponse({"data": [render_conversation(one) for one in found], "has_more": has_more})


class ConversationEndpoint(HTTPEndpoint):
    """`/v1/conversations/{id}`: read, rename or delete a conversation."""

    async def get(self, request: Request) -> Response:
        """The conversation with its items."""
        conversation, items = await _read(request)
        return JSONResponse(render_conversation(conversation, items))

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
    conversation, items = await _read(request)
    format = request.query_params.get("format", "markdown")
    document = await asyncio.to_thread(render_document, conversation, items, format)
    headers = {"Content-Disposition": f'attachment; filename="{document.name}"'}
    return Response(document.text, headers=headers, media_type=document.media_type)


async def _read(request: Request) -> tuple[Conversation, list[Item]]:
    """The conversation in the path. Raises ConversationNotFoundError."""
    read: tuple[Conversation, list[Item]]
    read = await request.app.state.conversations.read(request.user.username, request.path_params["id"])
    return read
