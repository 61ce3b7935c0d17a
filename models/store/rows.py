"""How an item is a row of the database: its columns, and the long texts that the items of a conversation share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import RowMapping, Select, delete, func, insert, select, union, update
from sqlalchemy.ext.asyncio import AsyncConnection

from models.errors import ItemNotFoundError
from models.store.database import conversations_table, items_table, texts_table
from models.store.item import Item, Status, linked
from models.store.stored_output import decode_joined, decode_output, encode_output

CONVERSATION, ITEM, TEXT = conversations_table.c, items_table.c, texts_table.c

SAME = ("id", "role", "content", "created", "status", "reason", "usage", "left_out", "previous", "ended")
GROWING = ("content", "status", "reason", "details", "usage", "left_out", "output", "ended", "decode_seconds", "bytes")
TEXTS = ("content", "output", "bytes")  # what changes if a part of a reply is deleted
DETAILS = ("images", "reasoning", "tool_calls", "tool_call_id", "failure")
BLANK = {  # what is left of a deleted item
    "content": "",
    "details": None,
    "status": Status.DELETED,
    "reason": None,
    "usage": None,
    "options": None,
    "previous": None,
    "instructions": None,
    "request": None,
    "bytes": 0,
    "owner": None,
}


async def read_items(connection: AsyncConnection, chosen: Select[Any]) -> list[Item]:
    """The items that a selection of rows of the table finds."""
    rows = (await connection.execute(chosen)).mappings().all()
    texts = await _texts(connection, rows)
    requests = {row["request"]: json.loads(texts[row["request"]]) for row in rows if row["request"]}
    items = []
    for row in rows:
        item = replace(_item(row, decode_output), request=requests.get(row["request"]))
        if row["instructions"]:
            item = replace(item, options={"instructions": texts[row["instructions"]], **(item.options or {})})
        items.append(item)
    return items


async def read_messages(connection: AsyncConnection, chosen: Select[Any]) -> list[Item]:
    """The same items with what a prompt needs: each part of a reply in one piece, no instructions and no request."""
    return [_item(row, decode_joined) for row in (await connection.execute(chosen)).mappings()]


def growing_columns(reply: Item) -> dict[str, Any]:
    """What changes in the row of a reply while it grows, and when it ends."""
    row = _row(reply)
    return {name: row[name] for name in GROWING}


async def insert_items(
    connection: AsyncConnection, conversation: str, parent: str | None, items: Sequence[Item], owner: str
) -> None:
    """Insert items below one of the conversation, and the texts that it has not had yet.

    The owner is that of replies; the other items are their input. Raises ItemNotFoundError if the parent is not there.
    """
    depth = 0
    if parent is not None:
        place = select(ITEM.depth).where(ITEM.id == parent, ITEM.conversation_id == conversation)
        above = (await connection.execute(place)).scalar_one_or_none()
        if above is None:
            raise ItemNotFoundError
        depth = above + 1
    rows = []
    for index, item in enumerate(linked(items, parent)):
        options = dict(item.options or {})
        instructions = options.pop("instructions", None)
        request = None if item.request is None else json.dumps(item.request, separators=(",", ":"))
        rows.append(
            _row(item)
            | {"conversation_id": conversation, "parent": item.parent, "depth": depth + index}
            | {"options": None if item.options is None else options}
            | {"instructions": await _insert_text(connection, conversation, instructions)}
            | {"request": await _insert_text(connection, conversation, request)}
            | {"inputs": index if item.is_reply else None, "owner": owner if item.is_reply else None}
        )
    if rows:
        await connection.execute(insert(items_table), rows)


async def delete_unused_texts(connection: AsyncConnection, conversation: str) -> None:
    """Delete the texts that no item of a conversation has any more."""
    used = union(*(_ids_of_texts(column, conversation) for column in (ITEM.instructions, ITEM.request)))
    unused = delete(texts_table).where(TEXT.conversation_id == conversation, TEXT.id.not_in(used))
    await connection.execute(unused)


async def count_bytes(connection: AsyncConnection, conversations: Sequence[str]) -> None:
    """Count the bytes of conversations again."""
    sums = [
        select(func.coalesce(func.sum(counted.c.bytes), 0))
        .where(counted.c.conversation_id == CONVERSATION.id)
        .scalar_subquery()
        for counted in (items_table, texts_table)
    ]
    changed = update(conversations_table).where(CONVERSATION.id.in_(conversations))
    await connection.execute(changed.values(bytes=sums[0] + sums[1]))


def _row(item: Item) -> dict[str, Any]:
    """The columns of an item, but not its place, its owner and the texts that it shares."""
    details = {name: value for name in DETAILS if (value := getattr(item, name)) is not None}
    # The probabilities of a growing reply come at its end: they are a hundred times as long as its text.
    output = encode_output(item.output, item.status is not Status.IN_PROGRESS) if item.is_reply else None
    size = len(item.content.encode()) + len((output or "").encode()) + (len(json.dumps(details)) if details else 0)
    return {name: getattr(item, name) for name in SAME} | {
        "details": details or None,
        "output": output,
        "decode_seconds": item.decode_seconds,
        "bytes": size,
    }


def _item(row: RowMapping, decode: Callable[[str, str], Sequence[Any]]) -> Item:
    """An item without the texts that it shares."""
    return Item(
        **{name: row[name] for name in SAME},
        **(row["details"] or {}),
        parent=row["parent"],
        options=row["options"],
        output=decode(row["output"], row["content"]) if row["output"] else (),
        decode_seconds=row["decode_seconds"],
    )


async def _texts(connection: AsyncConnection, rows: Sequence[RowMapping]) -> Mapping[str, str]:
    """The texts of some rows, by their ids: each one once, since many rows may share a long one."""
    ids = {id for row in rows for id in (row["instructions"], row["request"]) if id}
    if not ids:
        return {}
    conversations = {row["conversation_id"] for row in rows}
    chosen = select(TEXT.id, TEXT.text).where(TEXT.conversation_id.in_(conversations), TEXT.id.in_(ids))
    return {id: text for id, text in await connection.execute(chosen)}


async def _insert_text(connection: AsyncConnection, conversation: str, text: str | None) -> str | None:
    """Insert a text, unless the conversation has it already. Returns its id."""
    if not text:
        return None
    encoded = text.encode()
    id = hashlib.sha256(encoded).hexdigest()
    known = select(TEXT.id).where(TEXT.conversation_id == conversation, TEXT.id == id)
    if (await connection.execute(known)).first() is None:
        row = {"conversation_id": conversation, "id": id, "text": text, "bytes": len(encoded)}
        await connection.execute(insert(texts_table), row)
    return id


def _ids_of_texts(column: Any, conversation: str) -> Select[Any]:
    return select(column).where(ITEM.conversation_id == conversation, column.is_not(None))
