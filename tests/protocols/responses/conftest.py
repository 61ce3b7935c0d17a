from __future__ import annotations

import pytest

from tests.support.fake_responses import FakeResponses


@pytest.fixture
async def fake() -> FakeResponses:
    """A response service whose replies the test writes."""
    return FakeResponses()
