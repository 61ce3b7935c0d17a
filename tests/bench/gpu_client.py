"""The client of `gpu_socket.py`: some sockets at once, in a process of its own, which needs `websockets` only.

It reads a load from each line of its input, and prints what came of it, both as JSON. Times are of the system's
monotonic clock, which all processes share.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import string
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import websockets
from websockets.typing import Subprotocol

PROTOCOL = Subprotocol("chat.v2")
ENDS = ("response.completed", "response.incomplete", "response.failed")
OPENING = 8  # sockets at once: a server lets few strangers wait for their handshake
GREEDY = {"temperature": 0, "repetition_penalty": 1}


@dataclass
class Reply:
    """When a reply was requested, when its pieces came, and what the server counted."""

    asked_at: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0


async def ask(
    address: str, user: int, text: str, tokens: int, opening: asyncio.Semaphore, ready: asyncio.Barrier
) -> Reply:
    """One reply over a socket of its own, requested when all sockets are open."""
    headers = {"Authorization": f"Bearer {secret(user)}"}
    options: dict[str, Any] = {"compression": None, "max_queue": None, "proxy": None, "open_timeout": 30}
    async with AsyncExitStack() as stack:
        async with opening:
            connecting = websockets.connect(address, subprotocols=[PROTOCOL], additional_headers=headers, **options)
            socket = await stack.enter_async_context(connecting)
            await socket.recv()  # parley.session.created
        await ready.wait()
        message = {"role": "user", "content": text}
        request = {"input": [message], "store": False, "max_output_tokens": tokens} | GREEDY
        reply = Reply(time.perf_counter())
        await socket.send(json.dumps({"type": "response.create"} | request))
        async for frame in socket:
            event = json.loads(frame)
            if event["type"] == "response.output_text.delta":
                reply.arrivals.append(time.perf_counter())
            elif event["type"] in ENDS:
                usage = event["response"]["usage"]
                reply.tokens, reply.prompt_tokens = usage["output_tokens"], usage["input_tokens"]
                return reply
            elif event["type"] == "error":
                raise RuntimeError(event)
    raise RuntimeError("the socket was closed in a reply")


def secret(user: int) -> str:
    return f"secret-of-user-{user}"


def random_text(length: int, number: int) -> str:
    return "".join(random.Random(number).choices(string.ascii_lowercase, k=length))


def result(replies: list[Reply]) -> dict[str, float]:
    """What a load came to; speeds in tokens per second, moments and times in seconds."""
    tokens, pieces = sum(reply.tokens for reply in replies), sum(len(reply.arrivals) for reply in replies)
    asked_at = min(reply.asked_at for reply in replies)
    ended_at = max(reply.arrivals[-1] for reply in replies)
    start, end = max(reply.arrivals[0] for reply in replies), min(reply.arrivals[-1] for reply in replies)
    inside = sum(start < moment <= end for reply in replies for moment in reply.arrivals)
    first = sorted(reply.arrivals[0] - reply.asked_at for reply in replies)
    return {
        "start": start,
        "end": end,
        "decode": inside / (end - start) * tokens / pieces if end > start else 0.0,  # while all decode
        "whole": tokens / (ended_at - asked_at),
        "first": statistics.median(first),
        "last first": first[-1],
        "prompt": replies[0].prompt_tokens,
        "tokens": tokens,
        "pieces": pieces,
    }


async def main(address: str) -> None:
    number = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        load = json.loads(line)
        texts = [random_text(load["letters"], number + stream) for stream in range(load["streams"])]
        number += len(texts)
        opening, ready = asyncio.Semaphore(OPENING), asyncio.Barrier(len(texts))
        asking = [ask(address, user, text, load["tokens"], opening, ready) for user, text in enumerate(texts)]
        began, used = time.perf_counter(), time.process_time()
        replies = await asyncio.gather(*asking)
        share = (time.process_time() - used) / (time.perf_counter() - began)
        print(json.dumps(result(replies) | {"client": share}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
