"""A chat that answers step by step, so that a test can look at the page in between."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from models.language.events import Event
from tests.support.scripted import ScriptedChat, ScriptedReply


class StepwiseChat(ScriptedChat):
    """Waits for `release` before an event of another kind than the one before it, and so before the end of a reply."""

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        kind: type[Event] | None = None
        async for event in super().events(reply):
            if kind not in (None, type(event)):
                await self.released()
            kind = type(event)
            yield event
