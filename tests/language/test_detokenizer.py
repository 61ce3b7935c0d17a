from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any

import pytest
from hypothesis import given, settings, strategies
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from models.language.byte_detokenizer import ByteDetokenizer
from models.language.detokenizer import UNDECODABLE, Detokenizer
from tests.support.tiny import SPECIAL, tiny_tokenizer

TEXTS = {
    "sentence": "Hello there, the end.",
    "spaces": " two  spaces ",
    "chinese": "广州是一座城市。",
    "family-emoji": "👩\u200d👩\u200d👧!",
    "combining-accents": "e\u0301u\u0308 é",
    "replacement-character": "\ufffd is a character",
    "newlines-and-tab": "a\n\n\tb",
}


def split_tokenizer() -> PreTrainedTokenizerBase:
    """Tokens of one or several bytes, which may begin and end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[-1])  # type: ignore[no-untyped-call]


def fallback_tokenizer(decoder: Any) -> PreTrainedTokenizerBase:
    """Characters with a sign for the space, as in SentencePiece, and bytes for every other character."""
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
BYTE_FALLBACK = fallback_tokenizer(decoders.Sequence([*SENTENCE_PIECE, decoders.Strip(" ", 1, 0)]))
TOKENIZERS = {
    "bytes": tiny_tokenizer(),
    "split-characters": split_tokenizer(),
    "byte-fallback": BYTE_FALLBACK,
    "byte-fallback-unstripped": fallback_tokenizer(decoders.Sequence(SENTENCE_PIECE)),
    "metaspace": fallback_tokenizer(decoders.Metaspace()),
}

every_tokenizer = pytest.mark.parametrize(
    "tokenizer", [pytest.param(tokenizer, id=name) for name, tokenizer in TOKENIZERS.items()]
)
every_text = pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in TEXTS.items()])
every_whole_text = pytest.mark.parametrize(
    "text", [pytest.param(text, id=name) for name, text in TEXTS.items() if UNDECODABLE not in text]
)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """What the tokenizer itself makes of all tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pushed(detokenizer: Detokenizer | ByteDetokenizer, ids: Iterable[int]) -> str:
    return "".join(detokenizer.push(token_id) for token_id in ids)


@every_tokenizer
@settings(max_examples=100, deadline=None)
@given(data=strategies.data())
def test_the_pieces_of_any_tokens_join_to_their_text(
    tokenizer: PreTrainedTokenizerBase, data: strategies.DataObject
) -> None:
    known = strategies.sampled_from(range(len(tokenizer)))
    ids = data.draw(strategies.lists(known, max_size=20))
    detokenizer = Detokenizer(tokenizer)
    assert pushed(detokenizer, ids) + detokenizer.flush() == decoded(tokenizer, ids)


@every_tokenizer
@every_text
def test_the_pieces_of_a_cut_reply_join_to_its_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    for end in range(len(ids) + 1):
        detokenizer = Detokenizer(tokenizer)
        assert pushed(detokenizer, ids[:end]) + detokenizer.flush() == decoded(tokenizer, ids[:end])


@every_tokenizer
@every_whole_text
def test_no_piece_has_half_a_character(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        assert UNDECODABLE not in detokenizer.push(token_id)
    assert UNDECODABLE not in detokenizer.flush()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.all_special_ids)


def padding_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the tokenizer lacks; a model whose vocabulary is padded can generate them."""
    return [len(tokenizer), len(tokenizer) + 100]


@every_tokenizer
@every_text
@pytest.mark.parametrize("silent_ids", [special_ids, padding_ids], ids=["special", "padding"])
def test_tokens_without_text_change_nothing(
    tokenizer: PreTrainedTokenizerBase, text: str, silent_ids: Callable[[PreTrainedTokenizerBase], list[int]]
) -> None:
    detokenizer = Detokenizer(tokenizer)
    text_ids = tokenizer.encode(text, add_special_tokens=False)
    ids = [token_id for pair in zip(text_ids, cycle(silent_ids(tokenizer)), strict=False) for token_id in pair]
    assert pushed(detokenizer, ids) + detokenizer.flush() == decoded(tokenizer, ids) == decoded(tokenizer, text_ids)


def test_a_character_comes_with_its_last_token() -> None:
    tokenizer = TOKENIZERS["bytes"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode("a 州\u0301b")]
    assert pieces == ["a", " ", "", "", "州", "", "\u0301", "b"]
    assert detokenizer.flush() == ""


def test_fallback_bytes_come_when_their_run_ends() -> None:
    detokenizer = Detokenizer(BYTE_FALLBACK)
    pieces = [detokenizer.push(token_id) for token_id in BYTE_FALLBACK.encode("a 州是", add_special_tokens=False)]
    assert pieces == ["", "a", " ", "", "", "", "州是"]


def test_a_cut_character_becomes_one_replacement_character() -> None:
    tokenizer = TOKENIZERS["bytes"]
    detokenizer = Detokenizer(tokenizer)
    assert pushed(detokenizer, tokenizer.encode("州州")[:5]) == "州"
    assert [detokenizer.flush(), detokenizer.flush()] == [UNDECODABLE, ""]


class CountingTokenizer:
    """Counts how many tokens each call of `decode` gets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.counts: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.counts.append(len(ids))
        return str(self.tokenizer.decode(ids, **options))


def test_the_work_for_a_token_does_not_grow_with_the_reply() -> None:
    counting: Any = CountingTokenizer(TOKENIZERS["bytes"])
    pushed(Detokenizer(counting), counting.encode("a short 州 " * 50))
    assert max(counting.counts) <= 4
