"""Turns token ids into text, and never returns half a character."""

from __future__ import annotations

import re
from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

UNDECODABLE = "\ufffd"


class Detokenizer:
    """Turns the token ids of one reply into pieces of text. Joined, they are exactly the decoding of all ids.

    Special tokens have no text, but those in `kept`, which mark the parts of a reply.

    The text of a token can depend on the token before it (a leading space, a split character). So each step decodes all
    tokens since the last clean break (the last time that all text was certain), and returns the text that is new. Text
    that may still change is held back: an incomplete last character, and a run of byte tokens, since one bad byte
    changes the text of the whole run.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kept: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._silent = silent_ids(tokenizer, kept)
        self._window: list[int] = []  # the token before the last clean break, and all after it
        self._sent = 0  # how many characters of the window's text were returned

    def push(self, token_id: int) -> str:
        """The text that is certain after this token, often empty."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self._silent or not isinstance(token, str):  # None: a padding token outside of the vocabulary
            return ""
        self._window.append(token_id)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return ""
        text = self._decode()
        certain = text.removesuffix(UNDECODABLE)
        piece = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        if certain == text:
            self._window = self._window[-1:]
            self._sent = len(self._decode())
        return piece

    def flush(self) -> str:
        """The rest of the text, after the last token. An incomplete character becomes U+FFFD."""
        piece = self._decode()[self._sent :]
        self._sent += len(piece)
        return piece

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._window, clean_up_tokenization_spaces=False))


def silent_ids(tokenizer: PreTrainedTokenizerBase, kept: Collection[int] = ()) -> set[int]:
    """The special tokens, which have no text, but those in `kept`."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added.union(tokenizer.all_special_ids).difference(kept)
