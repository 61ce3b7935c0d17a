"""The chat template of a model: messages in, token ids of a prompt out.

Templates differ in the messages that they take. `ChatTemplate.of` tries the one of a tokenizer with marked messages, so
that a template that fails is told at the start, and one that drops the text of a message is noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from models.errors import MessagesRejectedError, ModelError, one_line
from models.language.model_files import model_label
from models.messages import Message, Role
from models.settings import Settings

ALL_ROLES: frozenset[Role] = frozenset({"system", "user", "assistant"})
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
        template._mark_built_control_tokens()
        if instructions:
            try:
                template.render([{"role": "system", "content": instructions}, *_marked("user")])
            except MessagesRejectedError as error:
                raise ModelError(f"PARLEY_INSTRUCTIONS cannot be used: {error}") from error
        return replace(template, reply_end=template._find_reply_end())

    def render(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a prompt for a reply to the messages. Raises MessagesRejectedError."""
        try:
            ids = self.tokenizer.apply_chat_template(
                self._with_parts(self.adapted(messages)),
                add_generation_prompt=True,
                return_dict=False,
                sanitize_control_tokens=True,
            )
        except Exception as error:  # Jinja's own errors, and any error that a template's expressions raise
            raise MessagesRejectedError(f"the chat template of the model rejects these messages: {error}") from error
        return list(ids)

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
            if adapted and adapted[-1]["role"] == role and (folded or one_system or self.alternating):
                adapted[-1] = {"role": role, "content": f"{adapted[-1]['content']}\n\n{message['content']}"}
            else:
                adapted.append({"role": role, "content": message["content"]})
            leading, folded = leads, folds
        return adapted

    def _with_parts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if message["role"] in self.parts
            else {**message}
            for message in messages
        ]

    def _text(self, messages: Sequence[Message], prompt: bool = True) -> str:
        """The text that the template writes; with `prompt`, up to where a reply begins."""
        text = self.tokenizer.apply_chat_template(
            self._with_parts(messages), tokenize=False, add_generation_prompt=prompt
        )
        return str(text)

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
        source = str(self.tokenizer.get_chat_template())
        roles: list[Role] = ["user", "assistant", "user"]
        text = self._text(_marked("system", *roles) if self.system else _marked(*roles))
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


def _marked(*roles: Role) -> list[Message]:
    """Messages whose texts are easy to find."""
    return [{"role": role, "content": f"parley-{index}-mark"} for index, role in enumerate(roles)]
