from __future__ import annotations

import pytest

from models.language.history import calls_as_text, merged, split_turns, without_empty, without_old_reasoning
from models.messages import Message, ToolCall


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str = "", reasoning: str = "", calls: str = "") -> Message:
    """A message of the assistant; `calls` has the ids of its calls."""
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning"] = reasoning
    if calls:
        message["tool_calls"] = [call(call_id) for call_id in calls]
    return message


def call(call_id: str) -> ToolCall:
    return {"id": call_id, "name": "f", "arguments": "{}"}


def result(call_id: str, content: str = "yes") -> Message:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        pytest.param([assistant("", "r"), assistant("t")], [assistant("t", "r")], id="reasoning-text"),
        pytest.param([assistant("t"), assistant(calls="a")], [assistant("t", calls="a")], id="text-call"),
        pytest.param([assistant(calls="a"), assistant(calls="b")], [assistant(calls="ab")], id="parallel-calls"),
        pytest.param(
            [assistant("", "r"), assistant("t"), assistant(calls="a"), assistant(calls="b"), result("a"), result("b")],
            [assistant("t", "r", "ab"), result("a"), result("b")],
            id="all-parts",
        ),
        pytest.param([assistant("", "r"), assistant("", "s")], [assistant("", "r\n\ns")], id="two-thoughts"),
        pytest.param([assistant("t"), assistant("u")], [assistant("t"), assistant("u")], id="two-texts"),
        pytest.param([assistant("t"), assistant("", "r")], [assistant("t"), assistant("", "r")], id="next-thought"),
        pytest.param(
            [assistant(calls="a"), result("a"), assistant("", "r"), assistant("t")],
            [assistant(calls="a"), result("a"), assistant("t", "r")],
            id="after-a-result",
        ),
        pytest.param([user("a"), user("b")], [user("a"), user("b")], id="questions"),
    ],
)
def test_the_parts_of_a_reply_become_one_message(messages: list[Message], expected: list[Message]) -> None:
    before = [dict(message) for message in messages]
    assert merged(messages) == expected
    assert messages == before


def test_a_reply_of_reasoning_alone_is_empty() -> None:
    messages = [user("a"), assistant("", "r"), user("b")]
    assert without_empty(messages) == [user("a\n\nb")]


def test_calls_and_results_without_text_stay() -> None:
    messages = [user("a"), assistant(calls="a"), result("a", "")]
    assert without_empty(messages) == messages


def test_results_are_never_joined() -> None:
    messages = [assistant(calls="ab"), result("a"), assistant(""), result("b")]
    assert without_empty(messages) == [assistant(calls="ab"), result("a"), result("b")]


def test_reasoning_before_the_last_question_is_left_out() -> None:
    messages = [user("a"), assistant("b", "r"), user("c"), assistant("", "s", "a"), result("a")]
    assert without_old_reasoning(messages) == [user("a"), assistant("b"), *messages[2:]]
    assert "reasoning" in messages[1]


def test_calls_and_results_become_text() -> None:
    assert calls_as_text([assistant("Look.", calls="a"), result("a", "sun")]) == [
        assistant('Look.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'),
        user("<tool_response>\nsun\n</tool_response>"),
    ]


@pytest.mark.parametrize(
    ("messages", "sizes"),
    [
        pytest.param([user("a"), assistant("b"), user("c")], [2, 1], id="plain"),
        pytest.param([user("a"), assistant(calls="a"), result("a"), assistant("b"), user("c")], [4, 1], id="call"),
        pytest.param(
            [user("a"), assistant(calls="ab"), result("a"), user("wait"), result("b"), user("c")],
            [5, 1],
            id="question-before-the-result",
        ),
        pytest.param([user("a"), assistant(calls="a"), user("no"), user("c")], [2, 1, 1], id="no-result"),
        pytest.param([user("a"), result("a"), user("b")], [2, 1], id="no-call"),
        pytest.param([result("a"), user("b")], [1, 1], id="result-first"),
    ],
)
def test_a_result_is_in_the_turn_of_its_call(messages: list[Message], sizes: list[int]) -> None:
    system, turns = split_turns([{"role": "system", "content": "s"}, *messages])
    assert len(system) == 1
    assert [len(turn) for turn in turns] == sizes
    assert [message for turn in turns for message in turn] == messages
