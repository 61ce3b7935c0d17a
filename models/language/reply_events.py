"""The events of a reply: tokens in, events out, until a stop string or the last token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from models.language.byte_detokenizer import ByteDetokenizer
from models.language.detokenizer import UNDECODABLE, Detokenizer
from models.language.events import ArgumentsDelta, Done, Event, ReasoningDelta, TextDelta
from models.language.replies.parser import ReplyParser
from models.language.stop_strings import StopStrings
from models.messages import FinishReason


class ReplyEvents:
    """Text of the tokens, parts of the text, and an end before a stop string in the answer.

    `Done` is the last event. No event has half a character, and none has a stop string: they are looked for in each
    text of the answer by itself, and not in reasoning or arguments.
    """

    def __init__(self, detokenizer: Detokenizer | ByteDetokenizer, parser: ReplyParser, stop: tuple[str, ...]) -> None:
        self.reasoning_tokens = 0
        self._detokenizer = detokenizer
        self._parser = parser
        self._stop = stop
        self._strings = StopStrings(stop)

    def push(self, token_id: int | None, finish_reason: FinishReason | None) -> list[Event]:
        """The events that are certain after a token. `finish_reason` comes with the last one. None is a stop token."""
        thought = self._parser.thinking
        events = [*self._before_stop(self._parts(token_id, finish_reason))]
        self.reasoning_tokens += thought or self._parser.thinking
        if finish_reason and not self._strings.found:
            events += self._held()
        if self._strings.found or self._parser.ended:
            return [*events, Done("stop")]
        return [*events, Done(finish_reason)] if finish_reason else events

    def _parts(self, token_id: int | None, finish_reason: FinishReason | None) -> Iterator[Event]:
        if token_id is not None:
            yield from self._parser.push(self._detokenizer.push(token_id))
        if finish_reason:
            rest = self._detokenizer.flush()
            yield from self._parser.push(rest if finish_reason == "stop" else rest.rstrip(UNDECODABLE))
            yield from self._parser.end()

    def _before_stop(self, events: Iterable[Event]) -> Iterator[Event]:
        """The events before a stop string. Text that may begin one is held back until it goes on."""
        for event in events:
            if not isinstance(event, TextDelta):
                yield from self._held()
                yield event
            elif text := self._strings.push(event.text):
                yield TextDelta(text)
            if self._strings.found:
                return

    def _held(self) -> Iterator[Event]:
        """The text that was held back and is no stop string, since it ends here."""
        held, self._strings = self._strings.flush(), StopStrings(self._stop)
        if held:
            yield TextDelta(held)


def joined(events: Iterable[Event]) -> Iterator[Event]:
    """The events, with neighbouring pieces of one text as one piece: a client that is behind gets fewer of them."""
    last: Event | None = None
    for event in events:
        match last, event:
            case TextDelta(text, logprobs), TextDelta():
                both = None if logprobs is None else [*logprobs, *(event.logprobs or ())]
                last = TextDelta(text + event.text, both)
            case ReasoningDelta(text), ReasoningDelta(more):
                last = ReasoningDelta(text + more)
            case ArgumentsDelta(text), ArgumentsDelta(more):
                last = ArgumentsDelta(text + more)
            case _:
                if last:
                    yield last
                last = event
    if last:
        yield last
