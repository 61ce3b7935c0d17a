"""How much may be stored."""

from __future__ import annotations

from dataclasses import dataclass

from models.settings import Settings

MAX_ITEMS = 10_000  # of a conversation, on all branches: a request may read all of them
MAX_CONVERSATION_BYTES = 2**24
MAX_PAGE, PAGE_BYTES = 100, 2**20  # of items that are read and encoded at once; more would delay everybody's stream
UNLISTED_SECONDS = 30 * 24 * 3600.0  # after its last use, a tree that no list shows is deleted


@dataclass(frozen=True)
class StorageLimits:
    """How many conversations a user may have, and how many bytes of text in all of them."""

    conversations: int = 10_000
    bytes: int = 2**30

    @classmethod
    def of(cls, settings: Settings) -> StorageLimits:
        """The limits of the settings."""
        return cls(settings.conversations_per_user, settings.bytes_per_user)
