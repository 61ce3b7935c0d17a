"""Apps for `uvicorn --workers`, whose hub is scripted. Nothing here loads torch, since each process imports it anew."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import click
from starlette.applications import Starlette

from models.hub.program import run_hub
from server import create_app, lifespan
from tests.support.scripted import ScriptedChat


def worker() -> Starlette:
    """The app of a worker."""
    app = create_app()
    app.state.hub_command = [sys.executable, "-m", "tests.support.worker_apps"]
    return app


@asynccontextmanager
async def opens_scripted(app: Starlette) -> AsyncIterator[Any]:
    """A scripted chat, which SIGUSR1 releases. Who gets a slot is decided as with a real one."""
    chat = ScriptedChat()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, chat.release)
    yield chat


@click.command()
@click.option("--supervisor", type=int)
@click.argument("lock", type=int)
def hub(supervisor: int, lock: int) -> None:
    """Run the scripted hub."""
    print(f"hub [{os.getpid()}]", flush=True)
    app = create_app(open_chat=opens_scripted)
    asyncio.run(run_hub(app.state, lifespan(app), supervisor))


if __name__ == "__main__":
    hub()
