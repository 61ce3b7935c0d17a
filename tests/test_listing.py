from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from models.listing import QUERY_CHARACTERS, TITLE_CHARACTERS, Listing, new_title
from models.refused import InvalidValue


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
def test_a_listing_is_what_the_parameters_ask_for_and_the_first_fifty_where_they_do_not(
    parameters: Mapping[str, str], listing: Listing
) -> None:
    assert Listing.of(parameters) == listing


BAD_LIMITS = [
    *[
        "",
        "0",
        "00",
        "01",
        "101",
        "1000",
        "-1",
        "+1",
        " 1",
        "1 ",
        "1.0",
        "1e1",
        "1_0",
        "0x10",
        "fifty",
        "²",
        "٣",
        "\0",
        "1\n",
        "nan",
    ],
    *["1000000000", "0000000501", "9" * 4000, "000000001" + "9" * 4000, "000000001" + "9" * 5000],
]


@pytest.mark.parametrize("limit", BAD_LIMITS, ids=[ascii(limit)[:20] for limit in BAD_LIMITS])
def test_any_other_limit_is_refused_by_name(limit: str) -> None:
    with pytest.raises(InvalidValue, match="limit must be a whole number from 1 to 100") as raised:
        Listing.of({"limit": limit})
    assert (raised.value.type, raised.value.code, raised.value.param) == (
        "invalid_request_error",
        "invalid_value",
        "limit",
    )


def test_every_limit_from_1_to_100_is_good() -> None:
    assert [Listing.of({"limit": str(limit)}).limit for limit in range(1, 101)] == list(range(1, 101))


def test_a_query_may_be_so_long_and_no_longer() -> None:
    assert Listing.of({"query": "广" * QUERY_CHARACTERS}).query == "广" * QUERY_CHARACTERS
    with pytest.raises(InvalidValue, match=f"query may have {QUERY_CHARACTERS} characters") as raised:
        Listing.of({"query": "x" * (QUERY_CHARACTERS + 1)})
    assert (raised.value.code, raised.value.param) == ("invalid_value", "query")


@pytest.mark.parametrize(
    ("body", "title"),
    [
        (b'{"title": "A title"}', "A title"),
        (b'{"title": "  two\\n\\t lines\\u3000"}', "two lines"),
        (b'{"title": "\\u0000"}', "\0"),
        (b'{"title": "\\ud83d\\udc69", "id": "conv_9"}', "👩"),
        ('{"title": "广州"}'.encode("utf-16"), "广州"),
        (json.dumps({"title": "x" * TITLE_CHARACTERS}).encode(), "x" * TITLE_CHARACTERS),
        (json.dumps({"title": " " * 1000 + "x" * TITLE_CHARACTERS}).encode(), "x" * TITLE_CHARACTERS),
    ],
    ids=["plain", "lines", "nul", "pair", "utf-16", "longest", "longest after blanks"],
)
def test_a_title_is_read_from_json_as_one_line(body: bytes, title: str) -> None:
    assert new_title(body) == title


BAD_BODIES = [
    *[
        b"",
        b"title",
        b"{}",
        b"[]",
        b"[1]",
        b"null",
        b"1",
        b'"title"',
        b'{"Title": "a"}',
        b'{"title": "a"',
        b"\xff\xfe\xff",
    ],
    *[b'{"title": ""}', b'{"title": " \\n\\t "}', b'{"title": null}', b'{"title": 1}', b'{"title": ["a"]}'],
    *[b'{"title": {"title": "a"}}', b'{"title": true}', b'{"title": "\\ud800"}', b'{"title": "a\\udfffb"}'],
    *[json.dumps({"title": "x" * (TITLE_CHARACTERS + 1)}).encode(), b'{"title": "a\xff"}', b'{"title": "a\nb"}'],
    *[
        b'{"title": ' * 100_000,
        b"[" * 100_000,
        b'{"title": ' + b"9" * 5000 + b"}",
        b'{"title": NaN}',
        b'{"title": "a"}{}',
    ],
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=[ascii(body)[1:30] for body in BAD_BODIES])
def test_any_other_body_is_refused_with_what_to_send(body: bytes) -> None:
    with pytest.raises(InvalidValue, match=rf'send {{"title": "..."}}, of 1 to {TITLE_CHARACTERS} char') as raised:
        new_title(body)
    assert (raised.value.code, raised.value.param) == ("invalid_value", "title")
