"""What was said."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Literal, TypedDict


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(eq=False)
class Conversation:
    """Messages in order, and whether a reply to them is being made. Lives as long as its connection."""

    id: str = field(default_factory=lambda: f"conv_{uuid.uuid4().hex}")
    messages: list[Message] = field(default_factory=list)
    busy: bool = False
