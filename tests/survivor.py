"""A server to be killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn

from models.admission import Ticket
from models.item import Message
from models.options import Options
from models.reply import Delta, Event, Started, Usage
from models.settings import Settings
from server import create_app, listen
from tests.scripted import ScriptedChat


class EndlessChat(ScriptedChat):
    """Counts up and never comes to an end, but says what it is asked to "say"."""

    async def reply(
        self, ticket: Ticket, messages: Sequence[Message], options: Options, whole: bool = False
    ) -> AsyncGenerator[Event, None]:
        if messages[-1]["content"].startswith("say"):
            async for event in super().reply(ticket, messages, options):
                yield event
            return
        yield Started(Usage(1))
        number = 0
        while True:
            number += 1
            yield Delta(f"{number} ")
            await asyncio.sleep(0.001)


def serve(data: Path, secret: str, started: Connection) -> None:
    """Serve until killed; sends the port once it listens."""
    app = create_app(Settings(data=data, users={"ann": secret}), EndlessChat().opened)
    listener = listen("127.0.0.1", 0)
    started.send(listener.getsockname()[1])
    config = uvicorn.Config(app, log_level="error", ws_per_message_deflate=False)
    uvicorn.Server(config).run([listener])
