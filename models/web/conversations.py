"""The endpoints of conversations."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from models.protocols.conversations import (
    parse_branch,
    parse_change,
    parse_listing,
    parse_new_conversation,
    parse_new_items,
    render_branch,
    render_conversation,
    render_deleted,
)
from models.protocols.documents import create_document
from models.protocols.responses.lists import ListQuery, render_list, render_node, render_nodes
from models.store.item import Item
from models.store.storage_limits import MAX_PAGE
from models.web.request_body import read_body


class ConversationsEndpoint(HTTPEndpoint):
    """`/v1/conversations`: list conversations, or begin one."""

    async def get(self, request: Request) -> Response:
        """A page of the user's conversations."""
        user, listing = request.user.username, parse_listing(request.query_params)
        found, has_more = await request.app.state.conversations.list_page(user, listing)
        return JSONResponse(render_list([render_conversation(one) for one in found], has_more))

    async def post(self, request: Request) -> Response:
        """A new conversation, empty or with some items."""
        change, messages = parse_new_conversation(await read_body(request))
        items = [Item.of_message(message, time.time()) for message in messages]
        state, user = request.app.state, request.user.username
        conversation = await state.conversations.create(user, items, change.metadata, change.title)
        state.feed.changed(user, conversation.id)
        return JSONResponse(render_conversation(conversation))


class ConversationEndpoint(HTTPEndpoint):
    """`/v1/conversations/{id}`: read, change or delete a conversation."""

    async def get(self, request: Request) -> Response:
        """The conversation, without its items."""
        id = request.path_params["id"]
        return JSONResponse(render_conversation(await request.app.state.conversations.find(request.user.username, id)))

    async def post(self, request: Request) -> Response:
        """Change the title, the metadata, or which branch is the current one."""
        change = parse_change(await read_body(request))
        state, user, id = request.app.state, request.user.username, request.path_params["id"]
        if change.leaf is not None:  # it may be refused, so it comes before what is not
            await state.responses.set_leaf(user, id, change.leaf)
        if change.title is None and change.metadata is None:
            return JSONResponse(render_conversation(await state.conversations.find(user, id)))
        conversation = await state.conversations.update(user, id, change.title, change.metadata)
        state.feed.changed(user, id)
        return JSONResponse(render_conversation(conversation))

    async def delete(self, request: Request) -> Response:
        """Delete the conversation."""
        id = request.path_params["id"]
        await request.app.state.responses.delete_conversation(request.user.username, id)
        return JSONResponse(render_deleted(id))


class ItemsEndpoint(HTTPEndpoint):
    """`/v1/conversations/{id}/items`: list the items of the current branch, or add some."""

    async def get(self, request: Request) -> Response:
        """A page of the items."""
        query = ListQuery.parse(request.query_params)
        store, user, id = request.app.state.conversations, request.user.username, request.path_params["id"]
        nodes, has_more = await store.list_items(user, id, query.limit, query.after, query.ascending)
        page = render_nodes(nodes, has_more, query)
        while has_more and not page["data"]:  # replies that say nothing have no items
            nodes, has_more = await store.list_items(user, id, MAX_PAGE, nodes[-1].id, query.ascending)
            page = render_nodes(nodes, has_more, query)
        return JSONResponse(page)

    async def post(self, request: Request) -> Response:
        """Add items at the end."""
        messages = parse_new_items(await read_body(request))
        items = [Item.of_message(message, time.time()) for message in messages]
        state, user, id = request.app.state, request.user.username, request.path_params["id"]
        added = await state.conversations.append_items(user, id, items)
        state.feed.changed(user, id)
        return JSONResponse(render_list([one for item in added for one in render_node(item)], False))


class ItemEndpoint(HTTPEndpoint):
    """`/v1/conversations/{id}/items/{item}`: read or delete an item."""

    async def get(self, request: Request) -> Response:
        """The item."""
        store, user, place = request.app.state.conversations, request.user.username, request.path_params
        node = await store.find_item(user, place["id"], place["item"])
        return JSONResponse(next(one for one in render_node(node) if one["id"] == place["item"]))

    async def delete(self, request: Request) -> Response:
        """Delete its text; what comes after it stays."""
        state, user, place = request.app.state, request.user.username, request.path_params
        await state.conversations.delete_item(user, place["id"], place["item"])
        state.feed.changed(user, place["id"])
        return JSONResponse(render_conversation(await state.conversations.find(user, place["id"])))


async def branch(request: Request) -> Response:
    """`GET /v1/conversations/{id}/branch`: the last turns of the current branch, or those before another one."""
    state, user, id = request.app.state, request.user.username, request.path_params["id"]
    limit, before = parse_branch(request.query_params)
    conversation = await state.conversations.find(user, id)
    page = await state.conversations.read_page(user, id, limit, before)
    return JSONResponse(render_branch(state.models, conversation, page))


async def export(request: Request) -> Response:
    """`GET /v1/conversations/{id}/export`: the conversation as a download."""
    store, user, id = request.app.state.conversations, request.user.username, request.path_params["id"]
    document = create_document(await store.find(user, id), request.query_params.get("format", "markdown"))
    pages = store.pages(user, id)
    first = await anext(pages, None)  # before the status is sent: the database may be away

    async def pieces() -> AsyncIterator[str]:
        yield document.beginning()
        if first is not None:
            yield document.piece(first)
        async for items in pages:
            yield document.piece(items)
        yield document.end()

    headers = {"Content-Disposition": f'attachment; filename="{document.name}"'}
    return StreamingResponse(pieces(), headers=headers, media_type=document.media_type)
