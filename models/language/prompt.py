"""Turns messages into the token ids of a prompt, with the model's chat template."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, chain
from typing import NamedTuple

from models.engine.prefix_cache import common_prefix
from models.errors import ContextLengthExceededError, MessagesRejectedError
from models.language.chat_template import ChatTemplate
from models.messages import Message, Role
from models.options import Options

BYTES_PER_TOKEN = 16  # a text with more bytes than this for each token of the context does not fit


class Prompt(NamedTuple):
    """The token ids of a prompt.

    `left_out` is how many of the oldest messages after the system prompt are not in it. The first `public` tokens do
    not depend on what the user wrote: they are the chat template's and the operator's instructions.
    """

    ids: list[int]
    left_out: int
    public: int


class PromptBuilder:
    """Makes prompts for a given context length. `instructions` are the operator's. Not thread-safe."""

    def __init__(self, template: ChatTemplate, context: int, instructions: str | None = None) -> None:
        self._template = template
        self._context = context
        self._instructions = instructions
        self._beginnings: dict[bool, list[int]] = {}  # by whether the instructions are the operator's

    def build(self, messages: list[Message], options: Options, keep_all: bool) -> Prompt:
        """The prompt of the messages. Unless `keep_all` is set, the oldest turns that do not fit are left out.

        Raises MessagesRejectedError or ContextLengthExceededError.
        """
        system, turns = _split_turns(messages)
        by_operator = not system and options.instructions == self._instructions
        if options.instructions and not system:
            system = [{"role": "system", "content": options.instructions}]
        first = self._first_possible(system, turns, keep_all)
        ids = self._render(system, turns[first:])
        limit = self._context - min(options.max_output_tokens or self._context, self._context // 4)
        if turns and not keep_all and (first or len(ids) > limit):
            first += self._first_kept(turns[first:], len(ids), limit)
            ids = self._render(system, turns[first:])
            more = 1
            while len(ids) > limit and first < len(turns) - 1:  # the counts of single messages are not exact
                first, more = min(first + more, len(turns) - 1), 2 * more
                ids = self._render(system, turns[first:])
        if len(ids) >= self._context:
            raise self._too_long(len(ids), f"{len(ids)} tokens")
        return Prompt(ids, sum(map(len, turns[:first])), self._count_public(ids, by_operator))

    def _first_possible(self, system: list[Message], turns: list[list[Message]], keep_all: bool) -> int:
        """The first turn that may fit by its bytes, so that nothing longer is ever encoded."""
        room = BYTES_PER_TOKEN * self._context - _bytes(system)
        sizes = list(accumulate(map(_bytes, reversed(turns)), initial=0))  # of no turn, of the last one, ...
        needed = len(turns) if keep_all else min(1, len(turns))
        if sizes[needed] > room:
            raise self._too_long(0, f"{_bytes(system) + sizes[needed]} bytes")
        return len(turns) - max(needed, sum(size <= room for size in sizes) - 1)

    def _first_kept(self, turns: list[list[Message]], size: int, limit: int) -> int:
        """The first turn that stays, if all turns need `size` tokens and have `limit`.

        It leaves out more than needed, so that the next prompts have the same beginning and the prefix cache holds it.
        """
        counts = [sum(len(self._encode(message["content"])) for message in turn) for turn in turns]
        around = (size - sum(counts)) // (len(turns) + 1)  # tokens of the template around each turn
        sizes = [size, *(size - left_out for left_out in accumulate(count + around for count in counts[:-1]))]
        enough = (sizes[-1] + limit) // 2
        return next((first for first, size in enumerate(sizes) if size <= enough), len(turns) - 1)

    def _count_public(self, ids: list[int], by_operator: bool) -> int:
        """How many of the first tokens do not depend on the user; the instructions are the operator's or the user's."""
        beginning = self._beginnings.get(by_operator)
        if beginning is None or ids[: len(beginning)] != beginning:  # a template may write the date
            beginning = self._beginnings[by_operator] = self._beginning(by_operator)
        return common_prefix(ids, beginning)

    def _beginning(self, by_operator: bool) -> list[int]:
        """The tokens at the beginning of all prompts with the operator's instructions, or with those of users."""
        beginning: list[int] | None = None
        for text in ("a", "b"):
            instructions = self._instructions if by_operator else text
            system = [_message("system", instructions)] if instructions else []
            question, reply = _message("user", text), _message("assistant", text)
            # With two questions too, since a template may write the system message before the last one.
            for turns in ([[question]], [[question, reply], [question]]):
                try:
                    ids = self._render(system, turns)
                except MessagesRejectedError:
                    return []
                beginning = ids if beginning is None else beginning[: common_prefix(ids, beginning)]
        return beginning or []

    def _render(self, system: list[Message], turns: list[list[Message]]) -> list[int]:
        return self._template.render(_without_empty([*system, *chain.from_iterable(turns)]))

    def _encode(self, text: str) -> list[int]:
        return list(self._template.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _too_long(self, tokens: int, size: str) -> ContextLengthExceededError:
        return ContextLengthExceededError(
            f"the prompt has {size}, and the context holds {self._context} tokens, including the reply: shorten the "
            "message",
            tokens,
        )


def _message(role: Role, content: str) -> Message:
    return {"role": role, "content": content}


def _bytes(messages: Iterable[Message]) -> int:
    """The size of the messages' text in UTF-8."""
    return sum(len(message["content"].encode()) for message in messages)


def _split_turns(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system prompt, and the turns. A turn is a user message and its reply, after any system messages."""
    start = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns: list[list[Message]] = []
    for message in messages[start:]:
        if not turns or (message["role"] != "assistant" and turns[-1][-1]["role"] != "system"):
            turns.append([])
        turns[-1].append(message)
    return messages[:start], turns


def _without_empty(messages: list[Message]) -> list[Message]:
    """The messages without empty replies.

    Two messages of one role around an empty reply become one message, since many templates want the roles to alternate.
    """
    kept: list[Message] = []
    skipped = False
    for message in messages:
        if message["content"] and skipped and kept and kept[-1]["role"] == message["role"]:
            kept[-1] = {"role": message["role"], "content": f"{kept[-1]['content']}\n\n{message['content']}"}
        elif message["content"]:
            kept.append(message)
        skipped = not message["content"]
    return kept
