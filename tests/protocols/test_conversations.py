from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from models.errors import APIError, InvalidJSONError, InvalidValueError, UnsupportedParameterError
from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.output_item import OutputItem
from models.protocols.conversations import (
    MAX_NEW_ITEMS,
    MAX_QUERY,
    MAX_TITLE,
    ConversationChange,
    parse_branch,
    parse_change,
    parse_listing,
    parse_new_conversation,
    parse_new_items,
    render_branch,
    render_change,
    render_conversation,
)
from models.protocols.responses.resource import render_response
from models.store.conversations import Conversation, ItemPage, Listing
from models.store.item import Item, Status
from models.store.versions import Version
from tests.support.openai_types import CONVERSATION, CONVERSATION_ITEM, check_response

# Listings


@pytest.mark.parametrize(
    ("parameters", "listing"),
    [
        ({}, Listing(50, None, "")),
        ({"limit": "1"}, Listing(1, None, "")),
        ({"limit": "100"}, Listing(100, None, "")),
        ({"after": "conv_1"}, Listing(50, "conv_1", "")),
        ({"after": ""}, Listing(50, "", "")),
        ({"query": "100% 广州\0"}, Listing(50, None, "100% 广州\0")),
        ({"limit": "7", "after": "conv_1", "query": "a", "order": "asc"}, Listing(7, "conv_1", "a")),
    ],
)
def test_a_listing_is_parsed_with_defaults(parameters: Mapping[str, str], listing: Listing) -> None:
    assert parse_listing(parameters) == listing


# fmt: off
BAD_LIMITS = [
    "", "0", "00", "01", "101", "1000", "-1", "+1", " 1", "1 ", "1.0", "1e1", "1_0", "0x10", "fifty", "²", "٣", "\0",
    "1\n", "nan", "1000000000", "0000000501", "9" * 4000, "000000001" + "9" * 4000, "000000001" + "9" * 5000,
]
# fmt: on


@pytest.mark.parametrize("limit", BAD_LIMITS, ids=[ascii(limit)[:20] for limit in BAD_LIMITS])
def test_a_bad_limit_is_refused(limit: str) -> None:
    with pytest.raises(InvalidValueError, match="limit must be a whole number from 1 to 100") as raised:
        parse_listing({"limit": limit})
    with pytest.raises(InvalidValueError, match="limit must be a whole number from 1 to 100"):
        parse_branch({"limit": limit})
    assert (raised.value.type, raised.value.code, raised.value.param) == (
        "invalid_request_error",
        "invalid_value",
        "limit",
    )


def test_every_limit_from_1_to_100_is_allowed() -> None:
    assert [parse_listing({"limit": str(limit)}).limit for limit in range(1, 101)] == list(range(1, 101))


def test_a_page_of_the_branch_is_parsed_with_defaults() -> None:
    assert parse_branch({}) == (100, None)
    assert parse_branch({"limit": "7", "before": "item_1", "query": "a"}) == (7, "item_1")


def test_a_query_has_256_characters_at_most() -> None:
    assert parse_listing({"query": "广" * 256}).query == "广" * MAX_QUERY
    with pytest.raises(InvalidValueError, match="query must be at most 256 characters") as raised:
        parse_listing({"query": "x" * (MAX_QUERY + 1)})
    assert (raised.value.code, raised.value.param) == ("invalid_value", "query")


# Changes


@pytest.mark.parametrize(
    ("body", "title"),
    [
        (b'{"title": "A title"}', "A title"),
        (b'{"title": "  two\\n\\t lines\\u3000"}', "two lines"),
        (b'{"title": "\\u0000"}', "\0"),
        (b'{"title": "\\ud83d\\udc69"}', "👩"),
        (json.dumps({"title": "x" * MAX_TITLE}).encode(), "x" * MAX_TITLE),
        (json.dumps({"title": " " * 1000 + "x" * MAX_TITLE}).encode(), "x" * MAX_TITLE),
    ],
    ids=["plain", "lines", "nul", "surrogate pair", "longest", "longest after blanks"],
)
def test_a_title_is_read_from_json_as_one_line(body: bytes, title: str) -> None:
    assert parse_change(body) == ConversationChange(title)


# fmt: off
BAD_TITLES = [
    b'{"title": ""}', b'{"title": " \\n\\t "}', b'{"title": 1}', b'{"title": ["a"]}',
    b'{"title": {"title": "a"}}', b'{"title": true}', b'{"title": "\\ud800"}', b'{"title": "a\\udfffb"}',
    json.dumps({"title": "x" * (MAX_TITLE + 1)}).encode(),
]
NO_OBJECTS = [
    b"", b"title", b"[]", b"[1]", b"null", b"1", b'"title"', b'{"title": "a"', b"\xff\xfe\xff", b'{"title": "a\xff"}',
    b'{"title": "a\nb"}', b'{"title": ' * 100_000, b"[" * 100_000, b'{"title": ' + b"9" * 5000 + b"}",
    b'{"title": NaN}', b'{"title": "a"}{}', '{"title": "a"}'.encode("utf-16"),
]
# fmt: on


def start_of(body: bytes) -> str:
    return ascii(body)[1:30]


@pytest.mark.parametrize("body", BAD_TITLES, ids=start_of)
def test_a_bad_title_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidValueError, match=f"title must be text of 1 to {MAX_TITLE} characters") as raised:
        parse_change(body)
    assert (raised.value.code, raised.value.param) == ("invalid_value", "title")


@pytest.mark.parametrize("body", NO_OBJECTS, ids=start_of)
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJSONError, match="the body is "):
        parse_change(body)


def test_what_is_absent_or_null_does_not_change() -> None:
    assert parse_change(b"{}") == ConversationChange()
    assert parse_change(b'{"title": null, "metadata": null, "leaf": null}') == ConversationChange()
    change = parse_change(b'{"metadata": {"a": "b"}, "leaf": "msg_1"}')
    assert change == ConversationChange(None, {"a": "b"}, "msg_1")


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"Title": "a"}, "Title"),
        ({"title": "a", "id": "conv_1"}, "id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"leaf": ""}, "leaf"),
        ({"leaf": "x" * 257}, "leaf"),
        ({"x" * 5000: 1}, "x" * 64),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_change_is_refused_by_name(values: Any, param: str) -> None:
    with pytest.raises(APIError) as raised:
        parse_change(json.dumps(values).encode())
    assert (raised.value.status, raised.value.param) == (400, param)


def test_a_lone_surrogate_in_a_name_is_told_without_it() -> None:
    with pytest.raises(UnsupportedParameterError, match=r"there is no parameter \?"):
        parse_change(b'{"title": "a", "\\ud800": 1}')


# New conversations and items

ITEM = {"type": "message", "role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}


@pytest.mark.parametrize("body", [b"", b" ", b"{}", b'{"items": null, "metadata": null}', b'{"items": []}'])
def test_a_new_conversation_needs_nothing(body: bytes) -> None:
    assert parse_new_conversation(body) == (ConversationChange(), [])


def test_a_new_conversation_may_have_items_metadata_and_a_title() -> None:
    body = json.dumps({"items": [ITEM, CALL], "metadata": {"a": "b"}, "title": "A  title"}).encode()
    change, messages = parse_new_conversation(body)
    assert change == ConversationChange("A title", {"a": "b"})
    assert messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "name": "f", "arguments": "{}"}]},
    ]


def test_items_are_added_as_they_come() -> None:
    assert (
        parse_new_items(json.dumps({"items": [ITEM] * MAX_NEW_ITEMS}).encode())
        == [{"role": "user", "content": "Hi"}] * MAX_NEW_ITEMS
    )


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ({}, "items"),
        ("Hi", "items"),
        (7, "items"),
        ([ITEM] * (MAX_NEW_ITEMS + 1), "items"),
        ([ITEM, {"type": "item_reference", "id": "msg_1"}], "items[1]"),
        ([{"type": "mcp_call"}], "items[0]"),
        ([ITEM | {"role": "x"}], "items[0].role"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_items_are_refused_with_their_place(items: Any, param: str) -> None:
    body = json.dumps({"items": items}).encode()
    for parse in (parse_new_items, parse_new_conversation):
        if not items and parse is parse_new_conversation:
            continue
        with pytest.raises(APIError) as raised:
            parse(body)
        assert (raised.value.status, raised.value.param) == (400, param)


def test_items_must_be_there_to_be_added() -> None:
    for body in (b"{}", b'{"items": []}', b'{"items": null}'):
        with pytest.raises(InvalidValueError, match="items must be a list of 1 to 20 items"):
            parse_new_items(body)


def test_a_new_conversation_has_no_leaf_but_its_last_item() -> None:
    with pytest.raises(UnsupportedParameterError, match="leaf is not supported here"):
        parse_new_conversation(b'{"leaf": "msg_1"}')


# Rendering

MODEL = ModelList([ModelInfo("tiny", 4096, Options())])
CONVERSATION_1 = Conversation("conv_1", "A *title*", 1.5, 2.5, "resp_1", {"a": "b"})
USAGE = {"input_tokens": 3, "cached_tokens": 0, "output_tokens": 2, "reasoning_tokens": 0, "total_tokens": 5}
MESSAGE = Item("msg_1", "user", "广州?", 1.5)
REPLY = Item.of_reply(
    "resp_1",
    7.0,
    [OutputItem("message", ["Hi"], complete=True)],
    status=Status.COMPLETED,
    reason="stop",
    usage=USAGE,
    options={"seed": 1},
    left_out=4,
    ended=9.0,
    decode_seconds=0.5,
)


def test_a_conversation_is_that_of_the_standard_with_what_the_page_shows() -> None:
    rendered = render_conversation(CONVERSATION_1)
    CONVERSATION.validate_python(rendered)
    assert rendered == {
        "id": "conv_1",
        "object": "conversation",
        "created_at": 1,
        "metadata": {"a": "b"},
        "title": "A *title*",
        "updated_at": 2.5,
        "leaf": "resp_1",
        "response_id": None,
    }
    assert render_conversation(replace(CONVERSATION_1, response_id="resp_1"))["response_id"] == "resp_1"


def test_a_change_is_told_with_the_whole_conversation_and_a_deletion_as_it_is_answered() -> None:
    updated, deleted = render_change("conv_1", CONVERSATION_1), render_change("conv_1", None)
    assert updated == {"type": "parley.conversation.updated", "conversation": render_conversation(CONVERSATION_1)}
    gone = {"id": "conv_1", "object": "conversation.deleted", "deleted": True}
    assert deleted == {"type": "parley.conversation.deleted", "conversation": gone}


def test_a_branch_has_input_items_and_whole_responses() -> None:
    versions = {"msg_1": Version(1, 1, None, None), "resp_1": Version(2, 3, "resp_0", "resp_3")}
    rendered = render_branch(MODEL, CONVERSATION_1, ItemPage([MESSAGE, REPLY], 7, versions))
    message, response = rendered["data"]
    assert (rendered["id"], rendered["earlier"]) == ("conv_1", 7)
    CONVERSATION_ITEM.validate_python(message)
    assert (message["id"], message["created_at"], message["content"][0]["text"]) == ("msg_1", 1, "广州?")
    check_response(response)
    parley = response.pop("parley")
    assert response == render_response(MODEL, "conv_1", REPLY)
    expected = {"parent": None, "reason": "stop", "options": {"seed": 1}, "left_out": 4, "decode_seconds": 0.5}
    assert parley == expected | {"versions": {"number": 2, "count": 3, "older": "resp_0", "newer": "resp_3"}}
    only = {"number": 1, "count": 1, "older": None, "newer": None}
    assert message["parley"] == {"parent": None, "versions": only}
    assert render_branch(MODEL, CONVERSATION_1, ItemPage([], 0, {}))["data"] == []
