"""Conversations as files for download: Markdown and JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from models.errors import InvalidValueError
from models.protocols.conversations import render_conversation
from models.protocols.responses.lists import render_node
from models.store.conversations import Conversation
from models.store.item import Item


class Document(ABC):
    """A conversation as a file for download, made in pieces so that it is never whole in memory."""

    suffix: str
    media_type: str

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self.name = f"{conversation.id}.{self.suffix}"

    @abstractmethod
    def beginning(self) -> str:
        """What comes before the items."""

    @abstractmethod
    def piece(self, items: Sequence[Item]) -> str:
        """The next items."""

    @abstractmethod
    def end(self) -> str:
        """What comes after the items."""


class MarkdownDocument(Document):
    """A heading, and the messages below each other."""

    suffix = "md"
    media_type = "text/markdown"

    def beginning(self) -> str:
        return f"# {self._conversation.title}"

    def piece(self, items: Sequence[Item]) -> str:
        return "".join(f"\n\n**{item.role.capitalize()}**\n\n{item.content}" for item in items if item.content)

    def end(self) -> str:
        return "\n"


class JSONDocument(Document):
    """The object that the REST API has, with all items."""

    suffix = "json"
    media_type = "application/json"
    _is_empty = True  # has no items yet

    def beginning(self) -> str:
        fields = json.dumps(render_conversation(self._conversation), ensure_ascii=False, indent=2)
        return fields.removesuffix("\n}") + ',\n  "items": ['

    def piece(self, items: Sequence[Item]) -> str:
        rendered = [one for item in items for one in render_node(item)]
        lines = ",".join(f"\n    {json.dumps(one, ensure_ascii=False)}" for one in rendered)
        separator = "," if rendered and not self._is_empty else ""
        self._is_empty = self._is_empty and not rendered
        return separator + lines

    def end(self) -> str:
        return "\n  ]\n}\n"


DOCUMENTS: Mapping[str, type[Document]] = {"markdown": MarkdownDocument, "json": JSONDocument}


def create_document(conversation: Conversation, format: str) -> Document:
    """The document of a conversation as `markdown` or `json`. Raises InvalidValueError."""
    if format not in DOCUMENTS:
        raise InvalidValueError("format must be markdown or json", "format")
    return DOCUMENTS[format](conversation)
