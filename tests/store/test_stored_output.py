from __future__ import annotations

from hypothesis import given, strategies

from models.output_item import OutputItem, OutputType, TokenLogprob
from models.store.stored_output import decode_joined, decode_output, encode_output

TYPES: list[OutputType] = ["reasoning", "message", "function_call"]
TEXTS = strategies.text(strategies.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
LOGPROBS = strategies.floats(-9999, 0)
TOKENS = strategies.builds(
    TokenLogprob,
    strategies.binary(max_size=6),
    LOGPROBS,
    strategies.lists(strategies.tuples(strategies.binary(max_size=6), LOGPROBS), max_size=3),
)


@strategies.composite
def parts(draw: strategies.DrawFn) -> OutputItem:
    pieces = draw(strategies.lists(TEXTS, max_size=5))
    tokens = strategies.lists(TOKENS, max_size=3)
    logprobs = draw(strategies.none() | strategies.tuples(*[tokens] * len(pieces)).map(list))
    return OutputItem(
        draw(strategies.sampled_from(TYPES)),
        pieces,
        draw(TEXTS | strategies.just("")),
        draw(TEXTS | strategies.just("")),
        logprobs,
        draw(strategies.booleans()),
    )


def content_of(output: list[OutputItem]) -> str:
    return "".join(part.text for part in output if part.type == "message")


@given(strategies.lists(parts(), max_size=5))
def test_an_output_is_read_with_exactly_the_pieces_that_it_had(output: list[OutputItem]) -> None:
    assert decode_output(encode_output(output), content_of(output)) == output


@given(strategies.lists(parts(), max_size=5))
def test_a_joined_output_has_the_same_texts_in_one_piece_each(output: list[OutputItem]) -> None:
    joined = decode_joined(encode_output(output), content_of(output))
    assert [(part.type, part.text, part.name) for part in joined] == [
        (part.type, part.text, part.name) for part in output
    ]
    assert all(len(part.pieces) <= 1 and part.logprobs is None for part in joined)


def test_the_text_of_messages_is_not_in_the_stored_output() -> None:
    output = [OutputItem("reasoning", ["I th", "ink"]), OutputItem("message", ["It is", " blue"], complete=True)]
    stored = encode_output(output)
    assert "think" in stored
    assert "blue" not in stored
    assert len(encode_output([OutputItem("message", ["word "] * 1000)])) < 3000


def test_a_token_that_is_a_part_of_a_character_keeps_its_logprob() -> None:
    token = TokenLogprob(b"\xf0\x9f", -0.5, [(b"\x00", -9999.0)])
    (part,) = decode_output(encode_output([OutputItem("message", ["a"], logprobs=[[token]])]), "a")
    assert part.logprobs == [[token]]
