"""The Responses protocol on a socket: requests come as frames, and events go out as frames."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

from msgspec import Meta, Struct

from models.errors import (
    APIError,
    InvalidRequestError,
    InvalidValueError,
    ResponseNotFoundError,
    ServerError,
    TooManyResponsesError,
    UnknownEventError,
)
from models.generation.events import Created, Finished, OutputItemAdded, Queued, Rejected, ResponseEvent, Warned
from models.generation.interface import ResponseService, Unstored
from models.model_info import ModelList
from models.protocols.client import Client, Close
from models.protocols.responses.events import EventRenderer, render_error_event
from models.protocols.responses.input_items import resolve
from models.protocols.responses.kept_responses import KeptResponse, KeptResponses
from models.protocols.responses.request import ConversationReference, ResponsesRequest
from models.protocols.responses.steering import (
    MAX_STEERS,
    Steer,
    SteeringError,
    render_failed,
    render_refused,
)
from models.store.conversations import Conversation
from models.store.item import Item, Status
from models.users.connections import Change
from models.validation import NO_SURROGATE, Json, convert, parse_object, printable

logger = logging.getLogger("parley")

BAD_FRAMES = 20  # in a row, before the connection is closed
WAITING = 64  # requests that may wait on one connection for earlier ones, or for the items that they refer to
WAITING_BYTES = 2**20  # of their frames; one may always wait

ShortText = Annotated[str, Meta(max_length=256, pattern=NO_SURROGATE, description="a string of at most 256 characters")]


class _Lane(Struct):
    stream_id: ShortText | None = None


class _Envelope(Struct):
    type: ShortText


@dataclass(frozen=True)
class Turn:
    """A request in its lane. One that the server makes answers the `steers`, which no request of the client has."""

    request: ResponsesRequest
    lane: str | None  # its stream_id
    bytes: int = 0  # of its frame
    steers: Sequence[Steer] = ()


@dataclass
class Stream:
    """A response whose events go to the client."""

    renderer: EventRenderer
    stream_id: str | None  # comes back with each event
    starting_after: int = -1  # the client has the events up to this number
    turn: Turn | None = None  # None: it was asked for elsewhere
    kept: KeptResponse | None = None  # what the connection keeps at its end, but for the reply
    calls_tools: bool = False
    steers: list[Steer] = field(default_factory=list)  # to be answered by the next reply
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class ResponsesSession:
    """The session of one client of `/v1/responses`.

    Requests with one `stream_id` are answered one after the other, others at the same time; those without one share
    a lane. Responses go on when the client disconnects.
    """

    def __init__(self, responses: ResponseService, models: ModelList, user: str, client: Client) -> None:
        self._responses = responses
        self._models = models
        self._user = user
        self._client = client
        self._bad_frames = 0  # in a row
        self._lanes: dict[str | None, deque[Turn]] = {}  # what has no response yet, by stream_id
        self._streams: dict[str, Stream] = {}  # by the id of the response
        self._kept = KeptResponses()
        self._pending: dict[str, list[Steer]] = {}  # they wait for results of tools, by the id of the response
        self._tasks: set[asyncio.Task[None]] = set()

    def receive(self, frame: str | bytes) -> Close | None:
        """Act on one frame, or send the client an error. Returns how to close the connection, if it has to close."""
        stream_id = None
        try:
            fields = parse_object(frame, "the frame")
            stream_id = convert(fields, _Lane).stream_id
            kind = convert(fields, _Envelope).type
            del fields["type"]
            fields.pop("stream_id", None)
            self._act(kind, fields, stream_id, len(frame))
            self._bad_frames = 0
        except APIError as error:
            self._client.send_json(render_error_event(error, stream_id))
            is_bad = isinstance(error, InvalidRequestError) and error.status == 400
            self._bad_frames = self._bad_frames + 1 if is_bad else 0
            return Close(4400, f"{BAD_FRAMES} bad frames in a row") if self._bad_frames >= BAD_FRAMES else None
        return None

    def presence_changed(self, change: Change, user: str) -> None:
        """Another user has joined or left, of which this protocol says nothing."""

    def conversation_changed(self, id: str, conversation: Conversation | None) -> None:
        """A conversation has changed, of which this protocol says nothing."""

    def close(self) -> None:
        """The client has disconnected; its responses go on for a while."""
        for task in self._tasks:
            task.cancel()
        self._responses.leave(self)

    def on_event(self, event: ResponseEvent) -> None:
        """Send the client an event of a response."""
        stream = self._streams[event.response_id]
        match event:
            case Queued() | Warned():
                return self._tell(event)
            case Rejected(error=error):
                if stream.turn:
                    self._refuse(error, stream.turn)
                return self._end(event.response_id)
            case Created() if stream.turn:
                self._pending.pop(stream.turn.request.previous or "", None)  # this reply answers them
            case OutputItemAdded(item=item) if item.type == "function_call":
                stream.calls_tools = True
        self._send(stream, event)
        if isinstance(event, Finished):
            self._keep(stream, event.reply)
            self._follow_steers(stream, event)
            self._end(event.response_id)

    async def wait_sent(self) -> None:
        """Wait until all events are sent to the client."""
        await self._client.wait_sent()

    # Requests

    def _act(self, kind: str, fields: Json, stream_id: str | None, size: int) -> None:
        match kind:
            case "response.create":
                self._enqueue(Turn(self._parse(fields), stream_id, size))
            case "response.steer":
                self._steer(fields)
            case _:
                raise UnknownEventError(f"there is no client event {printable(kind, 64)!r}")

    def _parse(self, fields: Json) -> ResponsesRequest:
        """The request of a `response.create`; on a socket, all responses are streamed."""
        fields.pop("stream", None)
        request = ResponsesRequest.parse(fields, self._models)
        if request.background:
            raise InvalidValueError("background must be false on a socket", "background", "false")
        return request

    def _enqueue(self, turn: Turn) -> None:
        waiting = [one for turns in self._lanes.values() for one in turns]
        if len(waiting) >= WAITING:
            raise TooManyResponsesError(f"{WAITING} requests wait on this connection already: wait for one")
        if waiting and sum(one.bytes for one in waiting) + turn.bytes > WAITING_BYTES:
            told = f"the requests that wait on this connection may have {WAITING_BYTES} bytes together: wait for one"
            raise TooManyResponsesError(told)
        if turn.lane in self._lanes:
            return self._lanes[turn.lane].append(turn)
        self._lanes[turn.lane] = deque([turn])
        self._start(self._answer_lane(turn.lane))

    async def _answer_lane(self, lane: str | None) -> None:
        turns = self._lanes[lane]
        while turns:
            turn = turns[0]
            try:
                await self._answer(turn)
            except APIError as error:
                self._refuse(error, turn)
            except Exception:
                logger.exception("a request on a socket failed")
                self._refuse(ServerError(), turn)
        del self._lanes[lane]

    async def _answer(self, turn: Turn) -> None:
        """Ask for a response, and wait until it has ended."""
        request = turn.request
        try:
            new = await resolve(request.input, partial(self._responses.find_message, self._user))
        finally:
            self._lanes[turn.lane].popleft()  # it waits no longer
        kept = self._kept.find(request.previous)
        steered = [message for steer in self._pending.get(request.previous or "", ()) for message in steer.messages]
        messages, target = [*(kept.messages if kept else ()), *steered, *new], request.target()
        if kept:
            target = Unstored(kept.after) if not request.store else replace(request, previous=kept.after).target()
        asked = request.response_request(self._user, messages, target)
        after = target.after if isinstance(target, Unstored) else None
        stream = Stream(self._renderer(), turn.lane, turn=turn)
        stream.kept = None if request.store else KeptResponse(after, messages)
        self._streams[asked.id] = stream
        self._responses.create(asked, self)
        await stream.ended.wait()

    def _refuse(self, error: APIError, turn: Turn) -> None:
        """Tell the client that there is no reply to a turn."""
        if not turn.steers:
            return self._client.send_json(render_error_event(error, turn.lane))
        for steer in turn.steers:
            self._send_steer(render_failed(error, "successor_creation_failed", steer), turn.lane)

    # Input for running replies

    def _steer(self, fields: Json) -> None:
        """Accept input for a running reply, which ends unless it calls tools; or tell the client why not."""
        stream = None
        try:
            steer = Steer.parse(fields)
            stream = self._streams.get(steer.response_id)
            self._check_steerable(stream)
        except SteeringError as error:
            told = render_refused(error, fields)
            return self._send_steer(told, stream.stream_id if stream else None, stream)
        assert stream
        stream.steers.append(steer)
        self._send_steer(steer.render_accepted(), stream.stream_id, stream)
        if not stream.calls_tools:  # a reply with half a call is of no use
            self._start(self._end_steered(steer.response_id))

    async def _end_steered(self, id: str) -> None:
        with suppress(ResponseNotFoundError):  # it is about to end
            await self._responses.cancel(self._user, id, steered=True)

    def _check_steerable(self, stream: Stream | None) -> None:
        """Raise SteeringError if the next reply cannot answer more input."""
        if stream is None or stream.turn is None:
            raise SteeringError("this connection has no such reply running", "response_not_found")
        waiting = [*self._pending.values(), *(one.steers for one in self._streams.values())]
        if sum(map(len, waiting)) >= MAX_STEERS:
            raise SteeringError(f"{MAX_STEERS} inputs wait on this connection already", "too_many_pending_steers")

    def _follow_steers(self, stream: Stream, event: Finished) -> None:
        """A reply has ended: answer the input that came meanwhile, or let it wait for the results of tools."""
        reply, steers = event.reply, stream.steers
        if not steers or not stream.turn:
            return
        if reply.status not in (Status.COMPLETED, Status.INCOMPLETE):
            error = SteeringError("the reply was cancelled, or failed", "response_not_active")
            for steer in steers:
                self._send_steer(render_failed(error, error.code, steer), stream.stream_id, stream)
        elif stream.calls_tools:
            self._pending[reply.id] = steers
            for steer in steers:
                self._send_steer(steer.render_pending(reply.output), stream.stream_id, stream)
        else:
            turn = stream.turn
            self._lanes[turn.lane].appendleft(
                replace(turn, request=_successor(turn.request, event, steers), steers=steers)
            )

    def _send_steer(self, event: Json, stream_id: str | None, stream: Stream | None = None) -> None:
        """Send an event of steering. It is not in the response's stream: it has the number of the event before it."""
        number = stream.renderer.last if stream else 0
        lane: Json = {} if stream_id is None else {"stream_id": stream_id}
        self._client.send_json(event | {"sequence_number": number} | lane)

    # Events

    def _send(self, stream: Stream, event: ResponseEvent) -> None:
        lane: Json = {} if stream.stream_id is None else {"stream_id": stream.stream_id}
        for rendered in stream.renderer.render(event):
            # The end is always sent: after a crash, the client may have seen more than is stored.
            if rendered["sequence_number"] > stream.starting_after or isinstance(event, Finished):
                self._client.send_json(rendered | lane)

    def _renderer(self) -> EventRenderer:
        return EventRenderer(self._models)

    def _tell(self, event: Queued | Warned) -> None:
        """Tell of a moment in the life of a response, for which this protocol has no event."""

    def _keep(self, stream: Stream, reply: Item) -> None:
        if stream.kept:
            self._kept.add(reply.id, stream.kept._replace(messages=[*stream.kept.messages, reply.message]))

    def _end(self, response_id: str) -> None:
        self._streams.pop(response_id).ended.set()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _successor(request: ResponsesRequest, event: Finished, steers: Sequence[Steer]) -> ResponsesRequest:
    """The request for a reply to input that came while another request was answered, with the settings of that one."""
    messages = [message for steer in steers for message in steer.messages]
    if request.conversation is None or event.conversation is None:
        return replace(request, input=messages, previous=event.response_id)
    # Behind this reply, also if somebody shows another branch of the conversation by now.
    return replace(request, input=messages, conversation=ConversationReference(event.conversation, event.response_id))
