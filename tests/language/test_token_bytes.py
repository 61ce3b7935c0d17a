from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from models.language.token_bytes import TokenBytes
from tests.language.test_detokenizer import BYTE_FALLBACK, TEXTS, TOKENIZERS, every_tokenizer

EXACT = [TOKENIZERS["bytes"], TOKENIZERS["split-characters"]]


@pytest.mark.parametrize("tokenizer", EXACT, ids=["bytes", "split-characters"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_bytes_of_the_tokens_join_to_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    token_bytes = TokenBytes(tokenizer)
    assert b"".join(map(token_bytes.of, tokenizer.encode(text))) == text.encode()


def test_bytes_and_spaces_of_sentence_piece_are_known() -> None:
    token_bytes = TokenBytes(BYTE_FALLBACK)
    ids = BYTE_FALLBACK.encode("the é", add_special_tokens=False)
    assert b"".join(map(token_bytes.of, ids)) == " the é".encode()


@every_tokenizer
def test_special_and_unknown_tokens_have_no_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    token_bytes = TokenBytes(tokenizer)
    assert [token_bytes.of(token_id) for token_id in tokenizer.all_special_ids] == [b""] * len(
        tokenizer.all_special_ids
    )
    assert token_bytes.of(10**6) == b""
