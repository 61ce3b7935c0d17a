"""A scripted app whose clock jumps when it is asked to. To be run by `python -m uvicorn tests.clock:app` alone."""

from __future__ import annotations

import time

offset = 0.0
real = time.time

# The system's clock is not for a test to set, and nobody else's is it: so what reads it is replaced in this process,
# before any of what it runs is imported.
time.time = lambda: real() + offset

from collections.abc import AsyncGenerator, AsyncIterator, Sequence  # noqa: E402
from contextlib import asynccontextmanager  # noqa: E402
from typing import Any  # noqa: E402

from starlette.applications import Starlette  # noqa: E402

from models.admission import Ticket  # noqa: E402
from models.item import Message  # noqa: E402
from models.options import Options  # noqa: E402
from models.reply import Delta, Event  # noqa: E402
from server import create_app  # noqa: E402
from tests.scripted import ScriptedChat  # noqa: E402


class JumpingChat(ScriptedChat):
    """Sets the clock by the number it is told, as soon as it has said half of that."""

    async def reply(
        self, ticket: Ticket, messages: Sequence[Message], options: Options, whole: bool = False
    ) -> AsyncGenerator[Event, None]:
        global offset
        async for event in super().reply(ticket, messages, options):
            yield event
            if isinstance(event, Delta):
                offset = float(messages[-1]["content"].split()[1])


@asynccontextmanager
async def opens_jumping(app: Starlette) -> AsyncIterator[Any]:
    yield JumpingChat()


app = create_app(open_chat=opens_jumping)
