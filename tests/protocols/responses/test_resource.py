from __future__ import annotations

import json
from typing import Any

import pytest

from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.output_item import OutputItem, TokenLogprob
from models.protocols.responses.resource import render_output, render_response
from models.store.item import Item, Status
from models.validation import Json
from tests.support.openai_types import CONVERSATION_ITEM, RESPONSE_ITEM, check_response

MODEL = ModelList([ModelInfo("tiny", 4096, Options(temperature=0.5, instructions="Be brief."))])
USAGE = {"input_tokens": 9, "cached_tokens": 4, "output_tokens": 5, "reasoning_tokens": 3, "total_tokens": 14}
OUTPUT = [
    OutputItem("reasoning", ["Let", " me"], complete=True),
    OutputItem("function_call", ['{"a"', ": 1}"], "f", "call_1", complete=True),
    OutputItem("message", ["Hi", "!"], complete=True),
]


def reply(status: Status = Status.COMPLETED, reason: str | None = "stop", **fields: Any) -> Item:
    """A reply that has ended, with other fields if they are given."""
    fields = Json({"output": OUTPUT, "usage": USAGE, "ended": 12.75, "options": {}, "left_out": 0} | fields)
    return Item.of_reply("resp_abc", 7.25, status=status, reason=reason, **fields)


def test_a_completed_response_has_all_fields_of_the_standard() -> None:
    rendered = render_response(MODEL, "conv_1", reply(previous="resp_0"))
    parsed = check_response(rendered)
    assert json.loads(json.dumps(rendered)) == rendered
    assert (parsed.id, parsed.object, parsed.status, parsed.model) == ("resp_abc", "response", "completed", "tiny")
    assert (rendered["created_at"], rendered["completed_at"]) == (7, 12)
    assert (parsed.error, parsed.incomplete_details) == (None, None)
    assert (parsed.previous_response_id, parsed.conversation.id) == ("resp_0", "conv_1")
    assert parsed.output_text == "Hi!"
    assert [item.id for item in parsed.output] == ["rs_abc_0", "fc_abc_1", "msg_abc_2"]
    assert (parsed.usage.input_tokens, parsed.usage.output_tokens, parsed.usage.total_tokens) == (9, 5, 14)
    assert parsed.usage.input_tokens_details.cached_tokens == 4
    assert parsed.usage.output_tokens_details.reasoning_tokens == 3


def test_a_response_tells_the_settings_of_its_request_and_the_usual_ones() -> None:
    options = {"temperature": 1.5, "seed": 7, "reasoning_effort": "low", "max_output_tokens": 9}
    request = {"metadata": {"a": "b"}, "store": False, "top_logprobs": 2, "model": "alias"}
    rendered = render_response(MODEL, None, reply(options=options, request=request))
    check_response(rendered)
    assert (rendered["temperature"], rendered["seed"], rendered["top_p"]) == (1.5, 7, Options().top_p)
    assert (rendered["instructions"], rendered["max_output_tokens"]) == ("Be brief.", 9)
    assert rendered["reasoning"] == {"effort": "low", "summary": None}
    assert (rendered["metadata"], rendered["store"], rendered["top_logprobs"]) == ({"a": "b"}, False, 2)
    assert (rendered["model"], rendered["tools"], rendered["tool_choice"]) == ("alias", [], "auto")
    assert (rendered["truncation"], rendered["service_tier"], rendered["conversation"]) == ("disabled", "default", None)
    assert rendered["text"] == {"format": {"type": "text"}}


@pytest.mark.parametrize(
    ("status", "reason", "told"),
    [
        (Status.INCOMPLETE, "max_output_tokens", {"reason": "max_output_tokens"}),
        (Status.INCOMPLETE, "context_length", {"reason": "max_output_tokens"}),
        (Status.INCOMPLETE, "steered", {"reason": "steered"}),
        (Status.CANCELLED, "client_cancelled", None),
        (Status.FAILED, "server_error", None),
    ],
)
def test_only_an_incomplete_response_says_why_it_is_incomplete(
    status: Status, reason: str, told: dict[str, str] | None
) -> None:
    rendered = render_response(MODEL, None, reply(status, reason))
    assert check_response(rendered).status == status
    assert (rendered["incomplete_details"], rendered["completed_at"]) == (told, None)


@pytest.mark.parametrize("reason", ["server_error", "server_shutdown", "revoked", None])
def test_a_failed_response_has_an_error_of_the_standard(reason: str | None) -> None:
    rendered = render_response(MODEL, None, reply(Status.FAILED, reason))
    parsed = check_response(rendered)
    assert parsed.error.code == "server_error"
    assert rendered["error"]["type"] == "server_error", "the AI SDK cannot read the response without it"
    assert parsed.error.message.endswith(".")


def test_a_response_that_could_not_keep_to_its_format_says_so() -> None:
    rendered = render_response(MODEL, None, reply(Status.FAILED, "format_failed"))
    assert check_response(rendered).error.code == "invalid_prompt"
    assert "in its format" in rendered["error"]["message"]
    assert rendered["error"]["type"] == "invalid_request_error"


def test_a_response_in_progress_has_no_usage_and_its_last_part_is_open() -> None:
    growing = [OUTPUT[0], OutputItem("message", ["H"])]
    rendered = render_response(MODEL, None, reply(Status.IN_PROGRESS, None, output=growing, ended=None))
    parsed = check_response(rendered)
    assert (parsed.status, parsed.usage, rendered["completed_at"]) == ("in_progress", None, None)
    assert [item.status for item in parsed.output] == ["completed", "in_progress"]
    assert check_response(render_response(MODEL, None, reply(Status.IN_PROGRESS, None), "queued")).status == "queued"


def test_a_part_that_was_cut_off_is_incomplete() -> None:
    cut = reply(Status.CANCELLED, "client_cancelled", output=[OUTPUT[0], OutputItem("message", ["H"])])
    rendered = render_response(MODEL, None, cut)
    assert [item["status"] for item in rendered["output"]] == ["completed", "incomplete"]


@pytest.mark.parametrize("index", range(len(OUTPUT)))
def test_each_output_item_is_one_of_the_standard_wherever_items_are_listed(index: int) -> None:
    item = render_output(reply())[index]
    RESPONSE_ITEM.validate_python(item)
    CONVERSATION_ITEM.validate_python(item)


def test_a_call_has_its_name_its_id_and_its_arguments() -> None:
    call = check_response(render_response(MODEL, None, reply())).output[1]
    assert (call.type, call.name, call.call_id, call.arguments) == ("function_call", "f", "call_1", '{"a": 1}')


def test_reasoning_is_an_item_of_its_own_without_a_summary() -> None:
    reasoning = check_response(render_response(MODEL, None, reply())).output[0]
    assert (reasoning.summary, [part.text for part in reasoning.content]) == ([], ["Let me"])


def test_probabilities_are_told_by_token_with_its_bytes() -> None:
    logprobs = [[TokenLogprob(b"\xe5\xb9", -0.5, [(b"\xe5\xb9", -0.5), (b"x", -2.0)])], [TokenLogprob(b"!", 0.0)]]
    output = [OutputItem("message", ["广", "!"], logprobs=list(logprobs), complete=True)]
    (text,) = check_response(render_response(MODEL, None, reply(output=output))).output[0].content
    first, second = text.logprobs
    assert (first.token, first.bytes, first.logprob) == ("\ufffd", [0xE5, 0xB9], -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("\ufffd", -0.5), ("x", -2.0)]
    assert (second.token, second.top_logprobs) == ("!", [])
