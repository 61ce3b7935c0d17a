"""The events of chat.v1: parses client events, renders server events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from models.errors import APIError, InvalidValueError, UnknownEventError
from models.generation.events import Created, Finished, Queued, Rejected, ResponseEvent, TextDelta, Warned
from models.messages import MAX_MESSAGES, Message, Role
from models.options import Options
from models.users.connections import Change
from models.validation import NO_SURROGATE, Json, convert, printable

# Client events

ShortText = Annotated[str, Meta(max_length=256, pattern=NO_SURROGATE, description="a string of at most 256 characters")]
Content = Annotated[
    str,
    Meta(pattern=r"\A\s*[^\s\ud800-\udfff][^\ud800-\udfff]*\Z", description="text that is not empty"),
]


class InputMessage(Struct, forbid_unknown_fields=True):
    """One message of the input."""

    role: Annotated[Role, Meta(description="system, user or assistant")]
    content: Content

    def as_message(self) -> Message:
        return {"role": self.role, "content": self.content}


Input = Annotated[
    Content
    | Annotated[
        list[Annotated[InputMessage, Meta(description="an object of role and content", extra={"report_object": True})]],
        Meta(min_length=1, max_length=MAX_MESSAGES),
    ],
    Meta(description=f"text that is not empty, or a list of 1 to {MAX_MESSAGES} objects of role and content"),
]
Object = Annotated[dict[str, Any], Meta(description="an object")]


class SessionUpdate(Struct):
    """`session.update`: new default options of this connection."""

    session: Object  # options


class ResponseCreate(Struct):
    """`response.create`: a request for a reply. All other fields are options."""

    input: Input
    conversation: ShortText | None = None  # None is the connection's own, "new" a new one, "none" no conversation
    after: ShortText | None = None  # the item that the input follows; None is the last, "none" is before the first
    options: Mapping[str, Any] = {}

    @property
    def messages(self) -> list[Message]:
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return [message.as_message() for message in self.input]


class ResponseCancel(Struct):
    """`response.cancel`: ends one response, or all responses that this connection follows."""

    response_id: ShortText | None = None


class ResponseResume(Struct):
    """`response.resume`: asks for the events of a response after a text delta, past and future ones."""

    response_id: ShortText
    starting_after: Annotated[int, Meta(ge=0, description="a sequence number, or 0")] = 0


ClientEvent = SessionUpdate | ResponseCreate | ResponseCancel | ResponseResume


class _Typed(Struct):
    type: ShortText


class _Identified(Struct):
    event_id: ShortText | None = None


def parse_event_id(fields: Json) -> str | None:
    """The event id of a frame, which errors repeat. Raises InvalidValueError."""
    return convert(fields, _Identified).event_id


def parse_event(fields: Json) -> ClientEvent:
    """The client event of a frame. Raises InvalidRequestError if any field is wrong."""
    match convert(fields, _Typed).type:
        case "session.update":
            update = convert(fields, SessionUpdate)
            Options().updated(update.session, at="session")
            return update
        case "response.create":
            return _parse_response_create(convert(fields, _ResponseFields).response)
        case "response.cancel":
            return convert(fields, ResponseCancel)
        case "response.resume":
            return convert(fields, ResponseResume)
        case unknown:
            raise UnknownEventError(f"there is no client event {printable(unknown, 64)!r}")


class _ResponseFields(Struct):
    response: Object


def _parse_response_create(response: Json) -> ResponseCreate:
    known = {name: response[name] for name in ("input", "conversation", "after") if name in response}
    event = convert(known, ResponseCreate, at="response")
    if event.after is not None and event.conversation == "none":
        raise InvalidValueError("response.after needs a conversation", "response.after")
    event.options = {name: value for name, value in response.items() if name not in known}
    Options().updated(event.options, at="response")
    return event


# Server events

PARAMS = {"input": "response.input", "after": "response.after"}  # chat.v1's names of the domain's parameters


def render(event: ResponseEvent, event_id: str | None = None) -> Json:
    """An event of a response. `event_id` is the id of the client event, for the first event of its response."""
    match event:
        case Created(response_id, conversation, left_out):
            response = {"id": response_id, "conversation": conversation, "status": "in_progress", "left_out": left_out}
            return {"type": "response.created", "response": response, "event_id": event_id}
        case Queued(response_id, position):
            return {"type": "response.queued", "response_id": response_id, "position": position}
        case TextDelta(response_id, sequence_number, text):
            return {
                "type": "response.output_text.delta",
                "response_id": response_id,
                "sequence_number": sequence_number,
                "delta": text,
            }
        case Rejected(_, error):
            return render_error(error, event_id)
        case Warned(response_id, error):
            return render_error(error, response_id=response_id)
        case Finished():
            return _render_finished(event)


def _render_finished(event: Finished) -> Json:
    reply = event.reply
    response = {
        "id": reply.id,
        "conversation": event.conversation,
        "status": reply.status,
        "status_details": {"reason": reply.reason},
        "output_text": reply.content,
        "usage": reply.usage,
        "decode_seconds": reply.decode_seconds,
    }
    return {"type": "response.done", "response": response, "sequence_number": reply.sequence_number + 1}


def render_session(kind: Literal["created", "updated"], session: Json) -> Json:
    """`session.created` and `session.updated`."""
    return {"type": f"session.{kind}", "session": session}


def render_presence(change: Change, user: str) -> Json:
    """`presence.joined` and `presence.left`."""
    return {"type": f"presence.{change}", "user": user}


def render_error(error: APIError, event_id: str | None = None, response_id: str | None = None) -> Json:
    """`error`: why the client event `event_id` is refused, or what is wrong with a response. All else goes on."""
    details = {
        "type": error.type,
        "code": error.code,
        "message": str(error),
        "param": PARAMS.get(error.param or "", error.param),
        "retry_after": error.retry_after,
        "event_id": event_id,
        "response_id": response_id,
    }
    return {"type": "error", "error": {name: value for name, value in details.items() if value is not None}}
