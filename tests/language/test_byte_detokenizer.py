from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies
from transformers import PreTrainedTokenizerBase

from models.language.byte_detokenizer import ByteDetokenizer, detokenizers_of
from models.language.detokenizer import UNDECODABLE, Detokenizer
from tests.language.test_detokenizer import TOKENIZERS, decoded, every_text, padding_ids, pushed, special_ids

BYTES = [TOKENIZERS["bytes"], TOKENIZERS["split-characters"]]
byte_tokenizer = pytest.mark.parametrize("tokenizer", BYTES, ids=["bytes", "split-characters"])


def new_detokenizer(tokenizer: PreTrainedTokenizerBase) -> ByteDetokenizer:
    detokenizer = detokenizers_of(tokenizer)()
    assert isinstance(detokenizer, ByteDetokenizer)
    return detokenizer


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_of_bytes_have_the_fast_detokenizer(name: str) -> None:
    expected = ByteDetokenizer if name in ("bytes", "split-characters") else Detokenizer
    assert type(detokenizers_of(TOKENIZERS[name])()) is expected


@byte_tokenizer
@settings(max_examples=300, deadline=None)
@given(data=strategies.data())
def test_the_pieces_of_any_tokens_join_to_what_the_tokenizer_says(
    tokenizer: PreTrainedTokenizerBase, data: strategies.DataObject
) -> None:
    known = strategies.sampled_from([*range(len(tokenizer)), *padding_ids(tokenizer)])
    ids = data.draw(strategies.lists(known, max_size=20))
    detokenizer = new_detokenizer(tokenizer)
    assert pushed(detokenizer, ids) + detokenizer.flush() == decoded(tokenizer, ids)


@byte_tokenizer
@every_text
def test_the_pieces_of_a_cut_reply_join_to_its_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    for end in range(len(ids) + 1):
        detokenizer = new_detokenizer(tokenizer)
        assert pushed(detokenizer, ids[:end]) + detokenizer.flush() == decoded(tokenizer, ids[:end])


def test_a_character_comes_with_its_last_token() -> None:
    detokenizer = new_detokenizer(TOKENIZERS["bytes"])
    pieces = [detokenizer.push(token_id) for token_id in TOKENIZERS["bytes"].encode("a 州\u0301b")]
    assert pieces == ["a", " ", "", "", "州", "", "\u0301", "b"]
    assert detokenizer.flush() == ""


def test_a_cut_character_becomes_one_replacement_character() -> None:
    detokenizer = new_detokenizer(TOKENIZERS["bytes"])
    assert pushed(detokenizer, TOKENIZERS["bytes"].encode("州州")[:5]) == "州"
    assert [detokenizer.flush(), detokenizer.flush()] == [UNDECODABLE, ""]


@byte_tokenizer
def test_special_tokens_have_text_only_if_they_are_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    token_id = special_ids(tokenizer)[0]
    content = tokenizer.convert_ids_to_tokens(token_id)
    assert detokenizers_of(tokenizer)().push(token_id) == ""
    assert detokenizers_of(tokenizer, [token_id])().push(token_id) == content


def test_replies_with_one_tokenizer_share_the_bytes_of_its_tokens_and_nothing_else() -> None:
    tokenizer = TOKENIZERS["bytes"]
    new = detokenizers_of(tokenizer)
    first, second = new(), new()
    half, rest = (ids := tokenizer.encode("州"))[:1], ids[1:]
    assert pushed(first, half) == ""
    assert pushed(second, ids) == "州"
    assert pushed(first, rest) == "州"
