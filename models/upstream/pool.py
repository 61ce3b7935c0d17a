"""Chooses the upstream for each reply."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Sequence

from models.chat_request import ChatRequest
from models.upstream.endpoint import Endpoint

REMEMBERED = 10_000  # beginnings of conversations, with the upstream that has them in its prefix cache
SLACK = 4  # more replies that an upstream may run than another one, and still be preferred for its prefix cache


class Pool:
    """The upstreams. A conversation stays with the one that has its beginning in the prefix cache, unless that is busy.

    Else the one that runs the fewest replies is chosen. One that has failed a moment ago comes last.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = endpoints
        self._last: OrderedDict[bytes, Endpoint] = OrderedDict()  # by the beginning of a conversation

    @property
    def trouble(self) -> str | None:
        """Which upstreams are away; None if none is."""
        told = [f"{one.url} is away: {one.trouble}" for one in self.endpoints if one.trouble]
        return "; ".join(told) or None

    def offering(self, model: str) -> list[Endpoint]:
        """The upstreams that answer and have a model."""
        return [one for one in self.endpoints if not one.trouble and model in one.models]

    def choose(self, endpoints: Collection[Endpoint], beginning: bytes) -> Endpoint:
        """The one of some upstreams for a reply in a conversation."""
        last, fewest = self._last.get(beginning), min(one.running for one in endpoints)
        chosen = min(endpoints, key=lambda one: (one.is_cooling, one.running, one.used))
        if last and last in endpoints and last.is_cooling == chosen.is_cooling and last.running <= fewest + SLACK:
            chosen = last
        self._last[beginning] = chosen
        self._last.move_to_end(beginning)
        if len(self._last) > REMEMBERED:
            self._last.popitem(last=False)
        return chosen


def beginning_of(request: ChatRequest, model: str) -> bytes:
    """What tells one conversation from others: its model, its user, and all up to the first question."""
    digest = hashlib.blake2b(f"{model}\0{request.user}".encode(), digest_size=16)
    for message in request.messages:
        digest.update(b"\0" + message["content"].encode())
        for image in message.get("images", ()):
            digest.update(b"\0" + image["url"].encode())
        if message["role"] == "user":
            break
    return digest.digest()
