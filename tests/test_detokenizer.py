from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any

import pytest
from hypothesis import given, settings, strategies
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from models.detokenizer import Detokenizer, StopStrings
from tests.tiny import SPECIAL, tiny_tokenizer

TEXTS = [
    "Hello there, the end.",
    " two  spaces ",
    "广州是一座城市。",
    "👩\u200d👩\u200d👧!",
    "e\u0301u\u0308 é",
    "\ufffd is a character",
    "a\n\n\tb",
]


def split_tokenizer() -> PreTrainedTokenizerBase:
    """Bytes, and trained tokens of several, which may begin and end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[-1])  # type: ignore[no-untyped-call]


def fallback_tokenizer(decoder: Any) -> PreTrainedTokenizerBase:
    """Characters with a sign for the space, as SentencePiece has them, and bytes for every other character."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = ["▁", "▁▁", "▁a", "▁the", "▁end", "\ufffd", "广", "是", "\u0301", *"abcdefghijklmnopqrstuvwxyz.,HT\n"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", extra_special_tokens=["<|x|>"]
    )


SENTENCE_PIECE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
TOKENIZERS = {
    "bytes": tiny_tokenizer(),
    "split characters": split_tokenizer(),
    "byte fallback": fallback_tokenizer(decoders.Sequence([*SENTENCE_PIECE, decoders.Strip(" ", 1, 0)])),
    "byte fallback unstripped": fallback_tokenizer(decoders.Sequence(SENTENCE_PIECE)),
    "metaspace": fallback_tokenizer(decoders.Metaspace()),
}
every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pushed(detokenizer: Detokenizer, ids: Iterable[int]) -> str:
    return "".join(detokenizer.push(token_id) for token_id in ids)


@every_tokenizer
@settings(max_examples=100, deadline=None)
@given(data=strategies.data())
def test_the_pieces_of_any_tokens_join_to_their_decoding(kind: str, data: strategies.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    known = strategies.sampled_from(range(len(tokenizer)))
    ids = data.draw(strategies.lists(known, max_size=20))
    detokenizer = Detokenizer(tokenizer)
    assert pushed(detokenizer, ids) + detokenizer.flush() == decoded(tokenizer, ids)


@every_tokenizer
@pytest.mark.parametrize("text", TEXTS)
def test_a_reply_cut_anywhere_joins_to_its_decoding(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    for end in range(len(ids) + 1):
        detokenizer = Detokenizer(tokenizer)
        assert pushed(detokenizer, ids[:end]) + detokenizer.flush() == decoded(tokenizer, ids[:end])


@every_tokenizer
@pytest.mark.parametrize("text", [text for text in TEXTS if "\ufffd" not in text])
def test_half_a_character_never_shows_while_more_may_come(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    for token_id in ids:
        assert "\ufffd" not in detokenizer.push(token_id)
    assert "\ufffd" not in detokenizer.flush()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.all_special_ids)


def ids_past_the_vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A model whose vocabulary is padded can say them."""
    return [len(tokenizer), len(tokenizer) + 100]


@every_tokenizer
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("textless", [special_ids, ids_past_the_vocabulary])
def test_tokens_without_text_leave_no_trace(
    kind: str, text: str, textless: Callable[[PreTrainedTokenizerBase], list[int]]
) -> None:
    tokenizer = TOKENIZERS[kind]
    detokenizer = Detokenizer(tokenizer)
    spoken = tokenizer.encode(text, add_special_tokens=False)
    ids = [token_id for pair in zip(spoken, cycle(textless(tokenizer)), strict=False) for token_id in pair]
    assert pushed(detokenizer, ids) + detokenizer.flush() == decoded(tokenizer, ids) == decoded(tokenizer, spoken)


def test_text_shows_with_the_token_that_completes_it(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode("a 州\u0301b")]
    assert pieces == ["a", " ", "", "", "州", "", "\u0301", "b"]
    assert detokenizer.flush() == ""


def test_bytes_that_stand_in_for_characters_show_when_their_run_ends() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode("a 州是", add_special_tokens=False)]
    assert pieces == ["", "a", " ", "", "", "", "州是"]


def test_a_character_that_is_cut_shows_once_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert pushed(detokenizer, tokenizer.encode("州州")[:5]) == "州"
    assert [detokenizer.flush(), detokenizer.flush()] == ["\ufffd", ""]


class CountingTokenizer:
    """Counts how many tokens it is asked to decode."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.counts: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.counts.append(len(ids))
        return str(self.tokenizer.decode(ids, **options))


def test_the_work_for_a_token_does_not_grow_with_the_reply(tokenizer: PreTrainedTokenizerBase) -> None:
    counting: Any = CountingTokenizer(tokenizer)
    pushed(Detokenizer(counting), tokenizer.encode("a short 州 " * 50))
    assert max(counting.counts) <= 4


def first_stop(text: str, strings: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, the longest where several are, and whether one is."""
    for end in range(1, len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(max_examples=400, deadline=None)
@given(
    strategies.lists(strategies.text("ab州", max_size=4), max_size=8),
    strategies.lists(strategies.text("ab州", min_size=1, max_size=4), max_size=4).map(tuple),
)
def test_what_shows_is_the_text_before_the_first_stop_string_however_it_was_cut(
    pieces: list[str], strings: tuple[str, ...]
) -> None:
    stops = StopStrings(strings)
    shown = "".join([*map(stops.push, pieces), stops.flush()])
    assert (shown, stops.found) == first_stop("".join(pieces), strings)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(("END", "<|im_end|>"))
    assert [stops.push(piece) for piece in ("Hello E", "N", "!", " 1 < 2", " <", "|im_")] == [
        *("Hello ", "", "EN!", " 1 < 2", " ", "")
    ]
    assert not stops.found
    assert stops.flush() == "<|im_"


def test_nothing_shows_after_a_stop_string() -> None:
    stops = StopStrings(("END",))
    assert [stops.push(piece) for piece in ("The E", "ND and", " more")] == ["The ", "", ""]
    assert (stops.found, stops.flush()) == (True, "")
