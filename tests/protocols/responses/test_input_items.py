from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from models.errors import InvalidRequestError, InvalidValueError, UnsupportedParameterError
from models.messages import MAX_MESSAGES, Message
from models.protocols.responses.input_items import MAX_REFERRED, ItemReference, parse_input, render_message, resolve
from tests.support.openai_types import CONVERSATION_ITEM, RESPONSE_ITEM

CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"a": 1}'}
CALL_MESSAGE = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call_1", "name": "f", "arguments": '{"a": 1}'}],
}


def text(type: str, value: str) -> dict[str, str]:
    return {"type": type, "text": value}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"type": "message", "role": "system", "content": "Hi"}, {"role": "system", "content": "Hi"}),
        ({"role": "developer", "content": "Hi"}, {"role": "system", "content": "Hi"}),
        ({"role": "assistant", "content": [text("output_text", "Hi")]}, {"role": "assistant", "content": "Hi"}),
        (
            {"role": "user", "content": [text("input_text", "Hi"), text("text", "you")]},
            {"role": "user", "content": "Hi\nyou"},
        ),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "assistant", "content": "No."},
        ),
        (CALL, CALL_MESSAGE),
        (CALL | {"id": "fc_1", "status": "completed", "namespace": "x"}, CALL_MESSAGE),
        (
            {"type": "function_call_output", "call_id": "call_1", "output": "7"},
            {"role": "tool", "content": "7", "tool_call_id": "call_1"},
        ),
        (
            {"type": "function_call_output", "call_id": "call_1", "output": [text("input_text", "7")]},
            {"role": "tool", "content": "7", "tool_call_id": "call_1"},
        ),
        (
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [text("reasoning_text", "hm")]},
            {"role": "assistant", "content": "", "reasoning": "hm"},
        ),
        (
            {"type": "reasoning", "summary": [text("summary_text", "hm")], "encrypted_content": None},
            {"role": "assistant", "content": "", "reasoning": "hm"},
        ),
        (
            {"type": "reasoning", "summary": None, "content": None, "encrypted_content": "gAAA"},
            {"role": "assistant", "content": "", "reasoning": ""},
        ),
    ],
)
def test_an_item_is_a_message(item: Any, message: Message) -> None:
    assert parse_input([item]) == [message]


def test_a_text_is_a_message_of_the_user() -> None:
    assert parse_input("Hi") == [{"role": "user", "content": "Hi"}]


def test_a_reference_stands_for_a_stored_item() -> None:
    assert parse_input([{"type": "item_reference", "id": "msg_1"}]) == [ItemReference("msg_1", "input[0]")]


@pytest.mark.parametrize(
    "extra",
    [
        {"name": "ann"},
        {"status": "completed", "id": "msg_1"},
        {"phase": "final_answer"},
        {"cache_control": {"type": "ephemeral"}},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_fields_that_clients_add_to_a_message_are_ignored(extra: dict[str, Any]) -> None:
    assert parse_input([{"role": "user", "content": "Hi"} | extra]) == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (7, "input"),
        ({}, "input"),
        ("\ud800", "input"),
        ([7], "input[0]"),
        ([{"role": "user"}], "input[0].content"),
        ([{"role": "tool", "content": "7"}], "input[0].role"),
        ([{"role": ["user"], "content": "7"}], "input[0].role"),
        ([{"role": "user", "content": 7}], "input[0].content"),
        ([{"role": "user", "content": "\udfff"}], "input[0].content"),
        ([{"role": "user", "content": ["Hi"]}], "input[0].content"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        ([{"role": "user", "content": [text("input_text", "Hi"), {"text": "you"}]}], "input[0].content[1].type"),
        ([{"type": 7}], "input[0].type"),
        ([CALL | {"call_id": ""}], "input[0].call_id"),
        ([CALL | {"call_id": "x" * 257}], "input[0].call_id"),
        ([CALL | {"name": ""}], "input[0].name"),
        ([CALL | {"arguments": {}}], "input[0].arguments"),
        ([{"type": "function_call_output", "call_id": "call_1"}], "input[0].output"),
        ([{"type": "reasoning", "summary": "hm"}], "input[0].summary"),
        ([{"type": "item_reference"}], "input[0].id"),
        ([{"role": "user", "content": "Hi"}] * (MAX_MESSAGES + 1), "input"),
        ([{"role": "user", "content": [text("input_text", "Hi")] * (MAX_MESSAGES + 1)}], "input[0].content"),
    ],
)
def test_a_bad_item_is_refused_with_its_place(value: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse_input(value)
    assert raised.value.param == param
    assert str(raised.value).startswith(param)
    str(raised.value).encode()


@pytest.mark.parametrize(
    ("item", "param", "named"),
    [
        (
            {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
            "input[0].content[0]",
            "input_image",
        ),
        ({"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}, "input[0].content[0]", "input_file"),
        (
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]},
            "input[0].output[0]",
            "input_image",
        ),
        ({"type": "web_search_call", "id": "x"}, "input[0]", "web_search_call"),
        ({"type": "custom_tool_call", "call_id": "x"}, "input[0]", "custom_tool_call"),
        ({"type": "compaction", "encrypted_content": "x"}, "input[0]", "compaction"),
    ],
)
def test_what_the_server_cannot_read_is_refused_by_name(item: Any, param: str, named: str) -> None:
    with pytest.raises(UnsupportedParameterError, match=named) as raised:
        parse_input([item])
    assert raised.value.param == param


def test_errors_name_the_parameter_that_holds_the_items() -> None:
    with pytest.raises(InvalidValueError, match=r"items\[0\]\.role"):
        parse_input([{"role": "x", "content": ""}], "items")


MESSAGES: list[Message] = [
    {"role": "user", "content": "Hi"},
    {"role": "system", "content": ""},
    {"role": "assistant", "content": "Hi"},
    {"role": "assistant", "content": "", "reasoning": "hm"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "name": "f", "arguments": "{}"}]},
    {"role": "tool", "content": "7", "tool_call_id": "call_1"},
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_rendered_item_is_one_of_the_standard_and_is_read_back_as_the_same_message(message: Message) -> None:
    item = render_message("msg_1", message)
    assert CONVERSATION_ITEM.validate_python(item).id == "msg_1"
    if message["role"] != "assistant":
        RESPONSE_ITEM.validate_python(item)
    assert parse_input([item]) == [message]


ROLES = st.sampled_from(["user", "system", "developer", "assistant"])
PARTS = st.lists(st.builds(text, st.sampled_from(["input_text", "output_text"]), st.text()), max_size=4)


@given(role=ROLES, content=st.text() | PARTS)
def test_any_text_of_a_message_comes_to_the_letter(role: str, content: Any) -> None:
    (message,) = parse_input([{"role": role, "content": content}])
    whole = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    assert isinstance(message, dict)
    assert message["content"] == whole


class Stored:
    """Stored items, each of which is a text of `length` characters. Counts how often one is read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.reads = 0

    async def find(self, id: str) -> Message:
        self.reads += 1
        return {"role": "user", "content": id[0] * self.length}


def references(*ids: str) -> list[ItemReference]:
    return [ItemReference(id, f"input[{index}]") for index, id in enumerate(ids)]


@pytest.mark.anyio
async def test_an_item_that_is_referred_to_twice_is_read_once() -> None:
    stored = Stored(2)
    messages = await resolve(references("a", "b", "a"), stored.find)
    assert ([message["content"] for message in messages], stored.reads) == (["aa", "bb", "aa"], 2)


@pytest.mark.anyio
async def test_references_have_no_more_text_than_a_request_could_have() -> None:
    stored = Stored(MAX_REFERRED // 2)
    assert len(await resolve(references("a", "b"), stored.find)) == 2
    for ids in (("a", "b", "c"), ("a", "a", "a")):
        with pytest.raises(InvalidValueError, match=r"input\[2\] must refer to items that have at most") as raised:
            await resolve(references(*ids), stored.find)
        assert raised.value.param == "input[2]"
