from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from models.language.detokenizer import Detokenizer
from models.language.reply_text import ReplyText
from models.language.stop_strings import StopStrings
from models.messages import FinishReason


def pushed(tokenizer: PreTrainedTokenizerBase, text: str, reason: FinishReason, stop: tuple[str, ...] = ()) -> Any:
    """The pieces that come of the tokens of a text, and why it ends; `reason` comes with the last token."""
    reply, pieces = ReplyText(Detokenizer(tokenizer), StopStrings(stop)), list[str]()
    *ids, last = tokenizer.encode(text)
    for token_id in ids:
        piece, found = reply.push(token_id, None)
        pieces.append(piece)
        if found:
            return pieces, found
    piece, found = reply.push(last, reason)
    return [*pieces, piece], found


@pytest.mark.parametrize(
    ("text", "reason", "stop", "expected"),
    [
        pytest.param("ab", "max_output_tokens", (), (["a", "b"], "max_output_tokens"), id="cut"),
        pytest.param("ab<|end|>", "stop", (), (["a", "b", ""], "stop"), id="stop-token"),
        pytest.param("a\0b", "context_length", (), (["a", "\ufffd", "b"], "context_length"), id="nul"),
        pytest.param("aENDb", "max_output_tokens", ("END",), (["a", "", "", ""], "stop"), id="stop-string"),
        pytest.param("aEN", "max_output_tokens", ("END",), (["a", "", "EN"], "max_output_tokens"), id="half-of-one"),
        pytest.param("aEN<|end|>", "stop", ("END",), (["a", "", "", "EN"], "stop"), id="half-of-one-and-stop-token"),
        pytest.param("aEND", "max_output_tokens", ("END",), (["a", "", "", ""], "stop"), id="stop-string-at-the-cut"),
    ],
)
def test_the_text_of_a_reply_has_no_stop_token_stop_string_or_nul(
    tokenizer: PreTrainedTokenizerBase, text: str, reason: FinishReason, stop: tuple[str, ...], expected: Any
) -> None:
    assert pushed(tokenizer, text, reason, stop) == expected


@pytest.mark.parametrize("reason", ["max_output_tokens", "context_length"])
def test_half_a_character_at_a_cut_is_left_out(tokenizer: PreTrainedTokenizerBase, reason: FinishReason) -> None:
    reply = ReplyText(Detokenizer(tokenizer), StopStrings(()))
    first, second, _ = tokenizer.encode("州")
    assert [reply.push(first, None), reply.push(second, reason)] == [("", None), ("", reason)]


def test_half_a_character_before_a_stop_token_becomes_a_replacement_character(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    reply = ReplyText(Detokenizer(tokenizer), StopStrings(()))
    first, second, _ = tokenizer.encode("州")
    (end,) = tokenizer.encode("<|end|>")
    pieces = [reply.push(first, None), reply.push(second, None), reply.push(end, "stop")]
    assert pieces == [("", None), ("", None), ("\ufffd", "stop")]
