from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, strategies

from models.messages import Message, Role, ToolCall
from models.output_item import OutputItem, OutputType
from models.store.item import (
    TITLE_LENGTH,
    Item,
    Status,
    count_left_out,
    linked,
    node_id,
    part_id,
    part_index,
    title_of,
    visible_messages,
)
from tests.support.trees import message, reply

SYSTEM = Item("msg_0", "system", "Be brief.", 1.0)
QUESTION = message("msg_1", "How are you?")
ANSWER = reply("resp_1", "I am ", "well.")
CALL: ToolCall = {"id": "call_1", "name": "look", "arguments": '{"at": "it"}'}


def items_of(*roles: Role) -> list[Item]:
    """Items with some roles; the content of each is its index."""
    return [Item(f"msg_{index}", role, str(index), 1.0) for index, role in enumerate(roles)]


def test_each_new_message_gets_an_item_with_its_own_id() -> None:
    items = [Item.of_message({"role": "user", "content": "Hello"}, 1.5) for _ in range(100)]
    assert len({item.id for item in items}) == 100
    assert all(item.id.startswith("msg_") and len(item.id) == 36 for item in items)
    assert all(item == Item(item.id, "user", "Hello", 1.5) and not item.is_reply for item in items)


# Ids


@pytest.mark.parametrize(
    ("type", "index", "id"),
    [("message", 0, "msg_1f_0"), ("reasoning", 1, "rs_1f_1"), ("function_call", 12, "fc_1f_12")],
)
def test_the_id_of_a_part_leads_back_to_its_reply_and_its_index(type: OutputType, index: int, id: str) -> None:
    assert part_id("resp_1f", type, index) == id
    assert (node_id(id), part_index(id)) == ("resp_1f", index)


@pytest.mark.parametrize(
    "id", ["msg_1f", "item_1f", "resp_1f", "item_1f_0", "msg_1f_x", "msg__0", "msg_1f_0\n", "", "msg_1_2_3"]
)
def test_the_id_of_a_node_stays_as_it_is(id: str) -> None:
    assert (node_id(id), part_index(id)) == (id, None)


def test_items_are_linked_below_each_other() -> None:
    nodes = linked([SYSTEM, QUESTION, ANSWER], "resp_0")
    assert [item.parent for item in nodes] == ["resp_0", "msg_0", "msg_1"]
    assert [replace(item, parent=None) for item in nodes] == [SYSTEM, QUESTION, ANSWER]
    assert linked([], None) == []


# Replies


def test_a_reply_has_the_text_of_its_messages_as_content() -> None:
    output = [
        OutputItem("reasoning", ["hm"]),
        OutputItem("message", ["I am ", "well"]),
        OutputItem("function_call", ["{}"], "look", "call_1"),
        OutputItem("message", ["."]),
    ]
    item = Item.of_reply("resp_1", 1.0, output)
    assert (item.content, item.role, item.output, item.is_reply) == ("I am well.", "assistant", output, True)


def test_a_reply_does_not_change_when_its_output_goes_on_growing() -> None:
    part = OutputItem("message", ["a"], logprobs=[[]])
    item = Item.of_reply("resp_1", 1.0, output := [part])
    part.pieces.append("b")
    assert part.logprobs is not None
    part.logprobs.append([])
    output.append(OutputItem("message", ["c"]))
    assert (item.content, item.output) == ("a", [OutputItem("message", ["a"], logprobs=[[]])])


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param({"role": "user", "content": "Hello"}, id="user"),
        pytest.param({"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [CALL]}, id="assistant"),
        pytest.param({"role": "tool", "content": "found", "tool_call_id": "call_1"}, id="tool"),
    ],
)
def test_an_input_message_is_what_was_sent(sent: Message) -> None:
    assert Item.of_message(sent, 1.0).message == sent


def test_the_message_of_a_reply_has_its_text_reasoning_and_calls() -> None:
    output = [
        OutputItem("reasoning", ["h", "m"]),
        OutputItem("message", ["Let me ", "see."]),
        OutputItem("function_call", ['{"at": ', '"it"}'], "look", "call_1"),
    ]
    assert Item.of_reply("resp_1", 1.0, output).message == {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning": "hm",
        "tool_calls": [CALL],
    }


def test_the_message_of_a_reply_leaves_out_what_it_has_not() -> None:
    assert ANSWER.message == {"role": "assistant", "content": "I am well."}
    blank = Item.of_reply("resp_1", 1.0, [OutputItem("function_call"), OutputItem("reasoning")])
    assert blank.message == {"role": "assistant", "content": ""}


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


@pytest.mark.parametrize("count", [0, 2])
def test_the_model_does_not_see_deleted_messages(count: int) -> None:
    items = items_of("system", "user", "assistant", "user", "assistant", "user")
    items[2] = replace(items[2], content="", status=Status.DELETED)
    items[4] = replace(items[4], left_out=count)
    assert [message["content"] for message in visible_messages(items)] == ["0", *["1", "3", "4", "5"][count // 2 :]]


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


def test_a_title_is_empty_without_messages() -> None:
    assert title_of([]) == ""
    assert title_of([replace(QUESTION, status=Status.DELETED)]) == ""
