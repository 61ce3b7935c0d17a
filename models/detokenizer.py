"""Token ids to text, never half a character; stop strings that never show."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

UNDECODABLE = "\ufffd"


class Detokenizer:
    """Turns the token ids of one reply into pieces that, joined, are their full decoding to the letter.

    Decodes the tokens since the last clean break twice, with and without the new one, and hands out the
    difference: a token's text can depend on the one before it (a leading space, a split character). What may
    still change is held back: a last character that is not whole, and, for tokenizers that fall back to bytes,
    every byte of a run, since one bad byte changes how the whole run decodes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = added.union(tokenizer.all_special_ids)
        self._window: list[int] = []  # the token before the last clean break, and all since
        self._sent = 0  # characters of the window's decoding that are handed out

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, often none."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self._special or not isinstance(token, str):  # None: beyond the vocabulary, as padding is
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
        """The rest of the text: nothing more comes. A character that was cut shows as U+FFFD."""
        piece = self._decode()[self._sent :]
        self._sent += len(piece)
        return piece

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._window, clean_up_tokenization_spaces=False))


class StopStrings:
    """Watches a text that comes in pieces for the first of some strings, and holds back what may begin one."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that cannot be part of a stop string any more; nothing once one was found."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(text.find(string) + len(string), -len(string)) for string in self._strings if string in text]
        if ends:
            end, length = min(ends)
            self.found, self._held = True, ""
            return text[: end + length]
        kept = max((self._overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was held back: nothing more comes."""
        piece, self._held = self._held, ""
        return piece

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """How many of the last characters of the text begin the string."""
        longest = min(len(text), len(string) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
