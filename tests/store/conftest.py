"""Stores of conversations in an empty database."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from models.store.conversations import Conversations
from tests.support.trees import ANSWER, QUESTION, SYSTEM, begin


@pytest.fixture
def store(empty_tables: AsyncEngine) -> Conversations:
    return Conversations(empty_tables)


@pytest.fixture
async def anns_store(store: Conversations) -> Conversations:
    """The store with conv_1, which belongs to ann, and whose leaf is resp_1."""
    await begin(store, "conv_1", SYSTEM, QUESTION, ANSWER)
    return store
