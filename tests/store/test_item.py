from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, strategies

from models.errors import ItemNotFoundError
from models.messages import Role
from models.store.item import TITLE_LENGTH, Edge, Item, Status, count_left_out, items_up_to, title_of, visible_messages

SYSTEM = Item("item_0", "system", "Be brief.", 1.0)
QUESTION = Item("item_1", "user", "How are you?", 2.0)
ANSWER = Item(
    "resp_1",
    "assistant",
    "I am well.",
    3.0,
    Status.COMPLETED,
    "stop",
    {"total_tokens": 9},
    {"seed": 7},
    1,
    "2 3 5",
    0.5,
)


def items_of(*roles: Role) -> list[Item]:
    """Items with some roles; the content of each is its index."""
    return [Item(f"item_{index}", role, str(index), 1.0) for index, role in enumerate(roles)]


def test_each_new_message_gets_an_item_with_its_own_id() -> None:
    items = [Item.of_message({"role": "user", "content": "Hello"}, 1.5) for _ in range(100)]
    assert len({item.id for item in items}) == 100
    assert all(item.id.startswith("item_") and len(item.id) == 37 for item in items)
    assert all(item == Item(item.id, "user", "Hello", 1.5) and item.status is None for item in items)


# Deltas


@given(strategies.lists(strategies.text(min_size=1)))
def test_deltas_can_be_restored_from_the_content_and_their_lengths(deltas: list[str]) -> None:
    item = replace(ANSWER, content="".join(deltas), cuts=" ".join(str(len(delta)) for delta in deltas))
    assert item.deltas == deltas
    assert item.sequence_number == len(deltas)


@pytest.mark.parametrize("cuts", [pytest.param(None, id="message"), pytest.param("", id="empty-reply")])
def test_an_item_without_cuts_has_no_deltas(cuts: str | None) -> None:
    item = replace(ANSWER, cuts=cuts)
    assert (item.deltas, item.sequence_number) == ([], 0)


# Items up to one of them


@pytest.mark.parametrize(
    ("after", "count"),
    [
        pytest.param(Edge.START, 0, id="start"),
        pytest.param("item_0", 1, id="first"),
        pytest.param("item_1", 2, id="second"),
        pytest.param("item_2", 3, id="last"),
        pytest.param(Edge.END, 3, id="end"),
    ],
)
def test_the_items_up_to_an_item_include_it(after: str | Edge, count: int) -> None:
    items = items_of("system", "user", "assistant")
    assert list(items_up_to(items, after)) == items[:count]


@pytest.mark.parametrize("id", ["item_3", "", "None", "ITEM_0", "item_", "0", "none", "start", "end"])
def test_an_unknown_item_id_is_refused(id: str) -> None:
    with pytest.raises(ItemNotFoundError, match="no such item") as raised:
        items_up_to(items_of("system", "user", "assistant"), id)
    error = raised.value
    assert (error.type, error.code, error.param, error.status) == (
        "invalid_request_error",
        "item_not_found",
        "after",
        404,
    )


@pytest.mark.parametrize("edge", [Edge.START, Edge.END], ids=["start", "end"])
def test_an_empty_conversation_has_no_items_up_to_an_edge(edge: Edge) -> None:
    assert list(items_up_to([], edge)) == []


def test_an_empty_conversation_has_no_item_to_name() -> None:
    with pytest.raises(ItemNotFoundError):
        items_up_to([], "item_0")


# What the model sees


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([], 0), ([None], 0), ([0], 0), ([2, None], 2), ([2, None, 4, None], 4), ([4, 2], 2), ([3, 0], 0)],
    ids=str,
)
def test_the_last_reply_says_how_many_messages_are_left_out(counts: list[int | None], expected: int) -> None:
    assert count_left_out([replace(ANSWER, left_out=count) for count in counts]) == expected


def test_a_message_for_the_model_has_a_role_and_content_only() -> None:
    assert visible_messages([SYSTEM, QUESTION, replace(ANSWER, left_out=0)]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "I am well."},
    ]


@pytest.mark.parametrize(
    ("count", "visible"),
    [
        (None, ["0", "1", "2", "3", "4", "5", "6"]),
        (0, ["0", "1", "2", "3", "4", "5", "6"]),
        (1, ["0", "2", "3", "4", "5", "6"]),
        (2, ["0", "4", "5", "6"]),  # a system message right after the cut would count as the system prompt
        (3, ["0", "4", "5", "6"]),
        (5, ["0", "6"]),
        (9, ["0"]),
    ],
    ids=["none", "0", "1", "2", "3", "5", "more-than-there-are"],
)
def test_the_oldest_messages_are_left_out_but_never_the_system_prompt(count: int | None, visible: list[str]) -> None:
    items = items_of("system", "user", "assistant", "system", "user", "assistant", "user")
    items[5] = replace(items[5], left_out=count)
    assert [message["content"] for message in visible_messages(items)] == visible


def test_an_empty_conversation_has_no_messages() -> None:
    assert visible_messages([]) == []


# Titles


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param("Hello", "Hello", id="short"),
        pytest.param("  two\n\n\tlines \u3000 of  it ", "two lines of it", id="blanks"),
        pytest.param("x" * TITLE_LENGTH, "x" * TITLE_LENGTH, id="longest"),
        pytest.param("x" * (TITLE_LENGTH + 1), "x" * TITLE_LENGTH + "…", id="long-word"),
        pytest.param("word " * 12, ("word " * 12).strip(), id="longest-words"),
        pytest.param("word " * 13, ("word " * 11) + "word…", id="many-words"),
        pytest.param("广" * 100, "广" * TITLE_LENGTH + "…", id="chinese"),
        pytest.param("a " + "x" * 100, "a…", id="short-word-and-long-word"),
        pytest.param("", "", id="empty"),
        pytest.param(" \n ", "", id="blank"),
    ],
)
def test_a_title_is_one_line_that_ends_with_a_whole_word(content: str, expected: str) -> None:
    assert title_of([Item("item_1", "user", content, 1.0)]) == expected


@given(strategies.text(max_size=200))
def test_a_title_is_a_short_beginning_of_the_text(content: str) -> None:
    title = title_of([Item("item_1", "user", content, 1.0)])
    line = " ".join(content.split())
    assert len(title) <= TITLE_LENGTH + 1
    assert title == line or line.startswith(title.removesuffix("…"))
    assert (title == line) == (len(line) <= TITLE_LENGTH)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["user"], "0"),
        (["system", "user", "assistant", "user"], "1"),
        (["assistant", "user"], "1"),
        (["system", "assistant"], "0"),
    ],
    ids="-".join,
)
def test_a_title_comes_from_the_first_user_message_else_from_the_first_item(roles: list[Role], expected: str) -> None:
    assert title_of(items_of(*roles)) == expected
