"""The chat template of a model: messages in, token ids of a prompt out.

Templates differ in the messages that they take. `ChatTemplate.of` tries the one of a tokenizer with marked messages, so
that a template that fails is told at the start, and one that drops the text of a message is noticed. In the same way it
finds out what a template knows of tools and reasoning.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import mark_control_tokens

from models.errors import MessagesRejectedError, ModelError, UnsupportedParameterError, one_line
from models.language.call_style import CallStyle, styles
from models.language.history import calls_as_text, can_join, text_of
from models.language.model_files import model_label
from models.language.reasoning_effort import effort_arguments
from models.messages import Message, Role
from models.settings import Settings
from models.tools import Tool

ALL_ROLES: frozenset[Role] = frozenset({"system", "user", "assistant"})
TOOLS_VARIABLES = ("tools", "xml_tools")  # of templates
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of messages
RESERVED = {  # names that no argument of a template may have
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    *("messages", "xml_tools", "raise_exception", "strftime_now", "namespace", "range", "dict"),
} - {"documents"}
PARTS: tuple[frozenset[Role], ...] = (frozenset(), ALL_ROLES, frozenset({"system", "user"}))  # what is tried, in order


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, and which messages it takes.

    `render` changes messages into what the template takes, and loses no text. No text of a message becomes a control
    token. Not thread-safe, since tokenizers are not.
    """

    tokenizer: PreTrainedTokenizerBase
    parts: frozenset[Role] = frozenset()  # the roles whose content must be a list of parts
    system: bool = True  # takes a system message at the beginning
    later_system: bool = True  # takes system messages anywhere
    alternating: bool = False  # refuses two messages of one role in a row
    reply_end: int | None = None  # the token after the text of a reply
    tools: str | None = None  # the variable that it takes tools in
    calls: CallStyle | None = None  # how it takes calls of tools and their results; None if it knows none
    keeps_reasoning: bool = False  # writes the reasoning of earlier replies into the prompt
    efforts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the arguments of each reasoning effort

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, instructions: str | None = None) -> ChatTemplate:
        """Find out what the template of a tokenizer takes. `instructions` are the operator's. Raises ModelError."""
        forms = [cls(tokenizer, parts=parts) for parts in PARTS]
        failures = [form._failure("user") or form._failure("user", "assistant", "user") for form in forms]
        working = [form for form, failure in zip(forms, failures, strict=True) if failure is None]
        if not working:
            raise ModelError(f"the chat template fails: {failures[0]}")
        template = next((form for form in working if form._takes("system", "user", "assistant", "user")), working[0])
        system = template._takes("system", "user", "assistant", "user")
        template = replace(
            template,
            system=system,
            later_system=system and template._takes("system", "system", "user", "assistant", "system", "user"),
            alternating=not (
                template._takes("user", "user") and template._takes("user", "assistant", "assistant", "user")
            ),
        )
        template = template._with_tools()
        template = replace(
            template,
            keeps_reasoning=template._keeps_reasoning(),
            efforts=effort_arguments(template.source, template._works_with),
        )
        template._mark_built_control_tokens()
        if instructions:
            try:
                template.render([{"role": "system", "content": instructions}, *_marked("user")])
            except MessagesRejectedError as error:
                raise ModelError(f"PARLEY_INSTRUCTIONS cannot be used: {error}") from error
        return replace(template, reply_end=template._find_reply_end())

    @property
    def source(self) -> str:
        return str(self.tokenizer.get_chat_template())

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), arguments: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The token ids of a prompt for a reply to the messages. Raises MessagesRejectedError.

        Calls of tools and their results become text where the template does not take them.
        """
        try:
            try:
                return self._ids(messages, tools, arguments or {})
            except Exception:  # as below
                if self.calls is None or not _has_calls(messages):
                    raise
            return replace(self, calls=None)._ids(messages, tools, arguments or {})
        except Exception as error:  # Jinja's own errors, and any error that a template's expressions raise
            raise MessagesRejectedError(f"the chat template of the model rejects these messages: {error}") from error

    def arguments(self, effort: str | None, own: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the template for an effort, and the request's own. Raises UnsupportedParameterError.

        An effort that the template does not know changes nothing.
        """
        for name in own:
            if name in RESERVED or name in self.tokenizer.special_tokens_map:
                raise UnsupportedParameterError(
                    f"chat_template_kwargs.{name} is not allowed: it is no argument of a chat template, or the server "
                    "sets it itself",
                    f"chat_template_kwargs.{name}",
                )
        return {**self.efforts.get(effort or "", {}), **own}

    def _ids(self, messages: Sequence[Message], tools: Sequence[Tool], arguments: Mapping[str, Any]) -> list[int]:
        ids = self.tokenizer.apply_chat_template(
            self._marked_keys(self._as_dicts(messages)),
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,
            **self._marked_keys({**self._tools_argument(tools), **arguments}),
        )
        return list(ids)

    def _tools_argument(self, tools: Sequence[Tool]) -> dict[str, Any]:
        return {self.tools: [tool_as_json(tool) for tool in tools]} if self.tools and tools else {}

    def _marked_keys(self, value: Any) -> Any:
        """The value with the control tokens in its keys marked, which `sanitize_control_tokens` does not do."""
        if isinstance(value, Mapping):
            marked = (mark_control_tokens(key, self._control_tokens) for key in value)
            return dict(zip(marked, map(self._marked_keys, value.values()), strict=True))
        return [*map(self._marked_keys, value)] if isinstance(value, (list, tuple)) else value

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        contents = sorted((token.content for token in self._added_tokens().values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, contents)) or "(?!)")

    def adapted(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in roles and in an order that the template takes.

        A system message that it does not take becomes the beginning of the next user message. Neighbours of one role
        are joined where roles must alternate.
        """
        adapted: list[Message] = []
        leading = folded = False  # of the message before
        for index, message in enumerate(messages):
            role = message["role"]
            leads = role == "system" and (leading or index == 0)
            folds = role == "system" and not (self.later_system or (self.system and leads))
            if folds:
                role = "user"
            one_system = role == "system" and not self.later_system
            joins = folded or one_system or self.alternating
            if joins and adapted and adapted[-1]["role"] == role and can_join(adapted[-1], message):
                adapted[-1] = {**adapted[-1], "content": f"{adapted[-1]['content']}\n\n{message['content']}"}
            else:
                adapted.append({**message, "role": role})
            leading, folded = leads, folds
        return adapted

    def _as_dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as the template takes them."""
        if self.calls is None:
            messages = calls_as_text(messages)
        adapted = self.adapted(messages)
        shown = (self.calls or CallStyle()).as_dicts(adapted, self._reasoning_keys())
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if message["role"] in self.parts
            else message
            for message in shown
        ]

    def _text(
        self,
        messages: Sequence[Message],
        prompt: bool = True,
        tools: Sequence[Tool] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that the template writes; with `prompt`, up to where a reply begins."""
        text = self.tokenizer.apply_chat_template(
            self._as_dicts(messages),
            tokenize=False,
            add_generation_prompt=prompt,
            **self._tools_argument(tools),
            **(arguments or {}),
        )
        return str(text)

    def _reasoning_keys(self) -> list[str]:
        """Where the template looks for the reasoning of a message."""
        return [key for key in REASONING_KEYS if re.search(rf"\b{key}\b", self.source)]

    def _with_tools(self) -> ChatTemplate:
        """This template, with what it knows of tools and of calls."""
        takers = [replace(self, tools=name) for name in TOOLS_VARIABLES]
        template = next((taker for taker in takers if MARKED_TOOL.name in taker._written(_marked("user"))), self)
        tool: frozenset[Role] = frozenset({"tool"})
        parts = {self.parts, self.parts | tool} if self.parts else {self.parts}
        # Some templates drop the text before a call, wherever it stands: that is no reason to write calls as text.
        for calls, style, roles in product((MARKED_CALLS, _without_text(MARKED_CALLS)), styles(), parts):
            known = replace(template, calls=style, parts=roles)
            # A template may write less of what comes before the last question, and the results may come last.
            if known._writes(calls) and known._writes([*calls, *_marked_end()]):
                return known
        return template

    def _writes(self, messages: Sequence[Message]) -> bool:
        """Whether the template writes all texts of marked messages."""
        text = self._written(messages)
        return all(mark in text for message in messages for mark in MARK.findall(text_of(message)))

    def _written(self, messages: Sequence[Message]) -> str:
        """The text of messages and a marked tool; empty if the template refuses them."""
        with suppress(Exception):  # as in `render`
            return self._text(messages, tools=[MARKED_TOOL])
        return ""

    def _keeps_reasoning(self) -> bool:
        """Whether the template writes the reasoning of a reply before the last question."""
        question, reply, other = _marked("user", "assistant", "user")
        with suppress(Exception):  # as in `render`
            return THOUGHT in self._text([question, {**reply, "reasoning": THOUGHT}, other])
        return False

    def _works_with(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the template takes some arguments."""
        with suppress(Exception):  # as in `render`
            return bool(self._text(_marked("user"), arguments=arguments))
        return False

    def _failure(self, *roles: Role) -> str | None:
        """What goes wrong with messages of these roles; None if the template writes all their text."""
        messages = _marked(*roles)
        try:
            text = self._text(messages)
        except Exception as error:  # as in `render`
            return one_line(error)
        lost = [message["role"] for message in messages if message["content"] not in text]
        return f"it drops the text of a message (role {lost[0]})" if lost else None

    def _takes(self, *roles: Role) -> bool:
        """Whether the template takes messages of these roles."""
        return self._failure(*roles) is None

    def _added_tokens(self) -> dict[int, AddedToken]:
        """The tokens outside of the tokenizer's model, with their ids: control tokens, special or not, and others."""
        added = self.tokenizer.added_tokens_decoder
        return {token_id: token for token_id, token in added.items() if token.content.strip()}

    def _mark_built_control_tokens(self) -> None:
        """Tell the tokenizer which control tokens its template builds from pieces, such as '<|' + role + '|>'.

        By itself it knows special tokens, and those that are in the text of the template.
        """
        source = self.source
        roles: list[Role] = ["user", "assistant", "user"]
        text = self._text(_marked("system", *roles) if self.system else _marked(*roles))
        if self.calls:
            text += self._text(MARKED_CALLS, tools=[MARKED_TOOL])
        contents = [token.content for token in self._added_tokens().values()]
        if any(content in text and content not in source for content in contents):
            self.tokenizer.chat_control_tokens = [
                *(self.tokenizer.chat_control_tokens or ()),
                *(content for content in contents if content in text or content in source),
            ]

    def _find_reply_end(self) -> int | None:
        """The token that the template writes after the text of a reply, else the one before the next message."""
        question, reply, _ = messages = _marked("user", "assistant", "user")
        texts = [self._text(messages)]
        with suppress(Exception):  # it may want a question at the end
            texts.insert(0, self._text([question, reply], prompt=False))
        ids = {token.content: token_id for token_id, token in self._added_tokens().items()}
        for text in texts:
            rest = text.rpartition(reply["content"])[2].lstrip()
            if found := [content for content in ids if rest.startswith(content)]:
                return ids[max(found, key=len)]
        return None


def read_chat_template(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
    """Set the chat template of the settings, if any, and try it. Raises ModelError."""
    label = model_label(settings)
    if settings.chat_template is not None:
        try:
            tokenizer.chat_template = settings.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ModelError(f"PARLEY_CHAT_TEMPLATE cannot be read: {one_line(error)}") from error
    if isinstance(named := tokenizer.chat_template, dict):  # such as one for tools beside the default one
        if len(named) > 1 and "default" not in named:
            raise ModelError(
                f"{label} has several chat templates and none is the default ({', '.join(sorted(named))}): "
                "set PARLEY_CHAT_TEMPLATE to a Jinja file"
            )
        tokenizer.chat_template = named.get("default") or next(iter(named.values()), None)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{label} has no chat template, so it may not be a chat model: choose an instruction-tuned one, or set "
            "PARLEY_CHAT_TEMPLATE to a Jinja file"
        )
    try:
        ChatTemplate.of(tokenizer, settings.options.get("instructions"))
    except ModelError as error:
        raise ModelError(f"{label}: {error}; set PARLEY_CHAT_TEMPLATE to a Jinja file") from error


def tool_as_json(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates take it. All fields are there, since some templates read them unasked."""
    function = {
        "name": tool.name,
        "description": tool.description or "",
        "parameters": dict(tool.parameters or {"type": "object", "properties": {}}),
    }
    return {"type": "function", "function": function}


def _has_calls(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


# Messages whose texts are easy to find

MARK = re.compile(r"parley-\d+-mark")
THOUGHT = "parley-thought"
MARKED_TOOL = Tool("parley-90-mark", "parley-91-mark")
MARKED_CALLS: list[Message] = [
    {"role": "user", "content": "parley-10-mark"},
    {
        "role": "assistant",
        "content": "parley-11-mark",
        "reasoning": THOUGHT,
        "tool_calls": [
            {"id": "call_1", "name": "parley-12-mark", "arguments": '{"a": "parley-13-mark"}'},
            {"id": "call_2", "name": "parley-14-mark", "arguments": '{"b": "parley-15-mark"}'},
        ],
    },
    {"role": "tool", "content": "parley-16-mark", "tool_call_id": "call_1"},
    {"role": "tool", "content": "parley-17-mark", "tool_call_id": "call_2"},
]


def _without_text(messages: list[Message]) -> list[Message]:
    return [{**message, "content": ""} if message.get("tool_calls") else message for message in messages]


def _marked_end() -> list[Message]:
    return [{"role": "assistant", "content": "parley-18-mark"}, {"role": "user", "content": "parley-19-mark"}]


def _marked(*roles: Role) -> list[Message]:
    return [{"role": role, "content": f"parley-{index}-mark"} for index, role in enumerate(roles)]
