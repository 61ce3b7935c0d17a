"""A `ResponseService` whose replies a test writes itself, without a model and without a database."""

from __future__ import annotations

import asyncio

from models.chat_request import ChatRequest
from models.errors import ItemNotFoundError, ResponseNotFoundError
from models.generation.interface import Follower, Listener, ResponseRequest, Stateless, Target
from models.generation.response import ActiveResponse
from models.messages import FinishReason, Message
from models.options import Options
from models.store.item import Item, Status
from models.validation import Json

LINGER = 3600.0


class FakeResponses:
    """Keeps all requests; the replies to them say what a test lets them say.

    `messages` has the stored messages that a request may refer to, by id.
    """

    def __init__(self) -> None:
        self.asked: list[ResponseRequest] = []
        self.messages: dict[str, Message] = {}
        self.left: list[Listener] = []
        self._responses: dict[str, ActiveResponse] = {}
        self._created: asyncio.Queue[ActiveResponse] = asyncio.Queue()

    @property
    def waiting(self) -> int:
        """How many requests no test has taken yet."""
        return self._created.qsize()

    async def next(self) -> ActiveResponse:
        """The response to the next request."""
        return await self._created.get()

    def create(self, request: ResponseRequest, listener: Listener | None) -> str:
        response = ActiveResponse(request, Options())
        if listener:
            response.add_listener(listener)
        self.asked.append(request)
        self._responses[response.id] = response
        self._created.put_nowait(response)
        return response.id

    async def follow(self, user: str, id: str, follower: Follower) -> None:
        await self._find(user, id).catch_up(follower)

    async def find(self, user: str, id: str) -> tuple[str | None, Item]:
        response = self._find(user, id)
        return response.conversation, response.item

    def leave(self, listener: Listener) -> None:
        self.left.append(listener)
        for response in self._responses.values():
            response.remove_listener(listener, LINGER)

    async def cancel(self, user: str, id: str, steered: bool = False) -> None:
        self._cancel(user, id, steered)

    def _cancel(self, user: str, id: str, steered: bool = False) -> None:
        response = self._find(user, id)
        if response.status != Status.IN_PROGRESS:
            raise ResponseNotFoundError("no such reply is running")
        status = (Status.INCOMPLETE, "steered") if steered else (Status.CANCELLED, "client_cancelled")
        response.status, response.reason = status
        conclude(response)

    def cancel_all(self, listener: Listener) -> None:
        for id, response in self._responses.items():
            if response.is_followed_by(listener) and response.status == Status.IN_PROGRESS:
                self._cancel(response.user, id)

    def abandon(self, user: str, id: str) -> None:
        self._cancel(user, id)

    async def find_message(self, user: str, id: str) -> Message:
        if id not in self.messages:
            raise ItemNotFoundError
        return self.messages[id]

    async def wait_ended(self, user: str, id: str) -> None:
        raise NotImplementedError

    async def delete(self, user: str, id: str) -> None:
        raise NotImplementedError

    async def set_leaf(self, user: str, id: str, item: str) -> None:
        raise NotImplementedError

    async def delete_conversation(self, user: str, id: str) -> None:
        raise NotImplementedError

    def _find(self, user: str, id: str) -> ActiveResponse:
        response = self._responses.get(id)
        if response is None or response.user != user:
            raise ResponseNotFoundError("there is no such response")
        return response


def new_response(
    target: Target | None = None,
    options: Options | None = None,
    details: Json | None = None,
    background: bool = False,
    generate: bool = True,
) -> ActiveResponse:
    """A response of ann's to "Hi"."""
    chat = ChatRequest("ann", [{"role": "user", "content": "Hi"}], options or Options())
    request = ResponseRequest(chat, target or Stateless(), background, generate, details=details or {})
    return ActiveResponse(request, Options())


def perform(response: ActiveResponse, script: str) -> None:
    """Let a reply say its parts: "think A | say B | call f {}", in pieces of four characters, as in scripted.py."""
    for part in script.split(" | "):
        kind, _, text = part.partition(" ")
        if kind == "call":
            name, _, text = text.partition(" ")
            response.begin_call(name)
        for start in range(0, len(text), 4):
            piece = text[start : start + 4]
            response.add_text({"think": "reasoning", "say": "message", "call": "function_call"}[kind], piece)  # type: ignore[arg-type]


def conclude(response: ActiveResponse, reason: FinishReason | None = None) -> None:
    """Let a reply end, by itself if there is a reason, else as its status says."""
    if reason:
        response.end(reason)
    response.close()
    response.finish()


def answer(response: ActiveResponse, script: str, reason: FinishReason = "stop") -> None:
    """Let a response begin, say all of a script, and end."""
    response.announce()
    perform(response, script)
    conclude(response, reason)
