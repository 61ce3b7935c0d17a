from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from models.errors import InvalidJSONError, InvalidValueError, MissingFieldError
from models.protocols.conversations import (
    MAX_QUERY,
    MAX_TITLE,
    parse_listing,
    parse_page,
    parse_title,
    render_conversation,
    render_item,
)
from models.store.conversations import Conversation, ItemPage, Listing
from models.store.item import Item, Status

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
        parse_page({"limit": limit})
    assert (raised.value.type, raised.value.code, raised.value.param) == (
        "invalid_request_error",
        "invalid_value",
        "limit",
    )


def test_every_limit_from_1_to_100_is_allowed() -> None:
    assert [parse_listing({"limit": str(limit)}).limit for limit in range(1, 101)] == list(range(1, 101))


def test_a_page_of_items_is_parsed_with_defaults() -> None:
    assert parse_page({}) == (100, None)
    assert parse_page({"limit": "7", "before": "item_1", "query": "a"}) == (7, "item_1")


def test_a_query_has_256_characters_at_most() -> None:
    assert parse_listing({"query": "广" * 256}).query == "广" * MAX_QUERY
    with pytest.raises(InvalidValueError, match="query must be at most 256 characters") as raised:
        parse_listing({"query": "x" * (MAX_QUERY + 1)})
    assert (raised.value.code, raised.value.param) == ("invalid_value", "query")


# Titles


@pytest.mark.parametrize(
    ("body", "title"),
    [
        (b'{"title": "A title"}', "A title"),
        (b'{"title": "  two\\n\\t lines\\u3000"}', "two lines"),
        (b'{"title": "\\u0000"}', "\0"),
        (b'{"title": "\\ud83d\\udc69", "id": "conv_9"}', "👩"),
        (b'{"title": "a", "\\ud800": 1}', "a"),
        (json.dumps({"title": "x" * MAX_TITLE}).encode(), "x" * MAX_TITLE),
        (json.dumps({"title": " " * 1000 + "x" * MAX_TITLE}).encode(), "x" * MAX_TITLE),
    ],
    ids=["plain", "lines", "nul", "surrogate pair", "other field", "longest", "longest after blanks"],
)
def test_a_title_is_read_from_json_as_one_line(body: bytes, title: str) -> None:
    assert parse_title(body) == title


# fmt: off
BAD_TITLES = [
    b'{"title": ""}', b'{"title": " \\n\\t "}', b'{"title": null}', b'{"title": 1}', b'{"title": ["a"]}',
    b'{"title": {"title": "a"}}', b'{"title": true}', b'{"title": "\\ud800"}', b'{"title": "a\\udfffb"}',
    json.dumps({"title": "x" * (MAX_TITLE + 1)}).encode(),
]
NO_TITLES = [b"{}", b'{"Title": "a"}']
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
        parse_title(body)
    assert (raised.value.code, raised.value.param) == ("invalid_value", "title")


@pytest.mark.parametrize("body", NO_TITLES, ids=start_of)
def test_a_body_without_a_title_is_refused(body: bytes) -> None:
    with pytest.raises(MissingFieldError, match="title is missing"):
        parse_title(body)


@pytest.mark.parametrize("body", NO_OBJECTS, ids=start_of)
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJSONError, match="the body is "):
        parse_title(body)


# Conversations and items

CONVERSATION = Conversation("conv_1", "A *title*", 1.0, 2.0)
USAGE = {"input_tokens": 3, "cached_tokens": 0, "output_tokens": 2, "total_tokens": 5}
MESSAGE = Item("item_1", "user", "广州?", 1.5)
REPLY = Item("resp_1", "assistant", "Hi", 7.0, Status.COMPLETED, "stop", USAGE, {"seed": 1}, 4, "1 1", 0.5)
RENDERED_MESSAGE = {"id": "item_1", "role": "user", "content": "广州?", "created": 1.5}
RENDERED_REPLY = {
    "id": "resp_1",
    "role": "assistant",
    "content": "Hi",
    "created": 7.0,
    "status": "completed",
    "status_details": {"reason": "stop"},
    "usage": USAGE,
    "options": {"seed": 1},
    "left_out": 4,
    "sequence_number": 2,
    "decode_seconds": 0.5,
}
RENDERED_CONVERSATION = {"id": "conv_1", "title": "A *title*", "created": 1.0, "updated": 2.0}


def test_an_item_has_the_fields_of_its_kind_in_order() -> None:
    assert json.dumps(render_item(MESSAGE)) == json.dumps(RENDERED_MESSAGE)
    assert json.dumps(render_item(REPLY)) == json.dumps(RENDERED_REPLY)


def test_a_conversation_has_its_items_where_they_are_given() -> None:
    assert json.dumps(render_conversation(CONVERSATION)) == json.dumps(RENDERED_CONVERSATION)
    whole = {**RENDERED_CONVERSATION, "items": [RENDERED_MESSAGE, RENDERED_REPLY], "earlier": 7}
    assert json.dumps(render_conversation(CONVERSATION, ItemPage([MESSAGE, REPLY], 7))) == json.dumps(whole)
    assert render_conversation(CONVERSATION, ItemPage([], 0))["items"] == []
