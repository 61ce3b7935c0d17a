"""Users for the load test, their connections, and an account of what they asked for and got."""

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

Json = dict[str, Any]

DEADLINE = 180.0  # seconds that whatever a client does may take, however long the queue
WORDS = ("the", "sea", "bread", "clocks", "glass", "bees", "rivers", "paper", "and", "of", "a", "with", "stone")
REFUSALS = ("queue_full", "too_many_responses", "response_not_found")  # that who behaves may get, too
LATE = "response_not_found"  # the answer to who comes back after a reply that no conversation keeps is forgotten
MARK = {"type": "response.cancel", "event_id": "mark", "response_id": "none"}


class Lost(Exception):
    """What a client was to get and did not."""


def expect(met: object, complaint: object) -> None:
    """Raise Lost where an expectation is not met."""
    if not met:
        raise Lost(str(complaint)[:400])


@dataclass
class Reply:
    """One request and what came of it; `outcome` is empty until it has ended, one way or another."""

    user: str
    input: str
    asked: float = field(default_factory=time.perf_counter)
    id: str = ""
    conversation: str | None = None
    queued: bool = False
    text: str = ""
    heard: int = 0  # deltas
    wait: float | None = None  # seconds to the first of them
    outcome: str = ""  # answered, cancelled, abandoned, or a refusal's code

    @property
    def stage(self) -> str:
        """How far it came."""
        return "reply" if self.heard else "queue" if self.queued else "prefill" if self.id else "request"

    def hear(self, delta: str) -> None:
        """Take the next piece."""
        self.wait = self.wait or time.perf_counter() - self.asked
        self.heard += 1
        self.text += delta

    def take(self, event: Json) -> None:
        """Take the next event of chat.v1. Raises Lost where it cannot be the next."""
        expect(not self.outcome, f"after the end: {event}")
        match event:
            case {"type": "response.created", "response": {"id": id, "conversation": conversation}}:
                expect(not self.id, f"created twice: {event}")
                self.id, self.conversation = id, conversation
            case {"type": "response.queued"}:
                self.queued = True
            case {"type": "response.output_text.delta", "sequence_number": number, "delta": delta}:
                expect(self.id and number == self.heard + 1, f"after delta {self.heard}: {event}")
                self.hear(delta)
            case {"type": "response.done", "response": response, "sequence_number": number}:
                expect((number, response["output_text"]) == (self.heard + 1, self.text), f"{self.text!r}: {event}")
                expect(response["status"] != "failed", event)
                self.outcome = "cancelled" if response["status"] == "cancelled" else "answered"
            case {"type": "error", "error": {"code": code}}:
                expect(not self.id or (code == LATE and self.conversation is None), f"after created: {event}")
                self.refuse(code)
            case _:
                raise Lost(f"unknown: {event}")

    def refuse(self, code: str) -> None:
        """Take the end of a request that is not met. Raises Lost where it should have been."""
        expect(code in REFUSALS, f"refused: {code}")
        self.outcome = code

    def abandon(self) -> None:
        """Nobody listens any more."""
        self.outcome = self.outcome or "abandoned"


Moment = Callable[[Reply], object]  # true from some moment of a reply on


def asked(reply: Reply) -> bool:
    return True


def created(reply: Reply) -> bool:
    return bool(reply.id)


def queued(reply: Reply) -> bool:
    return reply.queued or reply.heard > 0


def begun(reply: Reply) -> bool:
    return reply.heard >= 3


def ended(reply: Reply) -> bool:
    return False  # nothing but its end


@dataclass
class Tally:
    """What all clients did and what came of it."""

    acted: Counter[str] = field(default_factory=Counter)  # times, by action
    vanished: Counter[str] = field(default_factory=Counter)  # times, by the stage of the reply that was left
    replies: list[Reply] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def lost(self) -> list[str]:
        """Complaints, and requests without an end."""
        return [*self.complaints, *(str(reply)[:400] for reply in self.replies if not reply.outcome)]


class Line:
    """A connection of chat.v1 that hands each event to the reply it is of."""

    def __init__(self, user: User, connection: ClientConnection) -> None:
        self.user = user
        self.connection = connection
        self.replies: dict[str, Reply] = {}  # by the id of the request, then by their own as well

    async def say(self, event: Json) -> None:
        await self.connection.send(json.dumps(event))

    async def ask(self, input: str, **fields: Any) -> Reply:
        """Ask for a reply."""
        reply, event_id = self.user.asks(input), f"request {len(self.replies)}"
        self.replies[event_id] = reply
        await self.say({"type": "response.create", "event_id": event_id, "response": {"input": input} | fields})
        return reply

    async def follow(self, reply: Reply) -> None:
        """Go on with a reply that another connection began."""
        self.replies[reply.id] = reply
        names = {"response_id": reply.id, "event_id": reply.id}
        await self.say({"type": "response.resume", "starting_after": reply.heard} | names)

    async def hear(self) -> Json:
        """The next event. Raises Lost where it belongs to nothing that was asked for here."""
        event: Json = json.loads(await self.connection.recv())
        names = [event.get("event_id"), event.get("response_id")]
        names += [event.get("response", {}).get("id"), event.get("error", {}).get("event_id")]
        reply = next((self.replies[name] for name in names if name in self.replies), None)
        if reply:
            reply.take(event)
            self.replies[reply.id] = reply
        else:
            expect(not event["type"].startswith("response."), f"nobody asked for {event}")
        return event

    async def until(self, reply: Reply, moment: Moment = ended) -> Reply:
        """Listen until some moment of a reply, or its end."""
        while not reply.outcome and not moment(reply):
            await self.hear()
        return reply

    async def refusal(self, frame: str | bytes) -> str:
        """The code of the error that answers a frame, where no reply is being made."""
        await self.connection.send(frame)
        while (event := await self.hear())["type"] != "error":
            pass
        return str(event["error"]["code"])

    async def end(self) -> None:
        """Hear all replies to their end, and that nothing comes after it."""
        for reply in [*self.replies.values()]:
            await self.until(reply)
        await self.say(MARK)
        while (await self.hear()).get("error", {}).get("event_id") != "mark":
            pass

    def vanish(self) -> None:
        """Close the TCP connection without a word, and give up what was asked for."""
        self.connection.transport.abort()
        for reply in {id(reply): reply for reply in self.replies.values() if not reply.outcome}.values():
            self.user.tally.vanished[reply.stage] += 1


@dataclass(eq=False)
class User:
    """Somebody with a secret, and with all the time in the world."""

    id: str
    secret: str
    address: str  # the server's, host:port
    http: httpx2.AsyncClient
    tally: Tally
    moments: random.Random
    neighbour: User = field(init=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secret}"}

    @property
    def query(self) -> str:
        """The credentials of the simplest clients."""
        return f"?{httpx2.QueryParams(userid=self.id, secret=self.secret)}"

    @property
    def elsewhere(self) -> dict[str, str]:
        """A header by which uvicorn takes this for another machine: wrong secrets count against an address."""
        return {"X-Forwarded-For": f"203.0.113.{self.moments.randrange(256)}"}

    def words(self, many: int = 6) -> str:
        """Something to say that nobody said before."""
        return " ".join([*self.moments.choices(WORDS, k=many), f"{self.moments.getrandbits(64):x}"])

    def options(self) -> Json:
        """Options for a reply, seldom the same."""
        stop = {"stop": self.moments.choice(WORDS)[0]} if self.moments.random() < 0.2 else {}
        return {
            "max_output_tokens": self.moments.randint(4, 60),
            "temperature": self.moments.choice([0, 0.7, 1.2]),
        } | stop

    def asks(self, input: str) -> Reply:
        """A reply that is about to be asked for."""
        self.tally.replies.append(Reply(self.id, input))
        return self.tally.replies[-1]

    async def act(self, action: Action) -> None:
        """Do one thing; what goes wrong is a complaint, whatever it is."""
        self.tally.acted[action.__name__] += 1
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
    async def line(self, **options: Any) -> AsyncIterator[Line]:
        """A connection of chat.v1 that has had its greeting."""
        protocols = [Subprotocol("chat.v1")]
        async with self.connect(subprotocols=protocols, additional_headers=self.headers, **options) as connection:
            line = Line(self, connection)
            expect((await line.hear())["type"] == "session.created", "there is no session")
            yield line

    async def items(self, conversation: str | None) -> list[Json]:
        """What is kept of a conversation."""
        answer = await self.http.get(f"/v1/conversations/{conversation}", headers=self.headers)
        return list(answer.raise_for_status().json()["items"])

    async def find(self, input: str) -> list[str]:
        """A message that only one conversation holds, and what follows it there."""
        found = await self.http.get("/v1/conversations", params={"query": input}, headers=self.headers)
        for conversation in found.raise_for_status().json()["data"]:
            contents = [item["content"] for item in await self.items(conversation["id"])]
            return contents[contents.index(input) :]
        return []

    async def look_up(self, *replies: Reply) -> None:
        """See that conversations hold what was said in them, and nothing else. Raises Lost."""
        for conversation in {reply.conversation for reply in replies if reply.conversation}:
            told = [reply for reply in replies if reply.conversation == conversation]
            said = [content for reply in told for content in (reply.input, reply.text)]
            kept = [item["content"] for item in await self.items(conversation)]
            expect(kept == said, f"{conversation} holds {kept}, not {said}")

    async def completion(self, reply: Reply, stream: bool, tokens: int | None = None) -> Json:
        """The arguments of a request over HTTP."""
        models = (await self.http.get("/v1/models", headers=self.headers)).raise_for_status()
        messages = [{"role": "user", "content": reply.input}]
        body = {"model": models.json()["data"][0]["id"], "messages": messages, "stream": stream}
        body["max_tokens"] = tokens or self.moments.randint(4, 60)
        return {"url": "/v1/chat/completions", "headers": self.headers, "json": body}


def _places(error: BaseException) -> list[str]:
    """The lines of ours that an error came through; a timeout knows them by its cause."""
    frames = [*traceback.extract_tb(error.__traceback__)]
    frames += traceback.extract_tb(error.__cause__.__traceback__) if error.__cause__ else []
    return [f"{frame.name}:{frame.lineno}" for frame in frames if Path(frame.filename).parent == Path(__file__).parent]


Action = Callable[[User], Awaitable[None]]
