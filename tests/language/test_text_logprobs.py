from __future__ import annotations

from hypothesis import given, settings, strategies
from transformers import PreTrainedTokenizerBase

from models.engine.logprobs import Logprobs
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence, Token
from models.language.detokenizer import UNDECODABLE, Detokenizer
from models.language.events import Done, Event, ReasoningDelta, TextDelta
from models.language.stop_strings import StopStrings
from models.language.text_logprobs import TextLogprobs
from models.language.token_bytes import TokenBytes
from tests.language.test_detokenizer import TOKENIZERS, every_tokenizer

SEQUENCE = Sequence([1], SamplingParams(logprobs=1), 9, frozenset([2]))


def token(token_id: int) -> Token:
    return Token(SEQUENCE, token_id, None, Logprobs(-0.5, [(token_id, -0.5)]))


def told(events: list[Event]) -> list[tuple[str, list[bytes]]]:
    """The text of the deltas, and the bytes of their tokens."""
    return [
        (event.text, [each.token for each in event.logprobs or ()]) for event in events if isinstance(event, TextDelta)
    ]


def attached(pushes: list[tuple[str, list[Event]]]) -> list[Event]:
    """The events after tokens, which are given by their text."""
    tokenizer = TOKENIZERS["split-characters"]
    logprobs, events = TextLogprobs(TokenBytes(tokenizer)), list[Event]()
    for text, brought in pushes:
        for token_id in tokenizer.encode(text):
            logprobs.push(token(token_id))
        events += logprobs.attach(brought)
    return events


@every_tokenizer
@settings(max_examples=100, deadline=None)
@given(data=strategies.data())
def test_the_bytes_of_any_tokens_join_to_the_text_whatever_is_held_back(
    tokenizer: PreTrainedTokenizerBase, data: strategies.DataObject
) -> None:
    ids = data.draw(strategies.lists(strategies.sampled_from(range(len(tokenizer))), max_size=20))
    stops = data.draw(strategies.lists(strategies.text("endT ", min_size=1, max_size=3), max_size=2))
    detokenizer, strings = Detokenizer(tokenizer), StopStrings(tuple(stops))
    logprobs, events, expected = TextLogprobs(TokenBytes(tokenizer)), list[Event](), ""
    for token_id in ids:
        logprobs.push(token(token_id))
        text = strings.push(detokenizer.push(token_id))
        expected += text
        events += logprobs.attach([TextDelta(text)] if text else [])
    text = strings.push(detokenizer.flush()) + strings.flush()
    expected += text
    events += logprobs.attach([*([TextDelta(text)] if text else []), Done("stop")])
    assert "".join(text for text, _ in told(events)) == expected
    written = b"".join(map(TokenBytes(tokenizer).of, ids)).decode(errors="replace")
    for text, tokens in told(events):
        assert text
        if UNDECODABLE not in expected and expected in written:
            assert b"".join(tokens).decode() == text
    assert events[-1] == Done("stop")


def test_a_token_that_a_stop_string_cuts_is_told_with_what_is_left_of_it() -> None:
    events = attached([("th", [TextDelta("t")]), ("e", [Done("stop")])])
    assert told(events) == [("t", [b"t"])]
    events = attached([("end", [TextDelta("e")]), ("x", [Done("stop")])])  # "en" is a token
    assert told(events) == [("e", [b"e"])]


def test_a_token_with_the_end_of_a_held_text_is_told_with_all_of_it() -> None:
    events = attached([("en", [TextDelta("e")]), ("d", [TextDelta("nd")])])
    assert told(events) == [("end", [b"en", b"d"])]


def test_tokens_of_other_parts_and_markers_are_in_no_delta() -> None:
    events = attached(
        [
            ("the", [ReasoningDelta("the")]),
            ("</t>", []),
            ("Hell", [TextDelta("Hell")]),
            ("o", [TextDelta("o"), Done("stop")]),
        ]
    )
    assert "".join(text for text, _ in told(events)) == "Hello"
    assert b"".join(each for _, tokens in told(events) for each in tokens) == b"Hello"
    assert ReasoningDelta("the") in events


def test_a_stop_token_is_not_told() -> None:
    logprobs = TextLogprobs(TokenBytes(TOKENIZERS["bytes"]))
    logprobs.push(token(2))
    assert list(logprobs.attach([Done("stop")])) == [Done("stop")]
