"""The bytes of single tokens."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from models.language.detokenizer import silent_ids


class TokenBytes:
    """The bytes that each token of a tokenizer stands for; none for tokens that are not text. Joined, they are a text.

    Two kinds of tokenizers write bytes: with a character for each byte (GPT-2), and as <0x0A> where they have no token
    for a character (SentencePiece, with ▁ for a space).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._special = silent_ids(tokenizer)
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        alphabet = bytes_to_unicode()  # type: ignore[no-untyped-call]
        self._bytes = {char: byte for byte, char in alphabet.items()} if "ByteLevel" in repr(decoder) else None

    def of(self, token_id: int) -> bytes:
        """The bytes of a token."""
        if token_id in self._special:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            return b""
        if self._bytes is not None and all(char in self._bytes for char in token):
            return bytes(self._bytes[char] for char in token)
        if found := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(found[1])
        return token.replace("▁", " ").encode()
