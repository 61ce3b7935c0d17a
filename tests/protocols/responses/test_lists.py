from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from models.errors import InvalidValueError
from models.output_item import OutputItem
from models.protocols.responses.lists import ListQuery, render_list, render_node, render_nodes
from models.store.item import Item, Status
from tests.support.openai_types import CONVERSATION_ITEM

QUESTION = Item("msg_q", "user", "Hi", 1.0)
REPLY = Item.of_reply(
    "resp_abc",
    2.0,
    [
        OutputItem("reasoning", ["hm"], complete=True),
        OutputItem("function_call", ["{}"], "f", "call_1", complete=True),
        OutputItem("message", ["Hello"], complete=True),
    ],
    status=Status.COMPLETED,
)
PARTS = ["rs_abc_0", "fc_abc_1", "msg_abc_2"]


def ids(page: dict[str, Any]) -> list[str]:
    return [item["id"] for item in page["data"]]


@pytest.mark.parametrize(
    ("parameters", "query"),
    [
        ({}, ListQuery(20, False, None)),
        ({"limit": "1", "order": "asc"}, ListQuery(1, True, None)),
        ({"limit": "100", "order": "desc", "after": "msg_1"}, ListQuery(100, False, "msg_1")),
        ({"include": "message.output_text.logprobs", "before": "msg_1"}, ListQuery(20, False, None)),
    ],
)
def test_a_page_is_parsed_with_the_defaults_of_the_standard(parameters: Mapping[str, str], query: ListQuery) -> None:
    assert ListQuery.parse(parameters) == query


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "101"}, "limit"),
        ({"limit": "1" * 5000}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"order": "ASC"}, "order"),
        ({"after": "\ud800"}, "after"),
    ],
)
def test_a_bad_page_is_refused_by_name(parameters: Mapping[str, str], param: str) -> None:
    with pytest.raises(InvalidValueError) as raised:
        ListQuery.parse(parameters)
    assert raised.value.param == param


def test_a_reply_is_as_many_items_as_it_has_parts() -> None:
    items = render_node(REPLY)
    assert [item["id"] for item in items] == PARTS
    for item in [*items, *render_node(QUESTION)]:
        CONVERSATION_ITEM.validate_python(item)


def test_a_deleted_item_is_none() -> None:
    assert render_node(Item("msg_q", "user", "", 1.0, status=Status.DELETED)) == []


def test_items_come_in_the_order_of_the_page() -> None:
    ascending, descending = ListQuery.parse({"order": "asc"}), ListQuery.parse({})
    assert ids(render_nodes([QUESTION, REPLY], False, ascending)) == ["msg_q", *PARTS]
    assert ids(render_nodes([REPLY, QUESTION], False, descending)) == [*reversed(PARTS), "msg_q"]


@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_pages_behind_each_other_have_each_item_once(ascending: bool, limit: int) -> None:
    nodes = [QUESTION, REPLY] if ascending else [REPLY, QUESTION]
    every = ids(render_nodes(nodes, False, ListQuery(100, ascending, None)))
    seen: list[str] = []
    while True:
        after = seen[-1] if seen else None
        rest = nodes if after is None or (after in PARTS and nodes[0] is REPLY) else nodes[1:]
        if after in PARTS and nodes[0] is QUESTION:
            rest = [REPLY]
        page = render_nodes(rest, False, ListQuery(limit, ascending, after))
        assert len(page["data"]) <= limit
        seen += ids(page)
        if not page["has_more"]:
            break
    assert seen == every


def test_a_page_that_does_not_have_all_nodes_says_so() -> None:
    assert render_nodes([QUESTION], True, ListQuery(20, True, None))["has_more"]
    assert render_nodes([REPLY], False, ListQuery(2, True, None))["has_more"]
    assert not render_nodes([REPLY], False, ListQuery(3, True, None))["has_more"]


def test_a_list_names_its_first_and_its_last_object() -> None:
    assert render_list([{"id": "a"}, {"id": "b"}], True) == {
        "object": "list",
        "data": [{"id": "a"}, {"id": "b"}],
        "first_id": "a",
        "last_id": "b",
        "has_more": True,
    }
    assert (render_list([], False)["first_id"], render_list([], False)["last_id"]) == (None, None)
