"""The devices from which users have logged in before."""

from __future__ import annotations

import hmac

from itsdangerous import BadSignature, URLSafeTimedSerializer

DEVICE_SECONDS = 365 * 24 * 3600


class Devices:
    """Signed tokens that say whose login a device has seen. They open nothing.

    A token holds the fingerprint of the secret: whoever knew an old secret has no device of the user.
    """

    def __init__(self, key: bytes) -> None:
        self._serializer = URLSafeTimedSerializer(hmac.digest(key, b"devices", "sha256"))

    def token(self, user_id: str, fingerprint: str) -> str:
        """A token for a device. It is valid for a year, as long as the secret is valid."""
        return str(self._serializer.dumps([user_id, fingerprint]))

    def read(self, token: str) -> tuple[str, str] | None:
        """The user id and the fingerprint in a token; None if the token is not valid."""
        try:
            user_id, fingerprint = self._serializer.loads(token, max_age=DEVICE_SECONDS)
        except BadSignature:
            return None
        return user_id, fingerprint
