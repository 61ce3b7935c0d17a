from __future__ import annotations

import json

import pytest

from models.errors import InvalidValueError
from models.output_item import OutputItem
from models.protocols.conversations import render_conversation
from models.protocols.documents import Document, create_document
from models.protocols.responses.lists import render_node
from models.store.conversations import Conversation
from models.store.item import Item, Status

CONVERSATION = Conversation("conv_1", "A *title*", 1.0, 2.0)
MESSAGE = Item("msg_1", "user", '广州?\u2028\x1f"', 1.5)
REPLY = Item.of_reply(
    "resp_abc",
    7.0,
    [
        OutputItem("reasoning", ["hm"], complete=True),
        OutputItem("function_call", ["{}"], "f", "call_1", complete=True),
        OutputItem("message", ["H", "i"], complete=True),
    ],
    status=Status.COMPLETED,
)
DELETED = Item("msg_2", "user", "", 8.0, status=Status.DELETED)
RENDERED = {**render_conversation(CONVERSATION), "items": [*render_node(MESSAGE), *render_node(REPLY)]}


PIECES = [[[MESSAGE, REPLY, DELETED]], [[MESSAGE], [REPLY]], [[DELETED], [MESSAGE], [DELETED], [REPLY]]]


def text_of(document: Document, *pieces: list[Item]) -> str:
    """The whole document, with its items in pieces."""
    return "".join([document.beginning(), *map(document.piece, pieces), document.end()])


@pytest.mark.parametrize("pieces", PIECES, ids=["one piece", "two pieces", "a piece of nothing"])
def test_a_json_document_is_the_conversation_with_its_items(pieces: list[list[Item]]) -> None:
    document = create_document(CONVERSATION, "json")
    assert (document.name, document.media_type) == ("conv_1.json", "application/json")
    text = text_of(document, *pieces)
    assert json.loads(text) == RENDERED
    assert "广州" in text
    assert json.loads(text_of(document))["items"] == []


@pytest.mark.parametrize("pieces", PIECES, ids=["one piece", "two pieces", "a piece of nothing"])
def test_a_markdown_document_has_a_paragraph_for_each_message(pieces: list[list[Item]]) -> None:
    document = create_document(CONVERSATION, "markdown")
    assert (document.name, document.media_type) == ("conv_1.md", "text/markdown")
    assert text_of(document, *pieces) == f"# A *title*\n\n**User**\n\n{MESSAGE.content}\n\n**Assistant**\n\nHi\n"


@pytest.mark.parametrize("format", ["", "pdf", "JSON"])
def test_another_document_format_is_refused(format: str) -> None:
    with pytest.raises(InvalidValueError) as raised:
        create_document(CONVERSATION, format)
    assert (raised.value.code, raised.value.param) == ("invalid_value", "format")
