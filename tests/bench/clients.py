"""Users for the load test, their connections, and a record of what they asked for and got."""

from __future__ import annotations

import asyncio
import json
import random
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from models.validation import Json
from tests.support.client import ENDS, text_of

DEADLINE = 180.0  # seconds that anything a client does may take, however long the wait queue
WORDS = ("the", "sea", "bread", "clocks", "glass", "bees", "rivers", "paper", "and", "of", "a", "with", "stone")
REFUSALS = ("queue_full", "too_many_responses", "response_not_found")  # which good clients may get too
LATE = "response_not_found"  # for clients that resume an unstored reply after it is forgotten
FLOOD = "flood"  # the lane of requests whose events nobody reads
MARK = {"type": "parley.response.cancel", "stream_id": "mark", "response_id": "none"}


class UnexpectedError(Exception):
    """The server did something that a client does not expect."""


def expect(met: object, complaint: object) -> None:
    """Raise UnexpectedError where an expectation is not met."""
    if not met:
        raise UnexpectedError(str(complaint)[:400])


@dataclass
class Reply:
    """One request and its reply; `outcome` is empty until the reply has ended in any way."""

    user: str
    input: str
    asked_at: float = field(default_factory=time.perf_counter)
    id: str = ""
    conversation: str | None = None
    queued: bool = False
    events: int = 0  # numbered ones
    text: str = ""
    deltas: int = 0
    wait: float | None = None  # seconds to the first delta
    gap: float = 0.0  # the most seconds between two deltas
    last_at: float = 0.0  # when the last delta came
    outcome: str = ""  # answered, cancelled, abandoned, or the code of the error

    @property
    def stage(self) -> str:
        """How far the reply is."""
        return "reply" if self.deltas else "queue" if self.queued else "prefill" if self.id else "request"

    def add(self, delta: str) -> None:
        """Add the next piece of text."""
        now = time.perf_counter()
        if self.wait is None:
            self.wait = now - self.asked_at
        else:
            self.gap = max(self.gap, now - self.last_at)
        self.last_at = now
        self.deltas += 1
        self.text += delta

    def on_event(self, event: Json) -> None:
        """Add the next event of chat.v2. Raises UnexpectedError where it cannot be the next one."""
        expect(not self.outcome, f"after the end: {event}")
        if "sequence_number" in event:
            expect(event["sequence_number"] == self.events, f"after event {self.events - 1}: {event}")
            self.events += 1
        match event:
            case {"type": "response.created", "response": response}:
                expect(not self.id, f"created twice: {event}")
                self.id, self.conversation = response["id"], (response["conversation"] or {}).get("id")
            case {"type": "parley.queue"}:
                self.queued = True
            case {"type": "response.output_text.delta", "delta": delta}:
                self.add(delta)
            case {"type": type, "response": response} if type in ENDS:
                expect(text_of(response) == self.text, f"{self.text!r}: {event}")
                expect(response["status"] != "failed", event)
                self.outcome = "cancelled" if response["status"] == "cancelled" else "answered"
            case {"type": "error", "error": {"code": code}}:
                expect(not self.id or (code == LATE and self.conversation is None), f"after created: {event}")
                self.refuse(code)
            case _:
                expect("sequence_number" in event, f"unknown: {event}")

    def refuse(self, code: str) -> None:
        """The server refused the request. Raises UnexpectedError where it may not."""
        expect(code in REFUSALS, f"refused: {code}")
        self.outcome = code

    def abandon(self) -> None:
        """The client has gone."""
        self.outcome = self.outcome or "abandoned"


Moment = Callable[[Reply], object]  # true from some moment of a reply on


def at_once(reply: Reply) -> bool:
    return True


def when_created(reply: Reply) -> bool:
    return bool(reply.id)


def when_queued(reply: Reply) -> bool:
    return reply.queued or reply.deltas > 0


def when_streaming(reply: Reply) -> bool:
    return reply.deltas >= 3


def at_the_end(reply: Reply) -> bool:
    return False  # those who wait for a moment stop at the end anyway


@dataclass
class Tally:
    """What all clients did, and how it went."""

    actions: Counter[str] = field(default_factory=Counter)  # times, by name
    vanished: Counter[str] = field(default_factory=Counter)  # times, by the stage of the reply that was left
    replies: list[Reply] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def lost(self) -> list[str]:
        """Complaints, and requests without an end."""
        return [*self.complaints, *(str(reply)[:400] for reply in self.replies if not reply.outcome)]


class Chat:
    """A connection by chat.v2. It gives each event to its reply."""

    def __init__(self, user: User, connection: ClientConnection) -> None:
        self.user = user
        self.connection = connection
        self.replies: dict[str, Reply] = {}  # by the lane of the request, then by their own id as well

    async def send(self, event: Json) -> None:
        await self.connection.send(json.dumps(event))

    async def ask(self, input: str, **fields: Any) -> Reply:
        """Ask for a reply, in a lane of its own."""
        reply, lane = self.user.new_reply(input), f"request {len(self.replies)}"
        self.replies[lane] = reply
        request = {"type": "response.create", "input": input, "truncation": "auto", "stream_id": lane}
        await self.send(request | fields)
        return reply

    async def resume(self, reply: Reply) -> None:
        """Follow a reply that began on another connection."""
        self.replies[reply.id] = reply
        names = {"response_id": reply.id, "stream_id": reply.id}
        await self.send({"type": "parley.response.resume", "starting_after": reply.events - 1} | names)

    async def receive(self) -> Json:
        """The next event. Raises UnexpectedError where it belongs to no reply of this connection."""
        event: Json = json.loads(await self.connection.recv())
        names = [event.get("stream_id"), event.get("response_id")]
        reply = next((self.replies[name] for name in names if name in self.replies), None)
        if reply:
            reply.on_event(event)
            self.replies[reply.id] = reply
        elif event.get("stream_id") != FLOOD:
            expect(not event["type"].startswith("response."), f"nobody asked for {event}")
        return event

    async def until(self, reply: Reply, moment: Moment = at_the_end) -> Reply:
        """Receive events up to some moment of a reply, or its end."""
        while not reply.outcome and not moment(reply):
            await self.receive()
        return reply

    async def error_code(self, frame: str | bytes) -> str:
        """Send a frame while no reply is running, and return the code of the error."""
        await self.connection.send(frame)
        while (event := await self.receive())["type"] != "error":
            pass
        return str(event["error"]["code"])

    async def finish(self) -> None:
        """Receive all replies to their end, and check that nothing comes after it."""
        for reply in [*self.replies.values()]:
            await self.until(reply)
        await self.send(MARK)
        while (await self.receive()).get("stream_id") != "mark":
            pass

    def vanish(self) -> None:
        """Close the TCP connection without a WebSocket close, and count the replies that are left."""
        self.connection.transport.abort()
        for reply in {id(reply): reply for reply in self.replies.values() if not reply.outcome}.values():
            self.user.tally.vanished[reply.stage] += 1


@dataclass(eq=False)
class User:
    """A user with a secret."""

    id: str
    secret: str
    address: str  # the server's, host:port
    http: httpx2.AsyncClient
    tally: Tally
    chance: random.Random
    neighbour: User = field(init=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secret}"}

    @property
    def query(self) -> str:
        """The credentials of plain text clients."""
        return f"?{httpx2.QueryParams(userid=self.id, secret=self.secret)}"

    @property
    def other_address(self) -> dict[str, str]:
        """A header that gives the user another address, since wrong secrets count against the address."""
        return {"X-Forwarded-For": f"203.0.113.{self.chance.randrange(256)}"}

    def message(self, words: int = 6) -> str:
        """A message that nobody has sent before."""
        return " ".join([*self.chance.choices(WORDS, k=words), f"{self.chance.getrandbits(64):x}"])

    def options(self) -> Json:
        """Random options for a reply."""
        stop = {"stop": self.chance.choice(WORDS)[0]} if self.chance.random() < 0.2 else {}
        return {
            "max_output_tokens": self.chance.randint(4, 60),
            "temperature": self.chance.choice([0, 0.7, 1.2]),
        } | stop

    def new_reply(self, input: str) -> Reply:
        """The record of a reply that is about to be asked for."""
        self.tally.replies.append(Reply(self.id, input))
        return self.tally.replies[-1]

    async def act(self, action: Action) -> None:
        """Run one action; any error of it is a complaint."""
        self.tally.actions[action.__name__] += 1
        try:
            async with asyncio.timeout(DEADLINE):
                await action(self)
        except Exception as error:
            self.tally.complaints.append(f"{self.id}, {' > '.join(_places(error))}: {error!r}"[:500])

    def connect(self, query: str = "", **options: Any) -> connect:
        """A WebSocket."""
        options = {"max_size": None, "max_queue": None, "ping_interval": None, "proxy": None} | options
        return connect(f"ws://{self.address}/ws{query}", **options)

    @asynccontextmanager
    async def chat(self, **options: Any) -> AsyncIterator[Chat]:
        """A connection by chat.v2, after its `parley.session.created`."""
        protocols = [Subprotocol("chat.v2")]
        async with self.connect(subprotocols=protocols, additional_headers=self.headers, **options) as connection:
            chat = Chat(self, connection)
            expect((await chat.receive())["type"] == "parley.session.created", "there is no session")
            yield chat

    async def texts(self, conversation: str | None) -> list[str]:
        """The stored messages and replies of a conversation."""
        response = await self.http.get(f"/v1/conversations/{conversation}/branch", headers=self.headers)
        turns = response.raise_for_status().json()["data"]
        return [text_of(turn) if "output" in turn else turn["content"][0]["text"] for turn in turns]

    async def find(self, input: str) -> list[str]:
        """A stored message, and the texts that follow it in its conversation."""
        found = await self.http.get("/v1/conversations", params={"query": input}, headers=self.headers)
        for conversation in found.raise_for_status().json()["data"]:
            texts = await self.texts(conversation["id"])
            return texts[texts.index(input) :]
        return []

    async def check_stored(self, *replies: Reply) -> None:
        """Check that conversations have these messages and replies, and nothing else. Raises UnexpectedError."""
        for conversation in {reply.conversation for reply in replies if reply.conversation}:
            own = [reply for reply in replies if reply.conversation == conversation]
            expected = [text for reply in own for text in (reply.input, reply.text)]
            stored = await self.texts(conversation)
            expect(stored == expected, f"{conversation} has {stored}, not {expected}")

    async def completion(self, reply: Reply, stream: bool, tokens: int | None = None) -> Json:
        """The arguments of a request for a chat completion."""
        models = (await self.http.get("/v1/models", headers=self.headers)).raise_for_status()
        messages = [{"role": "user", "content": reply.input}]
        body = {"model": models.json()["data"][0]["id"], "messages": messages, "stream": stream}
        body["max_tokens"] = tokens or self.chance.randint(4, 60)
        return {"url": "/v1/chat/completions", "headers": self.headers, "json": body}


def _places(error: BaseException) -> list[str]:
    """The lines of the load test that an error came through; of a timeout, those of its cause."""
    frames = [*traceback.extract_tb(error.__traceback__)]
    frames += traceback.extract_tb(error.__cause__.__traceback__) if error.__cause__ else []
    return [f"{frame.name}:{frame.lineno}" for frame in frames if Path(frame.filename).parent == Path(__file__).parent]


Action = Callable[[User], Awaitable[None]]
