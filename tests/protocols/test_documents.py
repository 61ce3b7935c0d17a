from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import pytest

from models.errors import InvalidValueError
from models.output_item import OutputItem
from models.protocols.conversations import render_conversation
from models.protocols.documents import Document, create_document
from models.protocols.responses.lists import render_node
from models.store.branches import Fork
from models.store.conversations import Conversation, Placed
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
RENDERED = {
    **render_conversation(CONVERSATION),
    "items": [*render_node(MESSAGE), *render_node(REPLY)],
    "branches": [],
}


PIECES = [[[MESSAGE, REPLY, DELETED]], [[MESSAGE], [REPLY]], [[DELETED], [MESSAGE], [DELETED], [REPLY]]]


def text_of(document: Document, *pieces: list[Item]) -> str:
    """The whole document, with its items in pieces."""
    return whole(document, [[Placed(item) for item in piece] for piece in pieces])


def whole(document: Document, pieces: Iterable[Sequence[Placed]]) -> str:
    return "".join([document.beginning(), *map(document.piece, pieces), document.end()])


@pytest.mark.parametrize("pieces", PIECES, ids=["one piece", "two pieces", "a piece of nothing"])
def test_a_json_document_is_the_conversation_with_its_items(pieces: list[list[Item]]) -> None:
    document = create_document(CONVERSATION, "json")
    assert (document.name, document.media_type) == ("conv_1.json", "application/json")
    text = text_of(document, *pieces)
    assert json.loads(text) == RENDERED
    assert "广州" in text
    assert json.loads(text_of(create_document(CONVERSATION, "json")))["items"] == []


@pytest.mark.parametrize("pieces", PIECES, ids=["one piece", "two pieces", "a piece of nothing"])
def test_a_markdown_document_has_a_paragraph_for_each_message(pieces: list[list[Item]]) -> None:
    document = create_document(CONVERSATION, "markdown")
    assert (document.name, document.media_type) == ("conv_1.md", "text/markdown")
    assert text_of(document, *pieces) == f"# A *title*\n\n**User**\n\n{MESSAGE.content}\n\n**Assistant**\n\nHi\n"


def said(id: str, text: str, parent: str | None, fork: Fork | None = None) -> Placed:
    """A message in its place."""
    return Placed(Item(id, "user", text, 1.0, parent), fork)


# The reply says nothing, so that it has no item.
BRANCHES = [
    said("msg_1", "One", None),
    Placed(Item.of_reply("resp_abc", 1.0, [], parent="msg_1", status=Status.CANCELLED)),
    said("msg_2", "Two\nlines", "resp_abc"),
    said("msg_3", "Three", "resp_abc", Fork("resp_abc", "msg_2")),
    said("msg_4", "Four", "msg_3"),
    said("msg_5", "Five", "msg_2", Fork("msg_2", None)),
    said("msg_6", "Six", None, Fork(None, "msg_1")),
    Placed(Item("msg_7", "user", "", 1.0, None, status=Status.DELETED), Fork(None, "msg_1")),
    said("msg_8", "Eight", None, Fork(None, None)),
    said("msg_9", "Nine", "resp_abc", Fork("msg_1", "resp_abc")),
]


def in_pieces(size: int) -> list[list[Placed]]:
    return [BRANCHES[start : start + size] for start in range(0, len(BRANCHES), size)]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_json_document_has_the_other_branches_and_where_they_begin(size: int) -> None:
    document = json.loads(whole(create_document(CONVERSATION, "json"), in_pieces(size)))
    assert [item["id"] for item in document["items"]] == ["msg_1", "msg_2"]
    branches = [(branch["after"], [item["id"] for item in branch["items"]]) for branch in document["branches"]]
    assert branches == [
        ("msg_1", ["msg_3", "msg_4"]),
        ("msg_2", ["msg_5"]),
        (None, ["msg_6"]),
        (None, ["msg_8"]),
        ("msg_1", ["msg_9"]),
    ]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_markdown_document_says_what_each_other_branch_replaces(size: int) -> None:
    text = whole(create_document(CONVERSATION, "markdown"), in_pieces(size))
    lines = [line for line in text.splitlines() if line and line != "**User**"]
    assert lines == [
        "# A *title*",
        *["One", "Two", "lines"],
        *["## Instead of “Two lines”", "Three", "Four"],
        *["## After “Two lines”", "Five"],
        *["## Instead of “One”", "Six"],
        *["## Another branch", "Eight"],
        *["## Instead of a message without text", "Nine"],
    ]


@pytest.mark.parametrize("format", ["", "pdf", "JSON"])
def test_another_document_format_is_refused(format: str) -> None:
    with pytest.raises(InvalidValueError) as raised:
        create_document(CONVERSATION, format)
    assert (raised.value.code, raised.value.param) == ("invalid_value", "format")
