"""Two upstreams that a test answers for."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.fake_upstream import FakeUpstream


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream.running() as fake:
        yield fake


@pytest.fixture
async def other() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream.running() as fake:
        yield fake
