"""Put a load on one server, from a process of its own: some streams at once, each timed token by token.

    python tests/bench/load.py parley http://127.0.0.1:7777 --secret pw --streams 8 --tokens 128

prints a line of JSON. It speaks Parley's `/ws` and OpenAI's `/v1/chat/completions`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx2
import websockets

Messages = list[dict[str, str]]
ENDS = ("response.completed", "response.incomplete", "response.failed")
GREEDY = {"temperature": 0, "repetition_penalty": 1}
LIMIT = 600.0  # seconds that a reply may take

TOPICS = ["the sea", "bread", "clocks", "mountains", "glass", "bees", "rivers", "paper"]


@dataclass
class Reply:
    """One reply: when it was requested and when each piece of text came, in seconds, and what the server counted."""

    asked_at: float
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0

    @property
    def first(self) -> float:
        return self.arrivals[0] - self.asked_at

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


Ask = Callable[[Messages, int], Coroutine[Any, Any, Reply]]


async def ask_parley(url: str, secret: str, messages: Messages, tokens: int) -> Reply:
    """Request a reply over a WebSocket of its own."""
    address = url.replace("http", "ws", 1) + "/ws"
    headers = {"Authorization": f"Bearer {secret}"}
    async with websockets.connect(address, subprotocols=["chat.v2"], additional_headers=headers) as socket:  # type: ignore[list-item]
        await socket.recv()  # parley.session.created
        request = {"type": "response.create", "input": messages, "store": False, "max_output_tokens": tokens}
        reply = Reply(time.perf_counter())
        await socket.send(json.dumps(request | GREEDY))
        async for frame in socket:
            event = json.loads(frame)
            if event["type"] == "response.output_text.delta":
                reply.arrivals.append(time.perf_counter())
                reply.text += event["delta"]
            elif event["type"] in ENDS:
                usage = event["response"]["usage"]
                reply.tokens, reply.prompt_tokens = usage["output_tokens"], usage["input_tokens"]
                return reply
            elif event["type"] == "error":
                raise RuntimeError(event)
    raise RuntimeError("the socket was closed in a reply")


async def ask_openai(client: httpx2.AsyncClient, model: str, messages: Messages, tokens: int) -> Reply:
    """Request a reply over an HTTP stream of its own. Without usage from the server, pieces count as tokens."""
    body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    reply = Reply(time.perf_counter())
    async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        if stream.status_code != 200:
            raise RuntimeError((await stream.aread()).decode())
        async for event in _events(stream.aiter_lines()):
            if piece := "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ())):
                reply.arrivals.append(time.perf_counter())
                reply.text += piece
            if usage := event.get("usage"):
                reply.tokens, reply.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
    reply.tokens = reply.tokens or len(reply.arrivals)
    return reply


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def story(number: int) -> Messages:
    """A question with a long answer; each number gives another question."""
    topic = TOPICS[number % len(TOPICS)]
    return [{"role": "user", "content": f"Write a long story number {number} about {topic}, with many details."}]


def long_prompt(words: int, number: int) -> Messages:
    """A message of about as many tokens as words; each number gives another message, from the first word on."""
    text = " ".join(f"{TOPICS[(number + i * i) % len(TOPICS)]} {i}" for i in range(words // 4))
    return [{"role": "user", "content": f"{number}: {text}\nWhat is this list about? Explain at length."}]


def speed(replies: list[Reply]) -> float:
    """Tokens per second of all replies together, from the first request to the last piece."""
    end = max(reply.arrivals[-1] for reply in replies)
    return sum(reply.tokens for reply in replies) / (end - min(reply.asked_at for reply in replies))


async def many(ask: Ask, streams: int, tokens: int, number: int = 0) -> list[Reply]:
    return await asyncio.gather(*(ask(story(number + i), tokens) for i in range(streams)))


async def throughput(ask: Ask, streams: int, tokens: int, number: int) -> dict[str, float]:
    replies = await many(ask, streams, tokens, number + 100 * streams)
    return {
        "speed": speed(replies),
        "tokens": sum(reply.tokens for reply in replies),
        "first": statistics.median(reply.first for reply in replies),
    }


async def first_token(ask: Ask, words: int, first: int) -> dict[str, float]:
    """Seconds to the first token of a long prompt, and to that of a second turn after it."""
    cold, warm, size = [], [], []
    for number in range(first, first + 3):
        messages = long_prompt(words, number)
        reply = await ask(messages, 16)
        cold.append(reply.first)
        turn = {"role": "user", "content": "Say it shorter."}
        again = await ask([*messages, {"role": "assistant", "content": reply.text}, turn], 16)
        warm.append(again.first)
        size.append(reply.prompt_tokens)
    return {
        "prompt_tokens": statistics.median(size),
        "cold": statistics.median(cold),
        "second_turn": statistics.median(warm),
    }


async def disturbed(ask: Ask, streams: int, words: int, number: int) -> dict[str, float]:
    """The gaps between tokens of running streams while a long prompt arrives, and those before it."""
    running = [asyncio.create_task(ask(story(number + i), 250)) for i in range(streams)]
    await asyncio.sleep(1.5)  # until they run
    began = time.perf_counter()
    long = await ask(long_prompt(words, number + 77), 1)
    ended = time.perf_counter()
    replies = await asyncio.gather(*running)
    quiet: list[float] = []
    busy: list[float] = []
    for reply in replies:
        for before, after in zip(reply.arrivals, reply.arrivals[1:], strict=False):
            (busy if before < ended and after > began else quiet).append(after - before)
    return {
        "prompt_tokens": long.prompt_tokens,
        "first_token": long.first,
        "p50": statistics.median(quiet),
        "p99_busy": statistics.quantiles(busy, n=100)[98],
        "gaps": len(busy),
    }


async def depth(ask: Ask, words: int, tokens: int, number: int) -> dict[str, float]:
    """Tokens per second of one stream after a prompt of some words."""
    reply = await ask(long_prompt(words, number + 55), tokens)
    return {
        "prompt_tokens": reply.prompt_tokens,
        "speed": (reply.tokens - 1) / (reply.arrivals[-1] - reply.arrivals[0]),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("kind", choices=["parley", "openai"])
    parser.add_argument("url")
    parser.add_argument("--secret", default="")
    parser.add_argument("--model", default="model")
    parser.add_argument("--what", choices=["throughput", "first_token", "disturbed", "depth"], default="throughput")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--words", type=int, default=1000)
    parser.add_argument("--number", type=int, default=0, help="each number gives other prompts")
    arguments = parser.parse_args()
    fresh = httpx2.Limits(max_keepalive_connections=0)  # the server of llama.cpp closes idle connections without notice
    client = httpx2.AsyncClient(
        base_url=arguments.url,
        timeout=LIMIT,
        trust_env=False,
        limits=fresh,
        headers={"Authorization": f"Bearer {arguments.secret}"} if arguments.secret else {},
    )
    async with client:

        async def ask(messages: Messages, tokens: int) -> Reply:
            if arguments.kind == "parley":
                return await ask_parley(arguments.url, arguments.secret, messages, tokens)
            return await ask_openai(client, arguments.model, messages, tokens)

        await ask(story(10**6), 8)  # a warm-up
        if arguments.what == "throughput":
            result = await throughput(ask, arguments.streams, arguments.tokens, arguments.number)
        elif arguments.what == "first_token":
            result = await first_token(ask, arguments.words, arguments.number)
        elif arguments.what == "disturbed":
            result = await disturbed(ask, arguments.streams, arguments.words, arguments.number)
        else:
            result = await depth(ask, arguments.words, arguments.tokens, arguments.number)
    print(json.dumps(result))


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(main(), LIMIT))
