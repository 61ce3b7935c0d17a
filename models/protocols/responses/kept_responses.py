"""The responses of one connection that are not stored, so that later requests of the connection can continue them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from models.messages import Message

KEPT_BYTES = 2**21  # on one connection; the oldest ones go first


class KeptResponse(NamedTuple):
    """The messages up to the end of a response; `after` is the stored response before all of them, if any."""

    after: str | None
    messages: Sequence[Message]

    @property
    def bytes(self) -> int:
        """An estimate of the memory that it takes."""
        return len(json.dumps(self.messages))


class KeptResponses:
    """Responses that are not stored, by id, in up to `max_bytes`."""

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self._room = max_bytes
        self._kept: dict[str, KeptResponse] = {}

    def add(self, id: str, kept: KeptResponse) -> None:
        """Keep a response; older ones make room."""
        if id in self._kept:
            self._room += self._kept.pop(id).bytes
        self._kept[id] = kept
        self._room -= kept.bytes
        while self._room < 0:
            self._room += self._kept.pop(next(iter(self._kept))).bytes

    def find(self, id: str | None) -> KeptResponse | None:
        """A kept response."""
        return self._kept.get(id or "")
