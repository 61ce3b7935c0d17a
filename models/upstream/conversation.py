"""The messages of a request, and how many of them fit the context of an upstream."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

from models.chat_request import ChatRequest
from models.language.history import (
    merged,
    split_turns,
    text_of,
    with_instructions,
    without_empty,
)
from models.messages import Message, parts_of

USUAL_BYTES = 3.0  # of text for each token, until an upstream has told how many tokens a prompt had
IMAGE_BYTES = 4000  # of text that need as many tokens as a picture, more or less
FEWEST_BYTES, MOST_BYTES = 0.5, 12.0


class Conversation:
    """The messages of a request. The oldest turns can be left out, but not the system prompt and the last turn.

    `instructions` are the operator's. A model that reads only text gets "[picture]" in place of each picture that
    another model has seen.
    """

    def __init__(self, request: ChatRequest, instructions: str | None, has_images: bool = False) -> None:
        system, turns = split_turns(request.messages if has_images else list(map(_without_images, request.messages)))
        system = with_instructions(system, request.options.instructions, instructions)
        self._system = [_message_of(system)] if system else []
        self._turns = turns
        sizes = [*map(_size, turns)]
        self._sizes = [*accumulate(reversed(sizes), initial=_size(self._system))][:0:-1]  # from each turn to the end
        self._first = 0  # turn that is not left out

    @property
    def messages(self) -> list[Message]:
        """The messages that are not left out; each reply is one message."""
        return without_empty(merged([*self._system, *chain.from_iterable(self._turns[self._first :])]))

    @property
    def left_out(self) -> int:
        """How many messages are left out."""
        return sum(map(len, self._turns[: self._first]))

    @property
    def size(self) -> int:
        """The bytes of text in the messages."""
        return self._sizes[self._first] if self._sizes else 0

    def shorten(self, size: float) -> bool:
        """Leave out more of the oldest turns, until there are at most `size` bytes. Returns whether any could be."""
        before, last = self._first, len(self._turns) - 1
        while self._first < last and (self._first == before or self.size > size):
            self._first += 1
        return self._first > before

    def fit(self, tokens: int, limit: int) -> None:
        """Leave out so many turns that the `tokens` that all of it has become less than a limit.

        It leaves out more than needed, so that the next prompts have the same beginning and a prefix cache holds it.
        """
        if tokens > limit:
            per_token = self.size / tokens
            self.shorten((self._sizes[-1] + limit * per_token) / 2)


class BytesPerToken:
    """How many bytes of text a token of one model has, as far as usage has told."""

    def __init__(self) -> None:
        self.value = USUAL_BYTES

    def learn(self, size: int, tokens: int) -> None:
        """A prompt of `size` bytes had so many tokens."""
        if tokens > 0 and size > 0:
            self.value = min(max(size / tokens, FEWEST_BYTES), MOST_BYTES)


def _size(messages: Sequence[Message]) -> int:
    """The bytes of text, but for reasoning: chat templates leave out that of earlier replies."""
    text = sum(len(text_of({**message, "reasoning": ""}).encode()) for message in messages)
    return text + IMAGE_BYTES * sum(len(message.get("images", ())) for message in messages)


def _without_images(message: Message) -> Message:
    if "images" not in message:
        return message
    text = message.copy()
    text["content"] = "\n".join(part if isinstance(part, str) else "[picture]" for part in parts_of(message))
    del text["images"]
    return text


def _message_of(system: Sequence[Message]) -> Message:
    """One system message, since many chat templates take no second one."""
    return {"role": "system", "content": "\n\n".join(message["content"] for message in system)}
