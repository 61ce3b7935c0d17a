"""`response.steer`: a user's input for a reply that is running; the next reply answers it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal

from msgspec import Struct

from models.errors import APIError, InvalidRequestError, InvalidValueError
from models.messages import Message
from models.output_item import OutputItem
from models.protocols.responses.input_items import Id, ItemReference, parse_input
from models.validation import Json, check_json, convert

MAX_STEERS = 16  # of one connection, that wait for their reply
MAX_BYTES = 2**20

Code = Literal[
    "invalid_input",
    "response_not_found",
    "response_not_active",
    "successor_creation_failed",
    "too_many_pending_steers",
]


class SteeringError(InvalidRequestError):
    """Input for a running reply cannot be accepted, or cannot be answered."""

    def __init__(self, message: str, code: Code) -> None:
        super().__init__(message)
        self.code = code


class _Event(Struct, forbid_unknown_fields=True):
    previous_response_id: Id
    input: Any


@dataclass(frozen=True)
class Steer:
    """Input for a running reply. `input` has it as the client has sent it."""

    response_id: str
    input: Any
    messages: Sequence[Message]
    id: str = field(default_factory=lambda: f"steer_{uuid.uuid4().hex}")

    @classmethod
    def parse(cls, fields: Json) -> Steer:
        """The input in a client's event. Raises SteeringError."""
        try:
            event = convert(fields, _Event)
            check_json(event.input, "input", MAX_BYTES)  # it may have to be sent back
            items = parse_input(event.input)
            for index, item in enumerate(items):
                _check_message(item, f"input[{index}]")
        except APIError as error:
            raise SteeringError(str(error), "invalid_input") from None
        messages = [item for item in items if not isinstance(item, ItemReference)]
        if not any(message["content"].strip() for message in messages):
            raise SteeringError("input must contain text", "invalid_input")
        return cls(event.previous_response_id, event.input, messages)

    def render_accepted(self) -> Json:
        """`response.steer.accepted`: the reply ends soon, and the next one answers the input."""
        return {"type": "response.steer.accepted", "steer": self._reference}

    def render_pending(self, output: Sequence[OutputItem]) -> Json:
        """`response.steer.pending`: the reply has called tools, so the input waits for the results."""
        calls = [item for item in output if item.type == "function_call"]
        required = [{"type": "function_call_output", "call_id": one.call_id, "name": one.name} for one in calls]
        event = {"type": "response.steer.pending", "steer": self._reference, "required_input": required}
        return event | {"reason": "waiting_for_required_input"}

    @property
    def _reference(self) -> Json:
        return {"id": self.id, "previous_response_id": self.response_id}


def render_failed(error: APIError, code: str, steer: Steer) -> Json:
    """`response.steer.failed`: nothing answers input that was accepted, which comes back."""
    return _failed(error, code, {**steer._reference, "input": steer.input})


def render_refused(error: SteeringError, fields: Json) -> Json:
    """`response.steer.failed`: a client's event is refused; its input comes back."""
    steer = {
        "previous_response_id": _sendable(fields.get("previous_response_id"), str),
        "input": _sendable(fields.get("input"), str | list),
    }
    return _failed(error, error.code, steer)


def _failed(error: APIError, code: str, steer: Json) -> Json:
    details = {"type": "invalid_request_error", "code": code, "message": str(error)}
    return {"type": "response.steer.failed", "steer": steer, "error": details}


def _sendable(value: Any, type: type | UnionType) -> Any:
    """The value, or empty text if it is of another type or cannot be sent."""
    with suppress(InvalidValueError):
        check_json(value, "it", MAX_BYTES)
        return value if isinstance(value, type) else ""
    return ""


def _check_message(item: Message | ItemReference, at: str) -> None:
    if isinstance(item, ItemReference) or item["role"] != "user":
        raise InvalidValueError(f"{at} must be a message of the user", at)
