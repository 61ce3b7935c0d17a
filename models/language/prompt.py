"""Turns messages into the token ids of a prompt, with the model's chat template."""

from __future__ import annotations

from bisect import bisect_left
from itertools import chain
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from models.errors import MessagesRejectedError
from models.messages import Message
from models.options import Options

CHARACTERS_PER_TOKEN = 8  # a text longer than this times the context rarely fits


class Prompt(NamedTuple):
    """The token ids of a prompt, and how many of the oldest messages after the system prompt are not in it."""

    ids: list[int]
    left_out: int


class PromptBuilder:
    """Makes prompts for a given context length. Not thread-safe, since tokenizers are not."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        self._tokenizer = tokenizer
        self._context = context

    def build(self, messages: list[Message], options: Options, keep_all: bool) -> Prompt:
        """The prompt of the messages. Unless `keep_all` is set, the oldest turns that do not fit are left out.

        It may still be longer than the context, if a single turn is longer. Raises MessagesRejectedError.
        """
        system, turns = _split_turns(messages)
        if options.instructions and not system:
            system = [{"role": "system", "content": options.instructions}]
        ids = self._render(system, turns)
        limit = self._context - min(options.max_output_tokens or self._context, self._context // 4)
        if keep_all or len(ids) <= limit:
            return Prompt(ids, 0)
        # Leave out more than needed, so that the next prompts have the same beginning and the prefix cache holds it.
        enough = (len(self._render(system, turns[-1:])) + limit) // 2
        first = bisect_left(
            range(len(turns) - 1), True, key=lambda first: len(self._render(system, turns[first:])) <= enough
        )
        return Prompt(self._render(system, turns[first:]), sum(map(len, turns[:first])))

    def _render(self, system: list[Message], turns: list[list[Message]]) -> list[int]:
        messages = _without_empty([*system, *chain.from_iterable(turns)])
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,  # type: ignore[arg-type]  # mypy does not accept a TypedDict as a dict
                add_generation_prompt=True,
                tokenize=False,
            )
        except TemplateError as error:
            raise MessagesRejectedError(f"the chat template of the model rejects these messages: {error}") from error
        text = str(rendered)
        # The beginning is enough to see that a text is too long. A megabyte would delay all users' prompts by a second.
        beginning = text[: CHARACTERS_PER_TOKEN * self._context]
        ids = self._tokenizer.encode(beginning, add_special_tokens=False)
        if len(ids) <= self._context and beginning != text:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        return list(ids)


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
