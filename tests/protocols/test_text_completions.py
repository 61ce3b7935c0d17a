"""OpenAI's older Completions API; test_completion.py has what is around the choice."""

from __future__ import annotations

import json
from typing import Any

import pytest

from models.chat_request import ChatRequest
from models.errors import APIError
from models.generation.events import OutputDelta, OutputItemAdded
from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.output_item import OutputItem, TokenLogprob
from models.protocols.completion_request import CompletionRequest
from models.protocols.text_completions import TextChoice, parse_text_completion
from models.store.item import Item, Status

MODEL = ModelList([ModelInfo("scripted", 4096, Options())])
ONCE = TokenLogprob(b"Once", -0.5, [(b"Once", -0.5), (b"A", -1.5)])
UPON = TokenLogprob(b" upon", -0.1)


def parse(**values: Any) -> CompletionRequest:
    return parse_text_completion(json.dumps({"model": "scripted", **values}).encode(), MODEL, "ann")


def reply_of(status: Status, reason: str, output: list[OutputItem]) -> Item:
    return Item("resp_1", "assistant", "Once upon", 7.0, status=status, reason=reason, output=output)


def refusal(**values: Any) -> APIError:
    with pytest.raises(APIError) as raised:
        parse(**values)
    return raised.value


def test_a_prompt_is_continued_for_sixteen_tokens() -> None:
    chat = ChatRequest("ann", [], Options(max_output_tokens=16), prompt="Once ", model="scripted")
    assert parse(prompt="Once ") == CompletionRequest(chat, "scripted")
    assert parse(prompt=["Once "]) == parse(prompt="Once ")


def test_what_benchmarks_send_is_accepted() -> None:
    request = parse(
        prompt="Once",
        max_tokens=256,
        max_completion_tokens=256,
        ignore_eos=True,
        stop=None,
        temperature=0,
        seed=7,
        best_of=1,
        echo=False,
        suffix=None,
        logprobs=None,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    options = Options(max_output_tokens=256, temperature=0, seed=7)
    assert request.chat == ChatRequest("ann", [], options, prompt="Once", ignore_eos=True, model="scripted")
    assert (request.stream, request.include_usage, request.continuous_usage) == (True, True, True)


def test_the_probabilities_of_tokens_are_told_on_request() -> None:
    assert [parse(prompt="x", logprobs=count).chat.top_logprobs for count in (None, 0, 5)] == [None, 0, 5]


@pytest.mark.parametrize(
    ("values", "code", "param"),
    [
        ({}, "invalid_value", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": "\ud800"}, "invalid_value", "prompt"),
        ({"prompt": ["a", "b"]}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [1, 2]}, "invalid_value", "prompt"),
        ({"prompt": [[1, 2]]}, "invalid_value", "prompt"),
        ({"prompt": "x", "logprobs": 21}, "invalid_value", "logprobs"),
        ({"prompt": "x", "logprobs": True}, "invalid_value", "logprobs"),
        ({"prompt": "x", "max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"prompt": "x", "echo": True}, "unsupported_parameter", "echo"),
        ({"prompt": "x", "suffix": "end"}, "unsupported_parameter", "suffix"),
        ({"prompt": "x", "best_of": 2}, "unsupported_parameter", "best_of"),
        ({"prompt": "x", "messages": []}, "unknown_parameter", "messages"),
        ({"prompt": "x", "tools": []}, "unknown_parameter", "tools"),
        ({"prompt": "x", "model": "gpt-5"}, "model_not_found", "model"),
    ],
    ids=ascii,
)
def test_a_bad_request_is_refused_with_the_name(values: Any, code: str, param: str) -> None:
    refused = refusal(**values)
    assert (refused.code, refused.param) == (code, param)


def test_a_choice_has_the_whole_text() -> None:
    output = [OutputItem("message", ["Once", " upon"], logprobs=[[ONCE], [UPON]])]
    reply = reply_of(Status.INCOMPLETE, "max_output_tokens", output)
    plain = {"index": 1, "text": "Once upon", "logprobs": None, "finish_reason": "length"}
    assert TextChoice(1, has_logprobs=False).whole(reply) == plain
    assert TextChoice(1, has_logprobs=True).whole(reply) == plain | {
        "logprobs": {
            "tokens": ["Once", " upon"],
            "token_logprobs": [-0.5, -0.1],
            "top_logprobs": [{"Once": -0.5, "A": -1.5}, {}],
            "text_offset": [0, 4],
        }
    }


def test_a_choice_is_streamed_in_pieces() -> None:
    choice = TextChoice(0, has_logprobs=True)
    assert choice.next(OutputItemAdded("resp_1", 0, OutputItem("message"))) is None
    pieces = [choice.next(OutputDelta("resp_1", 0, text, [token])) for text, token in (("Once", ONCE), (" upon", UPON))]
    assert [piece and piece["text"] for piece in pieces] == ["Once", " upon"]
    assert [piece and piece["logprobs"]["text_offset"] for piece in pieces] == [[0], [4]]
    end = choice.last(reply_of(Status.COMPLETED, "stop", []))
    assert (end["text"], end["finish_reason"]) == ("", "stop")
