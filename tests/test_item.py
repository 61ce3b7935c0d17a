from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies

from models.item import TITLE_LENGTH, Item, ItemNotFound, Role, left_out, messages, title, up_to

SYSTEM = Item("item_0", "system", "Be brief.", 1.0)
QUESTION = Item("item_1", "user", "How are you?", 2.0)
ANSWER = Item(
    "resp_1", "assistant", "I am well.", 3.0, "completed", "stop", {"total_tokens": 9}, {"seed": 7}, 1, "2 3 5", 0.5
)


def talk(*roles: Role) -> list[Item]:
    """Items of roles, which say how many came before."""
    return [Item(f"item_{place}", role, str(place), 1.0) for place, role in enumerate(roles)]


def contents(items: list[Item]) -> list[str]:
    return [message["content"] for message in messages(items)]


def test_what_was_said_becomes_an_item_with_an_id_of_its_own_that_is_no_reply() -> None:
    items = [Item.said({"role": "user", "content": "Hello"}, 1.5) for _ in range(100)]
    assert len({item.id for item in items}) == 100
    assert all(item.id.startswith("item_") and len(item.id) == 37 for item in items)
    assert all(item == Item(item.id, "user", "Hello", 1.5) and item.status is None for item in items)


# Deltas


@given(strategies.lists(strategies.text(min_size=1)))
def test_any_deltas_come_back_from_the_content_and_their_lengths(deltas: list[str]) -> None:
    item = replace(ANSWER, content="".join(deltas), cuts=" ".join(str(len(delta)) for delta in deltas))
    assert item.deltas == deltas
    assert item.sequence_number == len(deltas)


@pytest.mark.parametrize("cuts", [None, ""])
def test_an_item_that_did_not_come_in_pieces_has_none(cuts: str | None) -> None:
    item = replace(ANSWER, cuts=cuts)
    assert (item.deltas, item.sequence_number) == ([], 0)


# What JSON has of an item


def test_a_message_shows_who_said_what_and_when_and_nothing_else() -> None:
    assert QUESTION.public() == {"id": "item_1", "role": "user", "content": "How are you?", "created": 2.0}


def test_a_reply_shows_what_became_of_it_too_but_not_where_it_was_cut() -> None:
    assert json.loads(json.dumps(ANSWER.public())) == {
        "id": "resp_1",
        "role": "assistant",
        "content": "I am well.",
        "created": 3.0,
        "status": "completed",
        "status_details": {"reason": "stop"},
        "usage": {"total_tokens": 9},
        "options": {"seed": 7},
        "left_out": 1,
        "sequence_number": 3,
        "decode_seconds": 0.5,
    }


@pytest.mark.parametrize("status", ["in_progress", "completed", "incomplete", "cancelled", "failed"])
def test_any_status_makes_a_reply(status: Any) -> None:
    public = Item("resp_1", "assistant", "", 1.0, status).public()
    assert (public["status"], public["status_details"], public["sequence_number"]) == (status, {"reason": None}, 0)


# Up to where


@pytest.mark.parametrize(("id", "count"), [("none", 0), ("item_0", 1), ("item_1", 2), ("item_2", 3)])
def test_the_items_up_to_one_end_with_it(id: str, count: int) -> None:
    items = talk("system", "user", "assistant")
    assert list(up_to(items, id)) == items[:count]


@pytest.mark.parametrize("id", ["item_3", "", "None", "ITEM_0", "item_", "0"])
def test_an_id_that_no_item_has_is_refused_by_name(id: str) -> None:
    with pytest.raises(ItemNotFound, match="no such item") as raised:
        up_to(talk("system", "user", "assistant"), id)
    assert (raised.value.type, raised.value.code) == ("invalid_request_error", "item_not_found")
    assert raised.value.param == "response.after"


def test_of_no_items_there_are_none_before_the_first_and_no_other_place() -> None:
    assert list(up_to([], "none")) == []
    with pytest.raises(ItemNotFound):
        up_to([], "item_0")


# What the model sees


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([], 0), ([None], 0), ([0], 0), ([2, None], 2), ([2, None, 4, None], 4), ([4, 2], 2), ([3, 0], 0)],
)
def test_as_many_are_left_out_as_the_last_reply_says(counts: list[int | None], expected: int) -> None:
    assert left_out([replace(ANSWER, left_out=count) for count in counts]) == expected


def test_messages_have_role_and_content_only() -> None:
    assert messages([SYSTEM, QUESTION, replace(ANSWER, left_out=0)]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "I am well."},
    ]


@pytest.mark.parametrize(
    ("unseen", "seen"),
    [
        (None, ["0", "1", "2", "3", "4", "5", "6"]),
        (0, ["0", "1", "2", "3", "4", "5", "6"]),
        (1, ["0", "2", "3", "4", "5", "6"]),
        (2, ["0", "4", "5", "6"]),  # a word of the system's at the cut would pass for its prompt
        (3, ["0", "4", "5", "6"]),
        (5, ["0", "6"]),
        (9, ["0"]),
    ],
)
def test_the_oldest_messages_are_left_out_and_the_system_prompt_neither_left_out_nor_counted(
    unseen: int | None, seen: list[str]
) -> None:
    items = talk("system", "user", "assistant", "system", "user", "assistant", "user")
    items[5] = replace(items[5], left_out=unseen)
    assert contents(items) == seen


def test_no_items_are_no_messages() -> None:
    assert messages([]) == []


# Titles


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Hello", "Hello"),
        ("  two\n\n\tlines \u3000 of  it ", "two lines of it"),
        ("x" * TITLE_LENGTH, "x" * TITLE_LENGTH),
        ("x" * (TITLE_LENGTH + 1), "x" * TITLE_LENGTH + "…"),
        ("word " * 12, ("word " * 12).strip()),
        ("word " * 13, ("word " * 11) + "word…"),
        ("广" * 100, "广" * TITLE_LENGTH + "…"),
        ("a " + "x" * 100, "a…"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_a_title_is_one_line_of_whole_words_or_a_long_words_beginning(content: str, expected: str) -> None:
    assert title([Item("item_1", "user", content, 1.0)]) == expected


@given(strategies.text(max_size=200))
def test_a_title_is_never_longer_than_it_may_be_and_begins_as_the_text_does(content: str) -> None:
    made = title([Item("item_1", "user", content, 1.0)])
    line = " ".join(content.split())
    assert len(made) <= TITLE_LENGTH + 1
    assert made == line or line.startswith(made.removesuffix("…"))
    assert (made == line) == (len(line) <= TITLE_LENGTH)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["user"], "0"),
        (["system", "user", "assistant", "user"], "1"),
        (["assistant", "user"], "1"),
        (["system", "assistant"], "0"),
    ],
)
def test_a_title_comes_from_what_the_user_said_first_or_else_from_the_first_item(
    roles: list[Role], expected: str
) -> None:
    assert title(talk(*roles)) == expected
