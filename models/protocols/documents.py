"""Conversations as files for download: Markdown and JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from models.errors import InvalidValueError
from models.messages import parts_of
from models.protocols.conversations import render_conversation
from models.protocols.responses.lists import render_node
from models.store.branches import Fork
from models.store.conversations import Conversation, Placed
from models.store.item import title_of
from models.validation import Json


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
    def piece(self, placed: Sequence[Placed]) -> str:
        """The next items."""

    @abstractmethod
    def end(self) -> str:
        """What comes after the items."""


class MarkdownDocument(Document):
    """A heading, and the messages of the current branch below each other; then the other branches, under headings."""

    suffix = "md"
    media_type = "text/markdown"

    def __init__(self, conversation: Conversation) -> None:
        super().__init__(conversation)
        self._beginnings: dict[str | None, str] = {}  # of the text of each node so far
        self._heading = ""  # of the next message, if it is the first one of a branch

    def beginning(self) -> str:
        return f"# {self._conversation.title}"

    def piece(self, placed: Sequence[Placed]) -> str:
        return "".join(map(self._told, placed))

    def end(self) -> str:
        return "\n"

    def _told(self, placed: Placed) -> str:
        item, fork = placed
        self._beginnings[item.id] = title_of([item])
        if fork:
            self._heading = f"\n\n## {self._said(fork)}"
        # A picture is as long as a hundred messages.
        parts = [part if isinstance(part, str) else "[picture]" for part in parts_of(item.message)]
        if not parts:
            return ""
        heading, self._heading = self._heading, ""
        return "\n\n".join([heading, f"**{item.role.capitalize()}**", *parts])

    def _said(self, fork: Fork) -> str:
        """Where a branch begins."""
        if (place := fork.instead_of or fork.after) is None:
            return "Another branch"
        text = self._beginnings.get(place)
        return f"{'Instead of' if fork.instead_of else 'After'} {f'“{text}”' if text else 'a message without text'}"


class JSONDocument(Document):
    """The object that the REST API has, with the items of the current branch, then those of the other branches."""

    suffix = "json"
    media_type = "application/json"

    def __init__(self, conversation: Conversation) -> None:
        super().__init__(conversation)
        self._last: dict[str | None, str | None] = {}  # the last item up to each node so far
        self._fork: Fork | None = None  # of the next item, if it is the first one of a branch
        self._has_branches = False
        self._separator = ""

    def beginning(self) -> str:
        fields = json.dumps(render_conversation(self._conversation), ensure_ascii=False, indent=2)
        return fields.removesuffix("\n}") + ',\n  "items": ['

    def piece(self, placed: Sequence[Placed]) -> str:
        return "".join(map(self._rendered, placed))

    def end(self) -> str:
        return "\n    ]}\n  ]\n}\n" if self._has_branches else '\n  ],\n  "branches": []\n}\n'

    def _rendered(self, placed: Placed) -> str:
        item, fork = placed
        self._fork = fork or self._fork
        items = render_node(item)
        self._last[item.id] = items[-1]["id"] if items else self._last.get(item.parent)
        return "".join(map(self._line, items))

    def _line(self, item: Json) -> str:
        beginning = self._branch(self._fork) if self._fork else self._separator
        self._fork, self._separator = None, ","
        return f"{beginning}\n    {json.dumps(item, ensure_ascii=False)}"

    def _branch(self, fork: Fork) -> str:
        """The beginning of a branch, and the end of what comes before."""
        before = "\n    ]}," if self._has_branches else '\n  ],\n  "branches": ['
        self._has_branches = True
        return f'{before}\n    {{"after": {json.dumps(self._last.get(fork.after))}, "items": ['


DOCUMENTS: Mapping[str, type[Document]] = {"markdown": MarkdownDocument, "json": JSONDocument}


def create_document(conversation: Conversation, format: str) -> Document:
    """The document of a conversation as `markdown` or `json`. Raises InvalidValueError."""
    if format not in DOCUMENTS:
        raise InvalidValueError("format must be markdown or json", "format")
    return DOCUMENTS[format](conversation)
