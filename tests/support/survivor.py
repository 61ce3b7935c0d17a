"""A server that a test kills."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn

from models.language.events import Event, TextDelta
from models.settings import Settings
from models.web.serving import listen
from server import create_app
from tests.support.scripted import ScriptedChat, ScriptedReply

DELTAS_PER_SECOND = 100


class EndlessChat(ScriptedChat):
    """Counts up and never ends, except where it is asked to "say" something."""

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        if reply.order == "say":
            async for event in super().events(reply):
                yield event
            return
        number = 0
        while True:
            number += 1
            yield TextDelta(f"{number} ")
            await asyncio.sleep(1 / DELTAS_PER_SECOND)


def serve(data: Path, secret: str, started: Connection) -> None:
    """Serve until killed. Sends the port first."""
    gc.freeze()  # what was there before the fork
    app = create_app(Settings(data=data, users={"ann": secret}, responses_per_user=8), EndlessChat().opened)
    listener = listen("127.0.0.1", 0)
    started.send(listener.getsockname()[1])
    config = uvicorn.Config(app, log_level="error", ws_per_message_deflate=False)
    uvicorn.Server(config).run([listener])
