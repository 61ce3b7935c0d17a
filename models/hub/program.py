"""What the process of the hub does from its start to its end."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Any

from models.errors import StartError
from models.hub.hub import Hub
from models.ops.shutdown import SIGNALS
from models.ops.waiting import wait_for_any, wait_process_ended

TELL_SECONDS = 5  # for a worker to connect, and to hear why the start has failed


async def run_hub(state: Any, lifespan: AbstractAsyncContextManager[object], supervisor: int) -> None:
    """Run replies for workers, until a signal, or until there is nobody left to run them for.

    `lifespan` puts the parts of the server on `state`. Exits with 1 if it cannot start.
    """
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in SIGNALS:  # `Shutdown` calls this after it has drained, as it does with uvicorn's handlers
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(ended.set))
    state.is_hub = True
    async with Hub.listening(state.settings, supervisor) as hub:
        try:
            async with lifespan:
                hub.open(state)
                stopping = asyncio.create_task(_stop_with_workers(state, hub, supervisor))
                await ended.wait()
                stopping.cancel()
        except StartError as error:
            hub.fail(str(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(TELL_SECONDS):
                    await hub.wait_told()
            sys.exit(1)


async def _stop_with_workers(state: Any, hub: Hub, supervisor: int) -> None:
    """Drain when all workers do, and end all replies at once if they do not wait either."""
    supervisor_ended = partial(wait_process_ended, supervisor)
    await wait_for_any(hub.unused.wait, supervisor_ended)
    hub.refuse_workers()
    state.shutdown.stop()
    await wait_for_any(hub.hurried.wait, supervisor_ended)
    state.shutdown.stop(at_once=True)
