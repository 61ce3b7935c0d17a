"""Tells the probabilities of tokens with the text that they make."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from models.engine.sequence import Token
from models.language.events import Event, TextDelta
from models.language.token_bytes import TokenBytes
from models.output_item import TokenLogprob


class TextLogprobs:
    """Gives each delta of a reply's text the probabilities of its tokens, whose bytes, joined, are the text.

    Text waits until its last token is whole, so that a token is in one delta. What a stop string cuts off is in none.
    Tokens that are no text, and those of other parts of the reply, have no delta. Where a tokenizer writes a token in
    another way than by its bytes, as with bad bytes, the token is told with what it writes, as far as that is clear.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._of = token_bytes.of
        self._tokens: deque[TokenLogprob] = deque()  # whose text has not come
        self._text = b""  # whose tokens have not all come

    def push(self, token: Token) -> None:
        """Note a token, before the events that it brings."""
        if token.logprobs and not token.stops and (text := self._of(token.id)):
            chosen, best = token.logprobs
            self._tokens.append(TokenLogprob(text, chosen, [(self._of(each), value) for each, value in best]))

    def attach(self, events: Iterable[Event]) -> Iterator[Event]:
        """The same events, the text with its probabilities."""
        for event in events:
            if isinstance(event, TextDelta):
                self._text += event.text.encode()
                yield from self._delta()
            else:
                yield from self._delta(ends=True)
                if text := getattr(event, "text", ""):  # of another part
                    self._text = text.encode()
                    list(self._delta(ends=True))
                yield event

    def _delta(self, ends: bool = False) -> Iterator[Event]:
        """The text that has come, up to the last whole token, or all of it if it ends here."""
        told: list[TokenLogprob] = []
        text, before = self._text, len(self._text)
        while self._text and self._tokens:
            first = self._tokens[0].token
            if self._text.startswith(first):
                self._tell(told, first)
            elif first.startswith(self._text) and not ends:
                break
            elif first.startswith(self._text):
                self._tell(told, self._text)
            elif not self._skip_to_text():
                self._tell(told, self._text[: self._next_place()])
        if self._text and not self._tokens:  # the last token writes more than its bytes
            if told:
                told[-1] = told[-1]._replace(token=told[-1].token + self._text)
            self._text = b""
        while told and self._text and self._text[0] & 0xC0 == 0x80:  # inside a character
            self._tokens.appendleft(last := told.pop())
            self._text = last.token + self._text
        if text := text[: before - len(self._text)]:
            yield TextDelta(text.decode(), told)

    def _tell(self, told: list[TokenLogprob], text: bytes) -> None:
        """Tell the first token, which makes the first `text`."""
        told.append(self._tokens.popleft()._replace(token=text))
        self._text = self._text[len(text) :]

    def _skip_to_text(self) -> bool:
        """Drop what comes before the text, such as a space that is left out, or a marker. False if it is not there."""
        at = b"".join(each.token for each in self._tokens).find(self._text)
        if at < 0:
            return False
        while at >= len(self._tokens[0].token):
            at -= len(self._tokens.popleft().token)
        self._tokens[0] = self._tokens[0]._replace(token=self._tokens[0].token[at:])
        return True

    def _next_place(self) -> int | None:
        """Where the text of a later token begins; None if it is not there."""
        places = (self._text.find(each.token) for each in islice(self._tokens, 1, None))
        return next((place for place in places if place > 0), None)
