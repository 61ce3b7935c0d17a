"""What users do in the load test: some behave, others vanish, stall, cancel, come back or lie."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import httpx2
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from server import FRAME_BYTES, UVICORN_FRAME_BYTES
from tests.bench.clients import (
    REFUSALS,
    Action,
    Json,
    Line,
    Moment,
    Reply,
    User,
    asked,
    begun,
    created,
    ended,
    expect,
    queued,
)

LONG: Json = {"max_output_tokens": None, "temperature": 0}  # not at its end before somebody can act

# Such as behave


async def talk(user: User) -> None:
    """A conversation, a question beside it, and another conversation that goes on over another connection."""
    async with user.line() as line:
        told = [await line.until(await line.ask(user.words(), **user.options())) for _ in range(2)]
        await line.until(await line.ask(user.words(), conversation="none", **user.options()))
        told.append(await line.until(await line.ask(user.words(), conversation="new", **user.options())))
        await line.end()
    if named := told[-1].conversation:
        async with user.line() as line:
            told.append(await line.until(await line.ask(user.words(), conversation=named, **user.options())))
            await line.end()
    await user.look_up(*told)


async def ask_much_at_once(user: User) -> None:
    """More than a user may ask for: the rest is refused, and what is not is cancelled."""
    async with user.line() as line:
        for _ in range(10):
            reply = await line.ask(user.words(), conversation="none", **LONG)
        await line.until(reply, created)
        await line.say({"type": "response.cancel"})
        await line.end()


async def talk_plainly(user: User) -> None:
    """Two messages in plain text."""
    async with user.connect(user.query) as connection:
        for _ in range(2):
            reply = await ask_plainly(user, connection)
            while not (piece := await plain_piece(connection)).startswith("error: "):
                reply.hear(piece)
            if kept := await user.find(reply.input):
                expect(kept == [reply.input, reply.text], f"{kept} is kept of {reply}")
                expect(plain_code(piece) in (*REFUSALS, "context_length_exceeded"), piece)
                reply.outcome = "answered"
            else:
                reply.refuse(plain_code(piece))
                await plain_piece(connection)


async def ask_plainly(user: User, connection: ClientConnection) -> Reply:
    """Ask, then say what must be refused: plain text tells in no other way where a reply ends."""
    reply = user.asks(user.words())
    await connection.send(reply.input)
    await connection.send("too long " * 1000)
    return reply


async def plain_piece(connection: ClientConnection) -> str:
    """The next piece; in between one is told who left."""
    while str(piece := await connection.recv()).startswith("Client #"):
        pass
    return str(piece)


def plain_code(piece: str) -> str:
    """What chat.v1 calls an error in plain text."""
    codes = {"in flight": "too_many_responses", "wait already": "queue_full", "shorten": "context_length_exceeded"}
    return next((code for words, code in codes.items() if words in piece), piece)


async def complete(user: User) -> None:
    """OpenAI's API, all in one piece."""
    reply = user.asks(user.words())
    answered(reply, await user.http.post(**await user.completion(reply, stream=False)))


def answered(reply: Reply, answer: httpx2.Response) -> None:
    """Take what came of a request over HTTP."""
    if answer.status_code == 200:
        choice = answer.json()["choices"][0]
        expect(choice["finish_reason"] in ("stop", "length"), choice)
        reply.text, reply.outcome = choice["message"]["content"], "answered"
    else:
        reply.refuse(answer.json()["error"]["code"])


async def stream(user: User) -> None:
    """OpenAI's API, piece by piece."""
    reply = user.asks(user.words())
    await streamed(user, reply, await user.completion(reply, stream=True), ended)


async def streamed(user: User, reply: Reply, request: Json, moment: Moment) -> None:
    """Listen to a stream until some moment of the reply, or its end."""
    finish = None
    async with user.http.stream("POST", **request) as stream:
        if stream.status_code != 200:
            await stream.aread()
            return answered(reply, stream)
        async for line in stream.aiter_lines():
            if line == "data: [DONE]":
                expect(finish in ("stop", "length"), f"finish_reason {finish} in the end")
                reply.outcome = "answered"
            elif line.startswith("data: "):
                expect(not reply.outcome, f"after the end: {line}")
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                finish = choice["finish_reason"] or finish
                if content := choice["delta"].get("content"):
                    reply.hear(content)
            if moment(reply):
                return
    expect(reply.outcome, "the stream broke off")


# Such as vanish


async def vanish(user: User, moment: Moment, many: int = 1, words: int = 6) -> None:
    """Ask for so many replies, the last of which is left at some moment; the messages are kept all the same."""
    async with user.line() as line:
        replies = [await line.ask(user.words(words), conversation="new", **LONG) for _ in range(many)]
        await line.until(replies[-1], moment)
        line.vanish()
    for reply in replies:
        reply.abandon()
        if reply.conversation:
            expect((await user.items(reply.conversation))[0]["content"] == reply.input, f"{reply.input} is not kept")


async def vanish_at_once(user: User) -> None:
    await vanish(user, asked)


async def vanish_in_prefill(user: User) -> None:
    await vanish(user, created, words=60)


async def vanish_in_the_queue(user: User) -> None:
    await vanish(user, queued, many=3)


async def vanish_in_the_reply(user: User) -> None:
    await vanish(user, begun)


async def vanish_plainly(user: User) -> None:
    async with user.connect(user.query) as connection:
        reply = await ask_plainly(user, connection)
        await plain_piece(connection)
        connection.transport.abort()
    reply.abandon()


async def hang_up(user: User) -> None:
    """Close an HTTP stream in the middle."""
    reply = user.asks(user.words())
    await streamed(user, reply, await user.completion(reply, stream=True, tokens=300), begun)
    reply.abandon()


async def hang_up_waiting(user: User) -> None:
    """Close an HTTP request that is not streamed, while another reply comes."""
    reply = user.asks(user.words())
    arguments = await user.completion(reply, stream=False, tokens=300)
    async with asyncio.TaskGroup() as group, user.line() as line:
        request = group.create_task(user.http.post(**arguments))
        await line.ask(user.words(), conversation="none", max_output_tokens=3)
        await line.end()
        request.cancel()
    if not request.cancelled():
        answered(reply, request.result())
    reply.abandon()


# Such as stall


@asynccontextmanager
async def stalled(user: User, loud: int = 0) -> AsyncIterator[tuple[Line, Reply]]:
    """A connection that has begun to hear a reply, asked for so many megabytes, and not read while another came."""
    host, port = user.address.split(":")
    narrow = socket.create_connection((host, int(port)))
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)  # else the system takes ever more for it
    async with user.line(sock=narrow, max_queue=1, close_timeout=1) as line:
        reply = await line.ask(user.words(), **LONG)
        await line.until(reply, begun)
        with suppress(ConnectionClosed):
            for _ in range(loud):
                await line.say({"type": "session.update", "session": {"instructions": "x" * 1_000_000}})
        async with user.line() as other:
            await other.ask(user.words(), conversation="none", **user.options())
            await other.end()
        yield line, reply


async def stall(user: User) -> None:
    """Read on as if nothing had been."""
    async with stalled(user) as (line, reply):
        await line.end()
    await user.look_up(reply)


async def stall_and_vanish(user: User) -> None:
    async with stalled(user) as (line, reply):
        line.vanish()
    reply.abandon()


async def stall_too_long(user: User) -> None:
    """Let megabytes pile up: the connection is closed, and another one hears the reply to its end."""
    async with stalled(user, loud=24) as (line, reply):
        try:
            while True:
                await line.hear()
        except ConnectionClosed:  # 1006 where it read on too late to see why
            expect(line.connection.close_code in (1013, 1006), f"closed with {line.connection.close_code}")
    await come_back(user, reply)
    await user.look_up(reply)


# Such as change their minds


async def cancel(user: User) -> None:
    """End a reply, by its id or all there are, at any moment."""
    async with user.line() as line:
        reply = await line.ask(user.words(), **LONG)
        await line.until(reply, user.moments.choice([asked, created, queued, begun]))
        named = {"response_id": reply.id, "event_id": "cancel"} if reply.id and user.moments.random() < 0.5 else {}
        await line.say({"type": "response.cancel"} | named)
        await line.end()
    await user.look_up(reply)


async def resume(user: User) -> None:
    """Be cut off again and again, come back each time, and have heard all in the end."""
    async with user.line() as line:
        kept = user.moments.choice(["new", "none"])
        reply = await line.ask(user.words(), conversation=kept, max_output_tokens=60, temperature=0)
        await line.until(reply, begun)
        line.vanish()
    while not reply.outcome:
        heard = reply.heard
        await come_back(user, reply, lambda reply: reply.heard >= heard + 10)  # noqa: B023
    await user.look_up(reply)


async def come_back(user: User, reply: Reply, moment: Moment = ended) -> None:
    """Go on with a reply until some moment."""
    if reply.id and not reply.outcome:
        async with user.line() as line:
            await line.follow(reply)
            await line.until(reply, moment)
            line.vanish()


# Such as lie

GARBAGE: dict[str | bytes, str] = {
    "": "invalid_json",
    "{": "invalid_json",
    "[1]": "invalid_json",
    "[" * 100_000: "invalid_json",
    b"\x00\xff": "invalid_json",
    '{"type": "response.fly"}': "unknown_type",
    '{"type": "response.create"}': "missing_field",
    '{"type": "response.create", "response": {"input": ""}}': "invalid_value",
    '{"type": "session.update", "session": {"temperature": 1e999}}': "invalid_value",
    '{"type": "response.cancel", "response_id": "resp_none"}': "response_not_found",
    '{"type": "response.resume", "response_id": "resp_none"}': "response_not_found",
}
BODIES = (b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"messages": []}', b'{"messages": "x", "stream": 7}', b"null")


async def send_garbage(user: User) -> None:
    """Frames that are no events: each has its error, and the connection is as good as before, twenty times."""
    async with user.line() as line:
        for frame, code in GARBAGE.items():
            expect(await line.refusal(frame) == code, f"not {code} for {frame[:80]!r}")
        await line.ask(user.words(), conversation="none", **user.options())
        await line.end()
        for _ in range(20):
            await line.connection.send("garbage")
        expect(await closed_with(line.connection) == 4400, "twenty bad frames were not enough")
    async with user.line() as line:
        await line.connection.send(b"\xff\xfe", text=True)
        expect(await closed_with(line.connection) == 1007, "not 1007 for text that is not UTF-8")


async def send_garbage_over_http(user: User) -> None:
    for body in BODIES:
        answer = await user.http.post("/v1/chat/completions", headers=user.headers, content=body)
        expect(answer.status_code in (400, 413, 422), f"{answer.status_code} for {body[:80]!r}")
        expect(answer.json()["error"]["type"] == "invalid_request_error", answer.text)


async def send_giants(user: User) -> None:
    """Frames and a body beyond all limits."""
    for size in (FRAME_BYTES + 1, UVICORN_FRAME_BYTES + 1):
        async with user.line() as line:
            with suppress(ConnectionClosed):
                await line.connection.send("x" * size)
            code = await closed_with(line.connection)
            expect(code == 1009 or (code == 1006 and size > UVICORN_FRAME_BYTES), f"{code} for {size} bytes")
    with suppress(httpx2.TransportError):  # where it is not even read to its end
        answer = await user.http.post("/v1/chat/completions", headers=user.headers, content=b"x" * (2 * FRAME_BYTES))
        expect(answer.status_code in (400, 413), f"{answer.status_code} for a body of two MiB")


async def guess_secrets(user: User) -> None:
    """A secret that is nobody's, and somebody's that is not this user's."""
    for userid, secret in ((user.id, user.words()), (user.neighbour.id, user.secret)):
        query = f"?{httpx2.QueryParams(userid=userid, secret=secret)}"
        async with user.connect(query, additional_headers=user.elsewhere) as connection:
            expect(await closed_with(connection) in (1008, 4429), "plain text: believed")
        async with user.connect(
            query, additional_headers=user.elsewhere, subprotocols=[Subprotocol("chat.v1")]
        ) as connection:
            expect(await closed_with(connection) in (4401, 4429), "chat.v1: believed")
    headers = user.elsewhere | {"Authorization": "Bearer wrong"}
    reply = Reply(user.id, user.words())
    for request in (await user.completion(reply, stream=True), {"url": "/v1/conversations"}):
        method = "POST" if "json" in request else "GET"
        answer = await user.http.request(method, **request | {"headers": headers})
        expect(answer.status_code in (401, 429), f"{request['url']}: {answer.status_code}")


async def reach_for_others(user: User) -> None:
    """Somebody else's reply and conversation are not there, and not disturbed."""
    async with user.neighbour.line() as theirs, user.line() as own:
        reply = await theirs.until(await theirs.ask(user.words(), **user.options()), begun)
        names = {"response_id": reply.id, "response": {"input": user.words(), "conversation": reply.conversation}}
        for kind in ("response.resume", "response.cancel", "response.create") if reply.id else ():
            code = await own.refusal(json.dumps(names | {"type": kind}))
            expect(code in (*REFUSALS, "conversation_not_found"), f"{kind}: {code}")
        answer = await user.http.get(f"/v1/conversations/{reply.conversation}", headers=user.headers)
        expect(answer.status_code == 404, f"somebody else's conversation: {answer.status_code}")
        await theirs.end()
    expect(reply.outcome != "cancelled", "somebody else could cancel a reply")
    await user.neighbour.look_up(reply)


async def closed_with(connection: ClientConnection) -> int | None:
    """The code of the close, after whatever comes before it; 1006 where there is none."""
    with suppress(ConnectionClosed):
        while True:
            await connection.recv()
    return connection.close_code


WELL_BEHAVED: tuple[Action, ...] = (talk, talk_plainly, complete, stream)
OTHERS: tuple[Action, ...] = (
    ask_much_at_once,
    vanish_at_once,
    vanish_in_prefill,
    vanish_in_the_queue,
    vanish_in_the_reply,
    vanish_plainly,
    hang_up,
    hang_up_waiting,
    stall,
    stall_and_vanish,
    stall_too_long,
    cancel,
    resume,
    send_garbage,
    send_garbage_over_http,
    send_giants,
    guess_secrets,
    reach_for_others,
)


def deck(moments: random.Random) -> Iterator[Action]:
    """Actions without end, in no order; after so many as there are all have occurred, good ones most often."""
    while True:
        cards = [*WELL_BEHAVED * 3, *OTHERS]
        moments.shuffle(cards)
        yield from cards
