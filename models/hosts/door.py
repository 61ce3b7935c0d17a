"""How two hosts show each other that they belong together."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable

from models.errors import ServerUnavailableError
from models.hub.link import Link

NONCE_BYTES = 32


class Door:
    """What a stranger may call at a host. `let_in` is called once it has proved that it has the key of all hosts.

    Each side proves it with an HMAC over random bytes of both, so the key itself is never sent. What is sent afterwards
    is not encrypted.
    """

    def __init__(self, key: bytes, let_in: Callable[[], None]) -> None:
        self._key = key
        self._let_in = let_in
        self._nonce = secrets.token_bytes(NONCE_BYTES)

    async def challenge(self) -> bytes:
        """Random bytes, which are new for each connection."""
        return self._nonce

    async def prove(self, proof: bytes, nonce: bytes) -> bytes:
        """Take the proof of the other side, and return one over its random bytes. Raises ServerUnavailableError."""
        if not hmac.compare_digest(proof, proof_of(self._key, b"guest", self._nonce, nonce)):
            raise ServerUnavailableError("the other host has another key")
        self._let_in()
        return proof_of(self._key, b"host", nonce, self._nonce)


async def enter(link: Link, key: bytes) -> None:
    """Prove at the door of another host that both have the same key. Raises ServerUnavailableError if they do not."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    theirs = await link.call(Door.challenge)
    answer = await link.call(Door.prove, proof_of(key, b"guest", theirs, nonce), nonce)
    if not hmac.compare_digest(answer, proof_of(key, b"host", nonce, theirs)):
        raise ServerUnavailableError("the other host has another key")


def proof_of(key: bytes, role: bytes, *nonces: bytes) -> bytes:
    """The proof of a side with a role, so that none can send back what it has got."""
    return hmac.digest(key, b"".join([role, *nonces]), "sha256")
