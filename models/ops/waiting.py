"""Waits for the first of several events, and for the end of other processes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

POLL_SECONDS = 0.5


async def wait_for_any(*waits: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Wait until one of some coroutine functions returns."""
    waiting = [asyncio.create_task(wait()) for wait in waits]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


async def wait_process_ended(pid: int) -> None:
    """Wait until a process has ended, which need not be a child of this one."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # only Linux has it, and not in every container
        return await poll_process_ended(pid)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def poll_process_ended(pid: int, seconds: float = POLL_SECONDS) -> None:
    """Look every few moments whether a process still exists, until it does not."""
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        await asyncio.sleep(seconds)
