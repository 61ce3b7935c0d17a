"""What users do in the load test: good clients chat; others vanish, stall, cancel, come back or send nonsense."""

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

from models.validation import Json
from models.web.serving import UVICORN_FRAME_BYTES
from models.web.session_socket import FRAME_BYTES
from tests.bench.clients import (
    FLOOD,
    REFUSALS,
    Action,
    Chat,
    Moment,
    Reply,
    User,
    at_once,
    at_the_end,
    expect,
    when_created,
    when_queued,
    when_streaming,
)

LONG: Json = {"max_output_tokens": None, "temperature": 0}  # long enough that a client can act before the end

# Good clients


async def talk(user: User) -> None:
    """Use a conversation, ask without one, and go on with another conversation over another connection."""
    async with user.chat() as chat:
        replies = [await chat.until(await chat.ask(user.message(), conversation="new", **user.options()))]
        again = replies[0].conversation or "new"
        replies.append(await chat.until(await chat.ask(user.message(), conversation=again, **user.options())))
        await chat.until(await chat.ask(user.message(), store=False, **user.options()))
        replies.append(await chat.until(await chat.ask(user.message(), conversation="new", **user.options())))
        await chat.finish()
    if conversation := replies[-1].conversation:
        async with user.chat() as chat:
            reply = await chat.ask(user.message(), conversation=conversation, **user.options())
            replies.append(await chat.until(reply))
            await chat.finish()
    await user.check_stored(*replies)


async def ask_too_much(user: User) -> None:
    """Ask for more replies than a user may have. The rest is refused, and those that run or wait are cancelled."""
    async with user.chat() as chat:
        for _ in range(60):
            reply = await chat.ask(user.message(), store=False, **LONG)
        await chat.until(reply, when_created)
        await chat.send({"type": "parley.response.cancel"})
        await chat.finish()


async def talk_in_plain_text(user: User) -> None:
    """Send two messages in plain text."""
    async with user.connect(user.query) as connection:
        for _ in range(2):
            reply = await ask_in_plain_text(user, connection)
            while not (piece := await next_piece(connection)).startswith("error: "):
                reply.add(piece)
            if stored := await user.find(reply.input):
                expect(stored == [reply.input, reply.text], f"{stored} is stored of {reply}")
                expect(code_of(piece) in (*REFUSALS, "context_length_exceeded"), piece)
                reply.outcome = "answered"
            else:
                reply.refuse(code_of(piece))
                await next_piece(connection)


async def ask_in_plain_text(user: User, connection: ClientConnection) -> Reply:
    """Ask, then send a message that is refused, since plain text has no other mark for the end of a reply."""
    reply = user.new_reply(user.message())
    await connection.send(reply.input)
    await connection.send("too long " * 1000)
    return reply


async def next_piece(connection: ClientConnection) -> str:
    """The next piece of text, without the notices who left."""
    while str(piece := await connection.recv()).startswith("Client #"):
        pass
    return str(piece)


def code_of(message: str) -> str:
    """The code of an error that plain text tells by its message."""
    codes = {
        "running or waiting": "too_many_responses",
        "wait queue is full": "queue_full",
        "shorten": "context_length_exceeded",
    }
    return next((code for words, code in codes.items() if words in message), message)


async def complete(user: User) -> None:
    """Ask for a chat completion as one object."""
    reply = user.new_reply(user.message())
    read_completion(reply, await user.http.post(**await user.completion(reply, stream=False)))


def read_completion(reply: Reply, response: httpx2.Response) -> None:
    """Read the response to a request for one object, or the error."""
    if response.status_code == 200:
        choice = response.json()["choices"][0]
        expect(choice["finish_reason"] in ("stop", "length"), choice)
        reply.text, reply.outcome = choice["message"]["content"], "answered"
    else:
        reply.refuse(response.json()["error"]["code"])


async def stream(user: User) -> None:
    """Ask for a chat completion as a stream."""
    reply = user.new_reply(user.message())
    await read_stream(user, reply, await user.completion(reply, stream=True), at_the_end)


async def read_stream(user: User, reply: Reply, request: Json, moment: Moment) -> None:
    """Read a stream up to some moment of the reply, or its end."""
    finish_reason = None
    async with user.http.stream("POST", **request) as response:
        if response.status_code != 200:
            await response.aread()
            return read_completion(reply, response)
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                expect(finish_reason in ("stop", "length"), f"finish_reason {finish_reason} at the end")
                reply.outcome = "answered"
            elif line.startswith("data: "):
                expect(not reply.outcome, f"after the end: {line}")
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                finish_reason = choice["finish_reason"] or finish_reason
                if content := choice["delta"].get("content"):
                    reply.add(content)
            if moment(reply):
                return
    expect(reply.outcome, "the stream broke off")


# Clients that vanish


async def vanish(user: User, moment: Moment, replies: int = 1, words: int = 6) -> None:
    """Ask for some replies and vanish at some moment of the last one. The messages must be stored anyway."""
    async with user.chat() as chat:
        asked = [await chat.ask(user.message(words), conversation="new", **LONG) for _ in range(replies)]
        await chat.until(asked[-1], moment)
        chat.vanish()
    for reply in asked:
        reply.abandon()
        if reply.conversation:
            stored = (await user.texts(reply.conversation))[0]
            expect(stored == reply.input, f"{reply.input} is not stored")


async def vanish_at_once(user: User) -> None:
    await vanish(user, at_once)


async def vanish_in_prefill(user: User) -> None:
    await vanish(user, when_created, words=60)


async def vanish_in_the_queue(user: User) -> None:
    await vanish(user, when_queued, replies=3)


async def vanish_in_the_reply(user: User) -> None:
    await vanish(user, when_streaming)


async def vanish_in_plain_text(user: User) -> None:
    async with user.connect(user.query) as connection:
        reply = await ask_in_plain_text(user, connection)
        await next_piece(connection)
        connection.transport.abort()
    reply.abandon()


async def hang_up_in_a_stream(user: User) -> None:
    """Close an HTTP stream in the middle."""
    reply = user.new_reply(user.message())
    await read_stream(user, reply, await user.completion(reply, stream=True, tokens=300), when_streaming)
    reply.abandon()


async def hang_up_before_the_response(user: User) -> None:
    """Close an HTTP request that is not streamed, during another reply."""
    reply = user.new_reply(user.message())
    arguments = await user.completion(reply, stream=False, tokens=300)
    async with asyncio.TaskGroup() as group, user.chat() as chat:
        request = group.create_task(user.http.post(**arguments))
        await chat.ask(user.message(), store=False, max_output_tokens=3)
        await chat.finish()
        request.cancel()
    if not request.cancelled():
        read_completion(reply, request.result())
    reply.abandon()


# Clients that stall

ECHOED: Json = {  # its events tell its instructions three times
    **{"type": "response.create", "stream_id": FLOOD, "input": "Hi", "instructions": "😀" * 26_000},
    **{"store": False, "generate": False},
}


@asynccontextmanager
async def stalled(user: User, megabytes: int = 0) -> AsyncIterator[tuple[Chat, Reply]]:
    """A connection in a reply that has asked for some megabytes, and has not read them during another reply."""
    host, port = user.address.split(":")
    narrow = socket.create_connection((host, int(port)))
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)  # else the system buffers more and more
    async with user.chat(sock=narrow, max_queue=1, close_timeout=1) as chat:
        reply = await chat.ask(user.message(), conversation="new", **LONG)
        await chat.until(reply, when_streaming)
        with suppress(ConnectionClosed):
            for _ in range(10 * megabytes):
                await chat.send(ECHOED)
        async with user.chat() as other:
            await other.ask(user.message(), store=False, **user.options())
            await other.finish()
        yield chat, reply


async def stall(user: User) -> None:
    """Stall, then read on."""
    async with stalled(user) as (chat, reply):
        await chat.finish()
    await user.check_stored(reply)


async def stall_and_vanish(user: User) -> None:
    async with stalled(user) as (chat, reply):
        chat.vanish()
    reply.abandon()


async def stall_too_long(user: User) -> None:
    """Let megabytes wait until the server closes the connection, then get the rest of the reply over another one."""
    async with stalled(user, megabytes=24) as (chat, reply):
        try:
            while True:
                await chat.receive()
        except ConnectionClosed:  # 1006 where it read on too late to see the code
            expect(chat.connection.close_code in (1013, 1006), f"closed with {chat.connection.close_code}")
    await come_back(user, reply)
    await user.check_stored(reply)


# Clients that cancel or come back


async def cancel(user: User) -> None:
    """End a reply at any moment, by its id or with all others."""
    async with user.chat() as chat:
        reply = await chat.ask(user.message(), conversation="new", **LONG)
        await chat.until(reply, user.chance.choice([at_once, when_created, when_queued, when_streaming]))
        names = {"response_id": reply.id, "stream_id": "cancel"} if reply.id and user.chance.random() < 0.5 else {}
        await chat.send({"type": "parley.response.cancel"} | names)
        await chat.finish()
    await user.check_stored(reply)


async def resume(user: User) -> None:
    """Lose the connection again and again, come back each time, and have the whole reply at the end."""
    async with user.chat() as chat:
        where: Json = user.chance.choice([{"conversation": "new"}, {"store": False}])
        reply = await chat.ask(user.message(), max_output_tokens=60, temperature=0, **where)
        await chat.until(reply, when_streaming)
        chat.vanish()
    while not reply.outcome:
        enough = reply.deltas + 10
        await come_back(user, reply, lambda reply: reply.deltas >= enough)  # noqa: B023
    await user.check_stored(reply)


async def come_back(user: User, reply: Reply, moment: Moment = at_the_end) -> None:
    """Resume a reply, up to some moment."""
    if reply.id and not reply.outcome:
        async with user.chat() as chat:
            await chat.resume(reply)
            await chat.until(reply, moment)
            chat.vanish()


# Clients that send nonsense

NONSENSE: dict[str | bytes, str] = {
    "": "invalid_json",
    "{": "invalid_json",
    "[1]": "invalid_json",
    "[" * 100_000: "invalid_json",
    b"\x00\xff": "invalid_json",
    '{"type": "response.fly"}': "unknown_type",
    "{}": "missing_field",
    '{"type": "response.create", "response": {}}': "unknown_parameter",
    '{"type": "response.create", "input": ""}': "invalid_value",
    '{"type": "response.create", "input": "Hi", "temperature": 1e999}': "invalid_value",
    '{"type": "response.create", "input": "Hi", "temperature": 7}': "invalid_value",
    '{"type": "parley.response.cancel", "response_id": "resp_none"}': "response_not_found",
    '{"type": "parley.response.resume", "response_id": "resp_none"}': "response_not_found",
}
BODIES = (b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"messages": []}', b'{"messages": "x", "stream": 7}', b"null")


async def send_nonsense(user: User) -> None:
    """Send bad frames. Each gets its error and the connection works on, until twenty of them come in a row."""
    async with user.chat() as chat:
        for frame, code in NONSENSE.items():
            expect(await chat.error_code(frame) == code, f"not {code} for {frame[:80]!r}")
        await chat.ask(user.message(), store=False, **user.options())
        await chat.finish()
        for _ in range(20):
            await chat.connection.send("nonsense")
        expect(await close_code(chat.connection) == 4400, "twenty bad frames were not enough")
    async with user.chat() as chat:
        await chat.connection.send(b"\xff\xfe", text=True)
        expect(await close_code(chat.connection) == 1007, "not 1007 for text that is not UTF-8")


async def send_nonsense_over_http(user: User) -> None:
    for body in BODIES:
        response = await user.http.post("/v1/chat/completions", headers=user.headers, content=body)
        expect(response.status_code in (400, 413, 422), f"{response.status_code} for {body[:80]!r}")
        expect(response.json()["error"]["type"] == "invalid_request_error", response.text)


async def send_too_much(user: User) -> None:
    """Send frames and a body that are larger than allowed."""
    for size in (FRAME_BYTES + 1, UVICORN_FRAME_BYTES + 1):
        async with user.chat() as chat:
            with suppress(ConnectionClosed):
                await chat.connection.send("x" * size)
            code = await close_code(chat.connection)
            expect(code == 1009 or (code == 1006 and size > UVICORN_FRAME_BYTES), f"{code} for {size} bytes")
    with suppress(httpx2.TransportError):  # the server may close before it has read all
        response = await user.http.post("/v1/chat/completions", headers=user.headers, content=b"x" * (2 * FRAME_BYTES))
        expect(response.status_code in (400, 413), f"{response.status_code} for a body of two MiB")


async def guess_secrets(user: User) -> None:
    """Log in with a secret of nobody, and with the secret of another user."""
    for userid, secret in ((user.id, user.message()), (user.neighbour.id, user.secret)):
        query = f"?{httpx2.QueryParams(userid=userid, secret=secret)}"
        async with user.connect(query, additional_headers=user.other_address) as connection:
            expect(await close_code(connection) in (1008, 4429), "plain text: let in")
        async with user.connect(
            query, additional_headers=user.other_address, subprotocols=[Subprotocol("chat.v2")]
        ) as connection:
            expect(await close_code(connection) in (4401, 4429), "chat.v2: let in")
    headers = user.other_address | {"Authorization": "Bearer wrong"}
    reply = Reply(user.id, user.message())
    for request in (await user.completion(reply, stream=True), {"url": "/v1/conversations"}):
        method = "POST" if "json" in request else "GET"
        response = await user.http.request(method, **request | {"headers": headers})
        expect(response.status_code in (401, 429), f"{request['url']}: {response.status_code}")


async def use_replies_of_others(user: User) -> None:
    """Name the reply and the conversation of another user, which must not exist for this one."""
    async with user.neighbour.chat() as theirs, user.chat() as own:
        asked = await theirs.ask(user.message(), conversation="new", **user.options())
        reply = await theirs.until(asked, when_streaming)
        events: list[Json] = [
            {"type": "parley.response.resume", "response_id": reply.id},
            {"type": "parley.response.cancel", "response_id": reply.id},
            {"type": "response.create", "input": user.message(), "conversation": reply.conversation},
            {"type": "response.create", "input": user.message(), "previous_response_id": reply.id},
        ]
        for event in events if reply.id else ():
            code = await own.error_code(json.dumps(event))
            expect(code in (*REFUSALS, "conversation_not_found", "previous_response_not_found"), f"{event}: {code}")
        response = await user.http.get(f"/v1/conversations/{reply.conversation}", headers=user.headers)
        expect(response.status_code == 404, f"the conversation of another user: {response.status_code}")
        await theirs.finish()
    expect(reply.outcome != "cancelled", "another user could cancel a reply")
    await user.neighbour.check_stored(reply)


async def close_code(connection: ClientConnection) -> int | None:
    """The code of the close, after everything that comes before it; 1006 where there is none."""
    with suppress(ConnectionClosed):
        while True:
            await connection.recv()
    return connection.close_code


GOOD: tuple[Action, ...] = (talk, talk_in_plain_text, complete, stream)
OTHERS: tuple[Action, ...] = (
    ask_too_much,
    vanish_at_once,
    vanish_in_prefill,
    vanish_in_the_queue,
    vanish_in_the_reply,
    vanish_in_plain_text,
    hang_up_in_a_stream,
    hang_up_before_the_response,
    stall,
    stall_and_vanish,
    stall_too_long,
    cancel,
    resume,
    send_nonsense,
    send_nonsense_over_http,
    send_too_much,
    guess_secrets,
    use_replies_of_others,
)


def deck(chance: random.Random) -> Iterator[Action]:
    """Actions without end, in random order, like cards: each one comes once in a round, good ones three times."""
    while True:
        cards = [*GOOD * 3, *OTHERS]
        chance.shuffle(cards)
        yield from cards
