"""Turns messages into the token ids of a prompt, with the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

from models.chat_request import ChatRequest
from models.engine.prefix_cache import common_prefix
from models.errors import ContextLengthExceededError, MessagesRejectedError, UnsupportedParameterError
from models.language.chat_template import ChatTemplate, tool_as_json
from models.language.history import (
    merged,
    split_turns,
    text_of,
    with_instructions,
    without_empty,
    without_old_reasoning,
)
from models.messages import Message, Role
from models.options import Options
from models.tools import Tool

BYTES_PER_TOKEN = 16  # a text with more bytes than this for each token of the context does not fit
TOOLS_TEXT = """You can call functions. These are the functions, one on each line:
{tools}
To call one, write:
<tool_call>
{{"name": "the name of the function", "arguments": {{"name of an argument": "its value"}}}}
</tool_call>"""


class Prompt(NamedTuple):
    """The token ids of a prompt.

    `left_out` is how many of the oldest messages after the system prompt are not in it. The first `public` tokens do
    not depend on what the user wrote: they are the chat template's and the operator's instructions.
    """

    ids: list[int]
    left_out: int
    public: int


class Inputs(NamedTuple):
    """What a chat template gets beside the messages."""

    tools: tuple[Tool, ...] = ()
    arguments: Mapping[str, Any] = {}


class PromptBuilder:
    """Makes prompts for a given context length. `instructions` are the operator's. Not thread-safe."""

    def __init__(self, template: ChatTemplate, context: int, instructions: str | None = None) -> None:
        self._template = template
        self._context = context
        self._instructions = instructions
        # By whether the instructions are the operator's, whether there are tools, and the effort of the reasoning.
        self._beginnings: dict[tuple[bool, bool, str | None], list[int]] = {}

    def build(self, request: ChatRequest) -> Prompt:
        """The prompt of a request. If it says so, the oldest turns that do not fit are left out.

        Raises MessagesRejectedError, ContextLengthExceededError or UnsupportedParameterError.
        """
        options, keep_all = request.options, not request.truncate
        inputs = self._inputs(request)
        messages: Sequence[Message] = request.messages
        if not (self._template.keeps_reasoning or request.template_arguments):
            messages = without_old_reasoning(messages)
        system, turns = split_turns(messages)
        by_operator = not system and options.instructions == self._instructions and not request.template_arguments
        system = with_instructions(system, options.instructions, self._instructions)
        system = self._with_tools(system, request)
        first = self._first_possible(system, turns, inputs, keep_all)
        ids = self._render(system, turns[first:], inputs)
        limit = self._context - min(options.max_output_tokens or self._context, self._context // 4)
        if turns and not keep_all and (first or len(ids) > limit):
            first += self._first_kept(turns[first:], len(ids), limit)
            ids = self._render(system, turns[first:], inputs)
            more = 1
            while len(ids) > limit and first < len(turns) - 1:  # the counts of single messages are not exact
                first, more = min(first + more, len(turns) - 1), 2 * more
                ids = self._render(system, turns[first:], inputs)
        if len(ids) >= self._context:
            raise self._too_long(len(ids), f"{len(ids)} tokens")
        return Prompt(ids, sum(map(len, turns[:first])), self._count_public(ids, by_operator, options, inputs))

    def complete(self, text: str) -> Prompt:
        """The prompt that is this text, in which control tokens may be named. Raises ContextLengthExceededError."""
        if (size := len(text.encode())) > BYTES_PER_TOKEN * self._context:
            raise self._too_long(0, f"{size} bytes")
        ids = list(self._template.tokenizer.encode(text))
        if len(ids) >= self._context:
            raise self._too_long(len(ids), f"{len(ids)} tokens")
        return Prompt(ids, 0, 0)

    def end_of(self, prompt: Prompt) -> str:
        """The text at the end of a prompt, where a template may have begun the reply."""
        return str(self._template.tokenizer.decode(prompt.ids[-16:]))

    def _inputs(self, request: ChatRequest) -> Inputs:
        """What the chat template gets. Raises UnsupportedParameterError."""
        tools = request.tools.callable
        if tools and request.tools.choice == "auto" and not self._template.tools:
            raise UnsupportedParameterError(
                "the chat template of this model knows no tools, so the model cannot choose to call one: set "
                'tool_choice to "required" or to one tool, or use a model whose chat template knows tools',
                "tools",
            )
        arguments = self._template.arguments(request.options.reasoning_effort, request.template_arguments)
        return Inputs(tools if self._template.tools else (), arguments)

    def _with_tools(self, system: list[Message], request: ChatRequest) -> list[Message]:
        """The system prompt, with the tools in it if the chat template does not write them."""
        if self._template.tools or not request.tools.callable:
            return system
        tools = "\n".join(_as_json(tool_as_json(tool)["function"]) for tool in request.tools.callable)
        text = TOOLS_TEXT.format(tools=tools)
        if not system:
            return [_message("system", text)]
        return [*system[:-1], _message("system", f"{system[-1]['content']}\n\n{text}")]

    def _first_possible(self, system: list[Message], turns: list[list[Message]], inputs: Inputs, keep_all: bool) -> int:
        """The first turn that may fit by its bytes, so that nothing longer is ever encoded."""
        always = _bytes(system) + _bytes_of_inputs(inputs)
        room = BYTES_PER_TOKEN * self._context - always
        sizes = list(accumulate(map(_bytes, reversed(turns)), initial=0))  # of no turn, of the last one, ...
        needed = len(turns) if keep_all else min(1, len(turns))
        if sizes[needed] > room:
            raise self._too_long(0, f"{always + sizes[needed]} bytes")
        return len(turns) - max(needed, sum(size <= room for size in sizes) - 1)

    def _first_kept(self, turns: list[list[Message]], size: int, limit: int) -> int:
        """The first turn that stays, if all turns need `size` tokens and have `limit`.

        It leaves out more than needed, so that the next prompts have the same beginning and the prefix cache holds it.
        """
        counts = [sum(len(self._encode(text_of(message))) for message in turn) for turn in turns]
        around = (size - sum(counts)) // (len(turns) + 1)  # tokens of the template around each turn
        sizes = [size, *(size - left_out for left_out in accumulate(count + around for count in counts[:-1]))]
        enough = (sizes[-1] + limit) // 2
        return next((first for first, size in enumerate(sizes) if size <= enough), len(turns) - 1)

    def _count_public(self, ids: list[int], by_operator: bool, options: Options, inputs: Inputs) -> int:
        """How many of the first tokens do not depend on the user; the instructions are the operator's or the user's."""
        key = by_operator, bool(inputs.tools), options.reasoning_effort
        beginning = self._beginnings.get(key)
        if beginning is None or ids[: len(beginning)] != beginning:  # a template may write the date
            beginning = self._beginnings[key] = self._beginning(*key)
        return common_prefix(ids, beginning)

    def _beginning(self, by_operator: bool, with_tools: bool, effort: str | None) -> list[int]:
        """The tokens at the beginning of all prompts with the operator's instructions, or with those of users."""
        beginning: list[int] | None = None
        for text in ("a", "b"):
            instructions = self._instructions if by_operator else text
            inputs = Inputs((Tool(text, text),) if with_tools else (), self._template.arguments(effort, {}))
            system = [_message("system", instructions)] if instructions else []
            question, reply = _message("user", text), _message("assistant", text)
            # With two questions too, since a template may write the system message before the last one.
            for turns in ([[question]], [[question, reply], [question]]):
                try:
                    ids = self._render(system, turns, inputs)
                except MessagesRejectedError:
                    return []
                beginning = ids if beginning is None else beginning[: common_prefix(ids, beginning)]
        return beginning or []

    def _render(self, system: list[Message], turns: list[list[Message]], inputs: Inputs) -> list[int]:
        messages = without_empty(merged([*system, *chain.from_iterable(turns)]))
        return self._template.render(messages, inputs.tools, inputs.arguments)

    def _encode(self, text: str) -> list[int]:
        return list(self._template.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _too_long(self, tokens: int, size: str) -> ContextLengthExceededError:
        return ContextLengthExceededError(  # litellm looks for the first words, LangChain for the last sentence
            f"This model's maximum context length is {self._context} tokens. However, the prompt has {size}, and the "
            "reply needs room too. The prompt is too long: shorten the messages",
            tokens,
        )


def _message(role: Role, content: str) -> Message:
    return {"role": role, "content": content}


def _bytes(messages: Iterable[Message]) -> int:
    """The size of the messages' text in UTF-8."""
    return sum(len(text_of(message).encode()) for message in messages)


def _bytes_of_inputs(inputs: Inputs) -> int:
    values = [*map(tool_as_json, inputs.tools), inputs.arguments]
    return sum(len(_as_json(value).encode()) for value in values if value)


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=dict)
    except RecursionError:
        raise MessagesRejectedError("the tools or the arguments of the chat template are nested too deeply") from None
