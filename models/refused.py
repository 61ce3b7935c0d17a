"""What a client cannot have."""

from __future__ import annotations

from typing import Literal

ErrorType = Literal["invalid_request_error", "rate_limit_error", "authentication_error", "server_error"]


class Refused(Exception):
    """A request that is not met; `type`, `code` and `param` are how the wire names it, the message says what to do."""

    type: ErrorType = "invalid_request_error"
    code: str
    param: str | None = None
    retry_after: int | None = None  # seconds, where it may be tried again
    message: str  # where it is always the same

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.message)


class ServerFailed(Refused):
    """What failed, and not by the client's fault."""

    type = "server_error"
    code = "server_error"
    message = "the server failed; try again"


class InvalidValue(Refused):
    """A value that is not allowed."""

    code = "invalid_value"

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param
