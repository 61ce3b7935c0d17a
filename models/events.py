"""The wire of chat.v1: client events checked, server events built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from models.item import Item, Message
from models.options import InvalidOption, check, text
from models.presence import Change
from models.refused import Refused

Json = dict[str, Any]

MESSAGES = 1000  # in one request


class InvalidEvent(Refused):
    """What is no JSON object, or no client event of chat.v1."""

    def __init__(self, code: str, message: str, param: str | None = None, event_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.event_id = event_id


@dataclass(frozen=True)
class SessionUpdate:
    """New default options of this connection."""

    event_id: str | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class ResponseCreate:
    """A request for a reply. `conversation` None is the connection's own, "new" a new one, "none" none at all.

    `after` names the item that the input comes after, where that is not the last; "none" is before the first.
    """

    event_id: str | None
    input: list[Message]
    conversation: str | None = None
    after: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ResponseCancel:
    """The wish to end one reply, or (`response_id` None) all of this connection's."""

    event_id: str | None
    response_id: str | None


@dataclass(frozen=True)
class ResponseResume:
    """The wish to be sent what came of a reply after the delta `starting_after`, and what comes from now on."""

    event_id: str | None
    response_id: str
    starting_after: int


ClientEvent = SessionUpdate | ResponseCreate | ResponseCancel | ResponseResume


def parse(frame: str | bytes) -> ClientEvent:
    """The client event in a frame. Raises InvalidEvent, whatever the frame holds."""
    event = parse_object(frame, "the frame")
    event_id = _field(event, "event_id", "event_id", None)
    try:
        match _field(event, "type", "type"):
            case "session.update":
                return SessionUpdate(event_id, _options(_object(event, "session"), "session"))
            case "response.create":
                return _response_create(event_id, _object(event, "response"))
            case "response.cancel":
                return ResponseCancel(event_id, _field(event, "response_id", "response_id", None))
            case "response.resume":
                return ResponseResume(event_id, _field(event, "response_id", "response_id"), _starting_after(event))
            case unknown:
                raise InvalidEvent("unknown_type", f"no client event is called {unknown[:64]!r}", "type")
    except InvalidEvent as invalid:
        invalid.event_id = event_id
        raise


def parse_object(text: str | bytes, what: str) -> Json:
    """The JSON object in a text, which an error calls `what`. Raises InvalidEvent."""
    try:
        value = json.loads(text if isinstance(text, str) else text.decode(), parse_constant=_no_constant)
    except RecursionError:
        raise InvalidEvent("invalid_json", f"{what} is nested too deep") from None
    except ValueError as error:  # bad JSON, bad UTF-8, a number of thousands of digits
        raise InvalidEvent("invalid_json", f"{what} is not JSON: {short(error)}") from None
    if not isinstance(value, dict):
        raise InvalidEvent("invalid_json", f"{what} is not a JSON object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def short(words: object, most: int = 200) -> str:
    """Words about what a client sent, fit to be sent back."""
    return str(words).encode(errors="replace").decode()[:most]


def _object(event: Json, name: str) -> Json:
    if name not in event:
        raise InvalidEvent("missing_field", f"{name} is missing", name)
    if not isinstance(event[name], dict):
        raise InvalidEvent("invalid_value", f"{name} must be an object", name)
    return dict(event[name])


def _field(values: Json, name: str, param: str, *default: None) -> Any:
    """A short string out of an event; without a default it has to be there."""
    value = values.get(name)
    if value is None and default:
        return None
    if name not in values:
        raise InvalidEvent("missing_field", f"{param} is missing", param)
    try:
        if len(text(value)) <= 256:
            return value
    except ValueError:
        pass
    raise InvalidEvent("invalid_value", f"{param} must be a string of at most 256 characters", param)


def _starting_after(event: Json) -> int:
    number = event.get("starting_after", 0)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise InvalidEvent("invalid_value", "starting_after must be a sequence number, or 0", "starting_after")
    return number


def _options(values: Json, param: str) -> Mapping[str, Any]:
    for name, value in values.items():
        try:
            check(name, value)
        except InvalidOption as invalid:
            raise InvalidEvent("invalid_value", short(invalid), short(f"{param}.{name}")) from None
    return values


def _response_create(event_id: str | None, response: Json) -> ResponseCreate:
    if "input" not in response:
        raise InvalidEvent("missing_field", "response.input is missing", "response.input")
    messages = _messages(response.pop("input"))
    conversation, after = (_field(response, name, f"response.{name}", None) for name in ("conversation", "after"))
    if after is not None and conversation == "none":
        raise InvalidEvent("invalid_value", "without a conversation there is nothing to come after", "response.after")
    options = {name: value for name, value in response.items() if name not in ("conversation", "after")}
    return ResponseCreate(event_id, messages, conversation, after, _options(options, "response"))


def _messages(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user", "content": _said(value, "response.input")}]
    if not isinstance(value, list) or not value:
        raise InvalidEvent(
            "invalid_value", "response.input must be a string or a list of {role, content}, not empty", "response.input"
        )
    if len(value) > MESSAGES:
        raise InvalidEvent("invalid_value", f"response.input may have {MESSAGES} messages", "response.input")
    return [_message(turn, f"response.input[{index}]") for index, turn in enumerate(value)]


def _message(turn: Any, param: str) -> Message:
    if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
        raise InvalidEvent("invalid_value", f"{param} must be an object of role and content", param)
    if turn["role"] not in ("system", "user", "assistant"):
        raise InvalidEvent("invalid_value", f"{param}.role must be system, user or assistant", f"{param}.role")
    return {"role": turn["role"], "content": _said(turn["content"], f"{param}.content")}


def _said(value: Any, param: str) -> str:
    try:
        if text(value).strip():
            return text(value)
    except ValueError:
        pass
    raise InvalidEvent("invalid_value", f"{param} must be text, not empty", param)


# Server events


def session(kind: Literal["created", "updated"], session: Json) -> Json:
    """`session.created` and `session.updated`."""
    return {"type": f"session.{kind}", "session": session}


def response_created(response_id: str, conversation: str | None, left_out: int, event_id: str | None) -> Json:
    """`response.created`: the request is taken, and a `response.done` will follow.

    `left_out` of the oldest messages had no room in the context.
    """
    response = {"id": response_id, "conversation": conversation, "status": "in_progress", "left_out": left_out}
    return {"type": "response.created", "response": response, "event_id": event_id}


def response_queued(response_id: str, position: int) -> Json:
    """`response.queued`: no slot is free; position 1 is next."""
    return {"type": "response.queued", "response_id": response_id, "position": position}


def output_text_delta(response_id: str, sequence_number: int, delta: str) -> Json:
    """`response.output_text.delta`: a piece of the reply; pieces are numbered from 1."""
    return {
        "type": "response.output_text.delta",
        "response_id": response_id,
        "sequence_number": sequence_number,
        "delta": delta,
    }


def response_done(conversation: str | None, reply: Item) -> Json:
    """`response.done`: the last event of a reply, whatever became of it."""
    return {
        "type": "response.done",
        "response": {
            "id": reply.id,
            "conversation": conversation,
            "status": reply.status,
            "status_details": {"reason": reply.reason},
            "output_text": reply.content,
            "usage": reply.usage,
            "decode_seconds": reply.decode_seconds,
        },
        "sequence_number": reply.sequence_number + 1,
    }


def presence(change: Change, user: str) -> Json:
    """`presence.joined` and `presence.left`."""
    return {"type": f"presence.{change}", "user": user}


def error(refused: Refused, event_id: str | None = None, response_id: str | None = None) -> Json:
    """`error`: why the client's event `event_id` is not acted on, or what is wrong with a reply; all else goes on."""
    details = {
        "type": refused.type,
        "code": refused.code,
        "message": str(refused),
        "param": refused.param,
        "retry_after": refused.retry_after,
        "event_id": event_id,
        "response_id": response_id,
    }
    return {"type": "error", "error": {name: value for name, value in details.items() if value is not None}}
