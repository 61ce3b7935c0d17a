from __future__ import annotations

import json

import pytest

from models.errors import InvalidValueError
from models.protocols.conversations import render_conversation, render_item
from models.protocols.documents import Document, create_document
from models.store.conversations import Conversation
from models.store.item import Item, Status

CONVERSATION = Conversation("conv_1", "A *title*", 1.0, 2.0)
MESSAGE = Item("item_1", "user", '广州?\u2028\x1f"', 1.5)
REPLY = Item(
    "resp_1", "assistant", "Hi", 7.0, Status.COMPLETED, "stop", {"total_tokens": 5}, {"seed": 1}, 4, "1 1", 0.5
)
RENDERED = {**render_conversation(CONVERSATION), "items": [render_item(MESSAGE), render_item(REPLY)]}


def text_of(document: Document, *pieces: list[Item]) -> str:
    """The whole document, with its items in pieces."""
    parts = [document.piece(items, number == 0) for number, items in enumerate(pieces)]
    return "".join([document.beginning(), *parts, document.end()])


@pytest.mark.parametrize("pieces", [[[MESSAGE, REPLY]], [[MESSAGE], [REPLY]]], ids=["one piece", "two pieces"])
def test_a_json_document_is_the_conversation_with_its_items(pieces: list[list[Item]]) -> None:
    document = create_document(CONVERSATION, "json")
    assert (document.name, document.media_type) == ("conv_1.json", "application/json")
    text = text_of(document, *pieces)
    assert json.loads(text) == RENDERED
    assert "广州" in text
    assert json.loads(text_of(document))["items"] == []


@pytest.mark.parametrize("pieces", [[[MESSAGE, REPLY]], [[MESSAGE], [REPLY]]], ids=["one piece", "two pieces"])
def test_a_markdown_document_has_a_paragraph_for_each_message(pieces: list[list[Item]]) -> None:
    document = create_document(CONVERSATION, "markdown")
    assert (document.name, document.media_type) == ("conv_1.md", "text/markdown")
    assert text_of(document, *pieces) == f"# A *title*\n\n**User**\n\n{MESSAGE.content}\n\n**Assistant**\n\nHi\n"


@pytest.mark.parametrize("format", ["", "pdf", "JSON"])
def test_another_document_format_is_refused(format: str) -> None:
    with pytest.raises(InvalidValueError) as raised:
        create_document(CONVERSATION, format)
    assert (raised.value.code, raised.value.param) == ("invalid_value", "format")
