"""A reply as a choice of Chat Completions; test_completion.py has what is around the choice."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from models.generation.events import OutputDelta, OutputItemAdded
from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.output_item import OutputItem, TokenLogprob
from models.protocols.chat_completions import ChatChoice, render_model
from models.store.item import Item, Status
from models.validation import Json

MODEL = ModelList([ModelInfo("scripted", 4096, Options())])
YES = TokenLogprob(b"yes", -0.5, [(b"yes", -0.5), (b"no", -1.5)])
HALF = TokenLogprob(b"\xf0\x9f", -9999.0, [(b"a", -9999.0)])


def reply_of(*output: OutputItem, reason: str = "stop") -> Item:
    """A reply with these parts."""
    status = Status.COMPLETED if reason == "stop" else Status.INCOMPLETE
    text = "".join(item.text for item in output if item.type == "message")
    return Item("resp_1", "assistant", text, 7.0, status=status, reason=reason, output=output)


def call(name: str, *pieces: str, id: str = "call_1") -> OutputItem:
    return OutputItem("function_call", [*pieces], name, id)


def whole(*output: OutputItem, reason: str = "stop", has_logprobs: bool = False) -> Json:
    return ChatChoice(0, has_logprobs).whole(reply_of(*output, reason=reason))


def choices_of(*output: OutputItem, reason: str = "stop", has_logprobs: bool = False) -> list[Json]:
    """The choices of all chunks, when the parts come in their pieces."""
    choice = ChatChoice(0, has_logprobs)
    choices: list[Json | None] = [choice.first()]
    for index, item in enumerate(output):
        empty = OutputItem(item.type, [], item.name, item.call_id)
        choices.append(choice.next(OutputItemAdded("resp_1", index, empty)))
        for number, piece in enumerate(item.pieces):
            logprobs = item.logprobs[number] if item.logprobs else None
            choices.append(choice.next(OutputDelta("resp_1", index, piece, logprobs)))
    choices.append(choice.last(reply_of(*output, reason=reason)))
    assert {one["index"] for one in choices if one} == {0}
    return [one for one in choices if one]


def deltas(choices: Sequence[Json]) -> list[Json]:
    """The deltas between the role and the finish reason, which are the first and the last."""
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {}
    assert [one["finish_reason"] for one in choices[:-1]] == [None] * (len(choices) - 1)
    return [one["delta"] for one in choices[1:-1]]


TEXT = OutputItem("message", ["all ", "of it"])
THOUGHT = OutputItem("reasoning", ["Hm", "m."])


def test_a_text_is_the_content_of_a_message() -> None:
    assert json.dumps(whole(TEXT)) == json.dumps(
        {
            "index": 0,
            "message": {"role": "assistant", "content": "all of it", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    )


def test_a_text_is_streamed_in_its_pieces() -> None:
    choices = choices_of(TEXT)
    assert deltas(choices) == [{"content": "all "}, {"content": "of it"}]
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


def test_a_reply_without_any_part_has_an_empty_content() -> None:
    assert whole()["message"] == {"role": "assistant", "content": "", "refusal": None}
    assert deltas(choices_of()) == []


def test_reasoning_is_apart_from_the_content() -> None:
    assert whole(THOUGHT, TEXT)["message"] == {
        "role": "assistant",
        "content": "all of it",
        "refusal": None,
        "reasoning_content": "Hmm.",
    }
    assert deltas(choices_of(THOUGHT, TEXT)) == [
        {"reasoning_content": "Hm"},
        {"reasoning_content": "m."},
        {"content": "all "},
        {"content": "of it"},
    ]


def test_calls_of_tools_have_ids_names_and_arguments() -> None:
    parts = (call("weather", '{"city": ', '"Paris"}'), call("time", "{}", id="call_2"))
    choice = whole(*parts)
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
            {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
        ],
    }
    assert choice["finish_reason"] == "tool_calls"


def test_a_call_is_streamed_name_first_then_its_arguments() -> None:
    parts = (THOUGHT, TEXT, call("weather", '{"city": ', '"Paris"}'), call("time", "{}", id="call_2"))
    choices = choices_of(*parts)
    first: Json = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    second: Json = {"index": 1, "id": "call_2", "type": "function", "function": {"name": "time", "arguments": ""}}
    assert deltas(choices)[4:] == [
        {"tool_calls": [first]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
        {"tool_calls": [second]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
    ]
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_text_beside_a_call_stays() -> None:
    assert whole(TEXT, call("time", "{}"))["message"]["content"] == "all of it"


@pytest.mark.parametrize("reason", ["max_output_tokens", "context_length"])
def test_a_reply_that_is_cut_off_in_a_call_has_the_reason_of_that(reason: str) -> None:
    parts = (call("weather", '{"ci'),)
    assert whole(*parts, reason=reason)["finish_reason"] == "length"
    assert choices_of(*parts, reason=reason)[-1]["finish_reason"] == "length"


# Probabilities

RENDERED = {
    "token": "yes",
    "logprob": -0.5,
    "bytes": [121, 101, 115],
    "top_logprobs": [
        {"token": "yes", "logprob": -0.5, "bytes": [121, 101, 115]},
        {"token": "no", "logprob": -1.5, "bytes": [110, 111]},
    ],
}
RENDERED_HALF = {
    "token": "\ufffd",
    "logprob": -9999.0,
    "bytes": [0xF0, 0x9F],
    "top_logprobs": [{"token": "a", "logprob": -9999.0, "bytes": [97]}],
}


def test_the_tokens_of_the_text_have_their_probabilities() -> None:
    text = OutputItem("message", ["yes", "?"], logprobs=[[YES], [HALF, YES]])
    choice = whole(THOUGHT, text, has_logprobs=True)
    assert choice["logprobs"] == {"content": [RENDERED, RENDERED_HALF, RENDERED], "refusal": None}
    json.dumps(choice, allow_nan=False)
    streamed = choices_of(THOUGHT, text, has_logprobs=True)
    assert [one["logprobs"] for one in streamed] == [
        None,
        None,
        None,
        {"content": [RENDERED], "refusal": None},
        {"content": [RENDERED_HALF, RENDERED], "refusal": None},
        None,
    ]


def test_a_reply_without_text_has_no_tokens_with_probabilities() -> None:
    assert whole(call("time", "{}"), has_logprobs=True)["logprobs"] == {"content": [], "refusal": None}


# Models


def test_a_model_is_listed_with_its_context() -> None:
    assert list(render_model(MODEL.default, 7).items()) == [
        ("id", "scripted"),
        ("object", "model"),
        ("created", 7),
        ("owned_by", "parley"),
        ("max_model_len", 4096),
    ]
    assert render_model(MODEL.default, 7, "gpt-4o") == render_model(MODEL.default, 7) | {"id": "gpt-4o"}
