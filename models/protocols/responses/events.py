"""The events of a response on the wire: those of OpenAI's streams, and those that only `/ws` has."""

from __future__ import annotations

from collections.abc import Iterator

from models.errors import APIError
from models.generation.events import (
    Created,
    Finished,
    OutputDelta,
    OutputItemAdded,
    OutputItemDone,
    Queued,
    ResponseEvent,
    Warned,
)
from models.model_info import ModelList
from models.output_item import OutputItem
from models.protocols.error_object import render_error
from models.protocols.logprobs import render_logprobs
from models.protocols.responses.resource import (
    render_content,
    render_details,
    render_part,
    render_response,
)
from models.store.item import Item, Status, part_id
from models.validation import Json

DELTAS = {  # the type of an event with a piece, by the type of the part
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}
FINAL = {Status.COMPLETED: "response.completed", Status.FAILED: "response.failed"}  # all others are incomplete


class EventRenderer:
    """Renders the events of one response, from `Created` on, and numbers them from 0.

    The numbers depend only on the events, so a replay has the same ones.
    """

    def __init__(self, models: ModelList) -> None:
        self._models = models
        self._next = 0  # the number of the next event
        self._item_id = ""  # of the part that was added last
        self._item = OutputItem("message")

    @property
    def last(self) -> int:
        """The number of the event that was rendered last, or 0."""
        return max(self._next - 1, 0)

    def render(self, event: ResponseEvent) -> list[Json]:
        """The numbered events that stand for an event of the domain; often one, and none for `Queued` and `Warned`."""
        rendered = list(self._render(event))
        for one in rendered:
            one["sequence_number"] = self._next
            self._next += 1
        return rendered

    def _render(self, event: ResponseEvent) -> Iterator[Json]:
        match event:
            case OutputDelta():
                yield self._delta(event)
            case Created():
                yield from self._created(event)
            case OutputItemAdded():
                yield from self._added(event)
            case OutputItemDone():
                yield from self._done(event)
            case Finished(conversation, reply):
                kind = FINAL.get(reply.status, "response.incomplete") if reply.status else "response.incomplete"
                yield {"type": kind, "response": self.response(conversation, reply)}

    def response(self, conversation: str | None, reply: Item, status: str | None = None) -> Json:
        """The response object of the first and the last events."""
        return render_response(self._models, conversation, reply, status)

    def _created(self, created: Created) -> Iterator[Json]:
        in_background = bool((created.reply.request or {}).get("background"))
        first = "queued" if in_background else "in_progress"
        for kind, status in (("created", first), ("queued", "queued"), ("in_progress", "in_progress")):
            if kind != "queued" or in_background:
                response = self.response(created.conversation, created.reply, status)
                yield {"type": f"response.{kind}", "response": response}

    def _added(self, event: OutputItemAdded) -> Iterator[Json]:
        self._item, self._item_id = event.item, part_id(event.response_id, event.item.type, event.index)
        item = render_part(self._item_id, event.item, "in_progress", is_empty=True)
        yield {"type": "response.output_item.added", "output_index": event.index, "item": item}
        if event.item.type != "function_call":
            part = {"content_index": 0, "part": render_content(event.item, is_empty=True)}
            yield {"type": "response.content_part.added", **self._place(event.index), **part}

    def _delta(self, event: OutputDelta) -> Json:
        kind, rest = self._item.type, Json()
        if kind != "function_call":
            rest["content_index"] = 0
        if kind == "message":
            rest["logprobs"] = render_logprobs(event.logprobs or ())
        return {"type": f"{DELTAS[kind]}.delta", **self._place(event.index), "delta": event.text, **rest}

    def _done(self, event: OutputItemDone) -> Iterator[Json]:
        item, place = event.item, self._place(event.index)
        if item.type == "function_call":
            named = {"name": item.name, "arguments": item.text}
            yield {"type": "response.function_call_arguments.done", **place, **named}
        else:
            content = render_content(item)
            rest: Json = {"content_index": 0, "text": content["text"]}
            if item.type == "message":
                rest["logprobs"] = content["logprobs"]
            yield {"type": f"{DELTAS[item.type]}.done", **place, **rest}
            yield {"type": "response.content_part.done", **place, "content_index": 0, "part": content}
        yield {
            "type": "response.output_item.done",
            "output_index": event.index,
            "item": render_part(self._item_id, item),
        }

    def _place(self, index: int) -> Json:
        return {"item_id": self._item_id, "output_index": index}


def render_error_event(error: APIError, stream_id: str | None = None) -> Json:
    """`error`: why a request on a socket is refused. All else goes on."""
    details = render_error(error)
    if error.retry_after:
        details["headers"] = {"retry-after": str(error.retry_after)}
    event: Json = {"type": "error", "status": error.status, "error": details}
    return event if stream_id is None else event | {"stream_id": stream_id}


# What only `/ws` has


class ChatEventRenderer(EventRenderer):
    """Renders responses with what a chat page wants to know of them."""

    def response(self, conversation: str | None, reply: Item, status: str | None = None) -> Json:
        """The response object, with the field `parley`."""
        return super().response(conversation, reply, status) | {"parley": render_details(reply)}


def render_parley(event: Queued | Warned) -> Json:
    """`parley.queue` and `parley.warning`, which have no number."""
    if isinstance(event, Queued):
        return {"type": "parley.queue", "response_id": event.response_id, "position": event.position}
    return {"type": "parley.warning", "response_id": event.response_id, "error": render_error(event.error)}


def render_presence(change: str, user: str) -> Json:
    """`parley.presence.joined` and `parley.presence.left`."""
    return {"type": f"parley.presence.{change}", "user": user}


def render_session(session: Json) -> Json:
    """`parley.session.created`."""
    return {"type": "parley.session.created", "session": session}
