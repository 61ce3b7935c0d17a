"""Token ids to text, never with half a character."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

UNDECODABLE = "\ufffd"


class Detokenizer:
    """Turns the token ids of one reply into pieces of text. Joined, they are the decoding of all ids to the letter.

    It decodes the tokens since the last clean break, with and without the new one, and returns the difference: the
    text of a token can depend on the one before it (a leading space, a split character). Text that may still change
    is held back: a last character that is incomplete, and, for tokenizers that fall back to bytes, every byte of a
    run, since one bad byte changes how the whole run decodes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = added.union(tokenizer.all_special_ids)
        self._window: list[int] = []  # the token before the last clean break, and all after it
        self._sent = 0  # characters of the window's text that were returned

    def push(self, token_id: int) -> str:
        """The text that is certain after this token, often none."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self._special or not isinstance(token, str):  # None: a padding token outside of the vocabulary
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
        """The rest of the text, when no more tokens come. A character that was cut becomes U+FFFD."""
        piece = self._decode()[self._sent :]
        self._sent += len(piece)
        return piece

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._window, clean_up_tokenization_spaces=False))
