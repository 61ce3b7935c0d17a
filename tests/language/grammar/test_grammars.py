from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from models.errors import FormatFailedError, InvalidValueError, UnsupportedParameterError
from models.language.grammar import grammars as module
from models.language.grammar.constraint import GrammarConstraint
from models.language.grammar.grammars import Grammars
from models.language.grammar.lark import lark_of
from models.output_format import PLAIN_TEXT, OutputFormat
from tests.language.test_detokenizer import BYTE_FALLBACK, fallback_tokenizer
from tests.support.tiny import SHAPE, tiny_tokenizer

pytestmark = pytest.mark.anyio

END = 2
VOCABULARY: int = SHAPE["vocab_size"]

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
async def grammars(tokenizer: PreTrainedTokenizerBase) -> AsyncIterator[Grammars]:
    grammars = Grammars(tokenizer, VOCABULARY, [END])
    yield grammars
    grammars.close()


def schema(value: Any) -> OutputFormat:
    return OutputFormat("json_schema", value, "response_format.json_schema.schema")


def allowed(constraint: GrammarConstraint, vocabulary: int = VOCABULARY) -> list[int]:
    """The tokens that may come next."""
    mask = torch.full(((vocabulary + 31) // 32,), -1, dtype=torch.int32)
    constraint.fill(mask)
    return [int(token) for token in np.flatnonzero(np.unpackbits(mask.numpy().view(np.uint8), bitorder="little"))]


def takes(constraint: GrammarConstraint, tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """How a text ends: "ended" if nothing may follow, "may end", or "open"; None if a token of it is not allowed."""
    for token_id in tokenizer.encode(text):
        if constraint.ended or token_id not in allowed(constraint):
            return None
        constraint.accept(token_id)
    if constraint.ended:
        return "ended"
    return "may end" if END in allowed(constraint) else "open"


async def result(grammars: Grammars, format: OutputFormat, text: str) -> str | None:
    constraint = await grammars.compile(format)
    assert constraint
    return takes(constraint, tiny_tokenizer(), text)


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        (OutputFormat("json_object"), '{"a": [1, "é", null]}', "ended"),
        (OutputFormat("json_object"), "[1]", None),
        (OutputFormat("json_object"), '{"a": ', "open"),
        (OutputFormat("json_object"), '{"a":' + 64 * " " + "1}", "ended"),
        (OutputFormat("json_object"), '{"a":' + 65 * " " + "1}", None),
        (schema(PERSON), '{"name": "Ann", "age": 7}', "ended"),
        (schema(PERSON), '{"age": 7', None),
        (schema(PERSON), '{"name": "Ann", "age": -7}', None),
        (schema({"type": "integer"}), "12", "may end"),
        (schema({"$schema": "http://json-schema.org/draft-07/schema#", "enum": ["a", "b"]}), '"b"', "ended"),
        (schema({"$defs": {"a": {"const": 1}}, "type": "array", "items": {"$ref": "#/$defs/a"}}), "[1,1]", "ended"),
        (OutputFormat("regex", "[a-c]+/\\d{2}"), "abc/42", "ended"),
        (OutputFormat("regex", "^a|b$"), "b", "ended"),
        (OutputFormat("regex", "a?"), "", "may end"),
        (OutputFormat("regex", ""), "", "may end"),
        (OutputFormat("regex", "a\nb"), "a\nb", "ended"),
        (OutputFormat("choice", ("yes", "no")), "yes", "ended"),
        (OutputFormat("choice", ("yes", "no")), "maybe", None),
        (OutputFormat("choice", ("a", "ab")), "a", "may end"),
        (OutputFormat("grammar", 'start: "a" b\nb: "b" b | "c"'), "abbc", "ended"),
        (OutputFormat("grammar", 'root ::= "a" b # GBNF\nb ::= [b-d]+ | "e"'), "acd", "may end"),
    ],
)
async def test_a_format_allows_what_it_says(
    grammars: Grammars, format: OutputFormat, text: str, expected: str | None
) -> None:
    assert await result(grammars, format, text) == expected


@pytest.mark.parametrize(
    "text",
    ['a"b\\c', "tab\tnew\nline", "é 日本 😀", "\x01\x1b\x7f\u2028", "100% %json {", "/x/ // y", "{1} [2] (3) <4>"],
)
async def test_a_choice_can_have_any_characters(grammars: Grammars, text: str) -> None:
    assert await result(grammars, OutputFormat("choice", (text, "other")), text) == "ended"


async def test_free_text_has_no_constraint(grammars: Grammars) -> None:
    assert await grammars.compile(PLAIN_TEXT) is None


@pytest.mark.parametrize(
    "format",
    [
        OutputFormat("json_object"),
        schema({"const": "a}"}),
        OutputFormat("regex", "[{}]+a"),
        OutputFormat("choice", ("}", "{a")),
        OutputFormat("grammar", 'start: "x" b\n// a }\nb: "}" | "{"'),
        OutputFormat("grammar", 'root ::= "x" ("}" | "{")'),
    ],
    ids=lambda format: format.type,
)
async def test_a_format_can_stand_in_a_larger_grammar(
    grammars: Grammars, tokenizer: PreTrainedTokenizerBase, format: OutputFormat
) -> None:
    text = {"json_object": "{}", "json_schema": '"a}"', "regex": "}{a", "choice": "{a", "grammar": "x}"}[format.type]
    lark = f'start: /t*/ ":" output\noutput: %lark {{\n{lark_of(format)}\n}}'
    constraint = await grammars.compile_lark(lark, "text", "ann", format)
    assert takes(constraint, tokenizer, f"tt:{text}") in ("ended", "may end")
    assert takes(await grammars.compile_lark(lark, "text", "ann", format), tokenizer, f"tt:!{text}") is None


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        (schema({"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
        (schema({"type": "object", "x-guidance": {"lenient": True}, "not": {}}), 'Unimplemented keys: ["not"]'),
        (schema({"type": "strin"}), "Invalid type: strin"),
        (schema({"type": "string", "format": "poem"}), "Unknown format: poem"),
        (schema({"$ref": "http://example.com/schema"}), "not present in a registry"),
        (schema({"allOf": [{"type": "string"}, {"type": "number"}]}), "Unsatisfiable schema"),
        (OutputFormat("regex", "(", "p"), "unclosed group"),
        (OutputFormat("regex", "(?=a)b", "p"), "look-around"),
        (OutputFormat("grammar", "start: foo", "p"), 'at 1(8): unknown name: "foo"'),
        (OutputFormat("grammar", "root ::= (", "p"), "Expected '\\)'"),
        (OutputFormat("grammar", "root ::= " + 5000 * "(", "p"), "not GBNF"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name_in_one_line(
    grammars: Grammars, format: OutputFormat, reason: str
) -> None:
    with pytest.raises(InvalidValueError) as raised:
        await grammars.compile(format)
    assert reason.replace("\\", "") in str(raised.value)
    assert raised.value.param == format.param
    assert str(raised.value).startswith(format.param)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("tokenizer", [fallback_tokenizer(decoders.Metaspace())], ids=["metaspace"])
async def test_an_unknown_kind_of_tokenizer_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    grammars = Grammars(tokenizer, len(tokenizer), [END])
    for _ in range(2):
        with pytest.raises(UnsupportedParameterError, match="cannot have a format, because of its tokenizer") as raised:
            await grammars.compile(OutputFormat("json_object"))
        assert raised.value.param == "text.format"
    grammars.close()


async def test_a_tokenizer_with_bytes_for_rare_characters_follows_a_format() -> None:
    grammars = Grammars(BYTE_FALLBACK, len(BYTE_FALLBACK), [END])
    constraint = await grammars.compile(OutputFormat("regex", "the ."))
    assert constraint
    for token_id in BYTE_FALLBACK.encode("the é", add_special_tokens=False)[1:]:
        assert token_id in allowed(constraint, len(BYTE_FALLBACK))
        constraint.accept(token_id)
    assert constraint.ended
    grammars.close()


@pytest.mark.parametrize("vocabulary", [VOCABULARY - 50, VOCABULARY, VOCABULARY + 100])
async def test_logits_and_tokenizer_may_differ_in_size(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    grammars = Grammars(tokenizer, vocabulary, [END])
    constraint = await grammars.compile(OutputFormat("regex", "[ -~]"))
    assert constraint
    mask_size = (vocabulary + 31) // 32 * 32
    printable = tokenizer.encode("".join(map(chr, range(32, 127))))
    assert allowed(constraint, vocabulary) == sorted(token for token in printable if token < mask_size)
    grammars.close()


async def test_every_stop_token_is_allowed_where_the_format_may_end(tokenizer: PreTrainedTokenizerBase) -> None:
    grammars = Grammars(tokenizer, VOCABULARY, [1, 2])
    constraint = await grammars.compile(OutputFormat("regex", "ab?"))
    assert constraint
    (a,) = tokenizer.encode("a")
    assert allowed(constraint) == [a]
    constraint.accept(a)
    assert allowed(constraint) == [1, 2, a + 1]
    grammars.close()


async def test_a_compiled_grammar_is_kept_for_its_user_and_dropped_when_worn(grammars: Grammars) -> None:
    first = await grammars.compile(OutputFormat("json_object"), "ann")
    again = await grammars.compile(OutputFormat("json_object"), "ann")
    other = await grammars.compile(OutputFormat("json_object"), "bob")
    assert first
    assert again
    assert other
    assert again is not first
    assert again._grammar is first._grammar
    assert other._grammar is not first._grammar
    first._grammar.seconds = module.WORN_SECONDS
    new = await grammars.compile(OutputFormat("json_object"), "ann")
    assert new
    assert new._grammar is not first._grammar


async def test_kept_grammars_are_bounded_by_number_and_bytes(grammars: Grammars) -> None:
    for number in range(module.KEPT + 5):
        await grammars.compile(OutputFormat("regex", f"a{number}"))
    assert len(grammars._kept) == module.KEPT
    for number in range(20):
        await grammars.compile(OutputFormat("choice", (60_000 * "x" + str(number),)))
    assert sum(len(key.lark) for key in grammars._kept) <= module.KEPT_BYTES
    assert len(grammars._kept) >= 10


async def test_two_replies_of_one_grammar_do_not_change_each_other(
    grammars: Grammars, tokenizer: PreTrainedTokenizerBase
) -> None:
    first, second = [await grammars.compile(schema(PERSON), "ann") for _ in range(2)]
    assert first
    assert second
    before = allowed(second)
    assert takes(first, tokenizer, '{"name": "Ann", "age": 7}') == "ended"
    assert not second.ended
    assert allowed(second) == before


async def test_a_user_has_one_format_at_a_time_in_the_compiler(grammars: Grammars) -> None:
    order: list[str] = []

    async def compile(user: str, number: int) -> None:
        properties = {f"p{number}_{index}": {"type": "string"} for index in range(400)}
        await grammars.compile(schema({"type": "object", "properties": properties}), user)
        order.append(user)

    await grammars.compile(OutputFormat("json_object"))  # the tokenizer is ready
    await asyncio.gather(*(compile("ann", number) for number in range(5)), compile("bob", 0))
    assert order.index("bob") <= 1


HOSTILE = {
    "ambiguous": OutputFormat("grammar", 'start: s\ns: s s | s s s | "a" | "b" | "a" "b"'),
    "very ambiguous": OutputFormat("grammar", 'start: s\ns: s s s s s s | "a" | "b" | ""'),
    "many states": OutputFormat("regex", "((.|\\s)*[a-m](.|\\s){30})+"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_format_that_costs_too_much_ends_its_reply_and_says_why(grammars: Grammars, name: str) -> None:
    constraint = await grammars.compile(HOSTILE[name], "ann")
    assert constraint
    chance = random.Random(1)

    def go_on() -> None:
        for _ in range(20_000):
            constraint.accept(chance.choice([token for token in allowed(constraint) if token != END]))

    with pytest.raises(FormatFailedError, match="the reply cannot go on in its format: ") as raised:
        go_on()
    assert raised.value.param == "text.format"
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("seconds", "tokens"), [(0.0009, 200), (0.03, 1), (0.2, 0)])
async def test_a_reply_may_take_so_much_time_for_its_format_and_more_with_each_token(
    grammars: Grammars, tokenizer: PreTrainedTokenizerBase, seconds: float, tokens: int
) -> None:
    compiled = await grammars.compile(OutputFormat("regex", "a{200}"))
    assert compiled
    clock = count(0, seconds)  # each mask and each token takes so long
    constraint = GrammarConstraint(compiled._grammar, compiled._matcher, lambda: next(clock))
    (letter,) = tokenizer.encode("a")
    taken = 0
    with suppress(FormatFailedError):
        while not constraint.ended:
            assert allowed(constraint) == [letter]
            constraint.accept(letter)
            taken += 1
    assert taken == tokens
    assert constraint.ended == (tokens == 200)


# Any schema

names = strategies.sampled_from(["a", "b", "é", 'q"', "a b"])
leaves = strategies.one_of(
    strategies.just({"type": "boolean"}),
    strategies.just({"type": "null"}),
    strategies.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        strategies.integers(-999, 999),
        strategies.integers(0, 999),
    ),
    strategies.builds(
        lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
        strategies.integers(0, 3),
        strategies.integers(0, 4),
    ),
    strategies.builds(
        lambda values: {"enum": values},
        strategies.lists(
            strategies.one_of(strategies.booleans(), strategies.integers(), names), min_size=1, max_size=4
        ),
    ),
)


def containers(inner: strategies.SearchStrategy[dict[str, Any]]) -> strategies.SearchStrategy[dict[str, Any]]:
    return strategies.one_of(
        strategies.builds(
            lambda items, low, size: {"type": "array", "items": items, "minItems": low, "maxItems": low + size},
            inner,
            strategies.integers(0, 2),
            strategies.integers(0, 2),
        ),
        strategies.builds(
            lambda properties, optional: {
                "type": "object",
                "properties": properties,
                "required": [name for name in properties if name not in optional],
                "additionalProperties": False,
            },
            strategies.dictionaries(names, inner, max_size=4),
            strategies.sets(names),
        ),
        strategies.builds(lambda options: {"anyOf": options}, strategies.lists(inner, min_size=1, max_size=3)),
    )


schemas = strategies.recursive(leaves, containers, max_leaves=6)


def validates(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value matches a schema, of those above."""
    if "anyOf" in schema:
        return any(validates(value, each) for each in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(each) and value == each for each in schema["enum"])
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            number = isinstance(value, int) and not isinstance(value, bool)
            return number and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
        case "array":
            fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            return fits and all(validates(each, schema["items"]) for each in value)
    assert schema["type"] == "object"
    if not isinstance(value, dict) or not set(schema["required"]) <= value.keys() <= schema["properties"].keys():
        return False
    return all(validates(each, schema["properties"][name]) for name, each in value.items())


@pytest.fixture(scope="module")
def shared() -> tuple[PreTrainedTokenizerBase, Grammars]:
    """Words make several bytes one token: quotes, braces and halves of characters among them."""
    words = ['{"', '":', '",', '"}', "true", "null", "ĠĠ", "12", "-1", "Ã©", "Ã", '"aĠb"', "}}", "]}", "\\u00"]
    tokenizer = tiny_tokenizer([word.replace(" ", "Ġ") for word in words])
    return tokenizer, Grammars(tokenizer, len(tokenizer), [END])


async def compiled(grammars: Grammars, format: OutputFormat) -> GrammarConstraint:
    constraint = await grammars.compile(format)
    assert constraint
    return constraint


@settings(max_examples=150, deadline=None)
@given(value=schemas, seed=strategies.integers(0, 2**32))
def test_any_reply_that_ends_by_its_format_matches_its_schema(
    shared: tuple[PreTrainedTokenizerBase, Grammars], value: dict[str, Any], seed: int
) -> None:
    tokenizer, grammars = shared
    try:
        constraint = asyncio.run(compiled(grammars, schema(value)))
    except InvalidValueError:
        return  # such as an enum of nothing that fits
    chance, ids = random.Random(seed), list[int]()
    while not constraint.ended and len(ids) < 400:
        token_id = chance.choice(allowed(constraint, len(tokenizer)))
        if token_id == END:
            break
        constraint.accept(token_id)
        ids.append(token_id)
    else:
        if not constraint.ended:
            return  # it was cut
    assert validates(json.loads(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))), value)
