"""Every error that Parley raises on purpose, in one tree.

ParleyError
├── StartError                     the server, or a command, cannot start: one line for the operator
│   ├── SettingsError              a setting has a bad value
│   ├── ModelError                 the model cannot be loaded
│   │   ├── UnsupportedModelError  the engine cannot run this kind of model
│   │   └── CacheTooLargeError     the device has no room for the key-value cache
│   ├── DatabaseError              the database cannot be opened
│   │   └── DatabaseInUseError     another process uses the database
│   ├── DataFolderError            the data folder cannot be used
│   ├── UntrustedPathError         other users could have written a program, or can read a secret
│   └── UsersError                 a user cannot be added or removed, or the key is a wrong one
├── APIError                       a request is refused, with an HTTP status, a type, a code and a message
│   ├── InvalidRequestError   400  InvalidJSON, InvalidValue, MissingField, UnknownField, UnknownEvent,
│   │                              UnsupportedParameter, MessagesRejected, ContextLengthExceeded,
│   │                              PreviousResponseNotFound, FormatFailed, UpstreamRefused
│   │                         404  ConversationNotFound, ItemNotFound, ResponseNotFound, ModelNotFound
│   │                         409  ConversationLocked, ConversationFull, StorageFull
│   │                         413  BodyTooLarge
│   │                         415  UnsupportedEncoding
│   ├── AccessError           401  WrongCredentials
│   │                         403  OriginNotAllowed
│   ├── RateLimitError        429  RateLimitExceeded, TooManyResponses, TooManyConnections, TooManyLogins
│   │                         503  QueueFull, UpstreamBusy
│   └── ServerError           500  itself, NotStored
│                             502  UpstreamFailed
│                             503  ServerStopping, ServerUnavailable, DatabaseUnavailable, UpstreamUnavailable
└── EngineError                    the engine cannot do a task
    ├── KernelsUnavailableError    the C++ kernels cannot be compiled or loaded
    └── CompilationError           the model cannot be compiled
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

ErrorType = Literal["invalid_request_error", "rate_limit_error", "authentication_error", "server_error"]


class ParleyError(Exception):
    """The root of the tree."""


# The server cannot start


class StartError(ParleyError):
    """The server, or a command, cannot start. The message is one line for the operator and says what to do."""


class SettingsError(StartError):
    """A setting has a value that is not allowed; the message names the setting, the value and the allowed values."""


class ModelError(StartError):
    """The model cannot be loaded; the message says why and what to do."""


class UnsupportedModelError(ModelError):
    """The engine cannot run this kind of model; `reason` says what the engine does not support."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the model cannot run on this engine: {reason}; choose a decoder-only model with plain attention"
        )
        self.reason = reason


class CacheTooLargeError(ModelError):
    """The device has no room for the key-value cache; the message says which setting to lower."""


class DatabaseError(StartError):
    """The database cannot be opened; the message says what to do."""


class DatabaseInUseError(DatabaseError):
    """Another process runs replies in the database."""

    def __init__(self, machine: str, pid: int) -> None:
        super().__init__(
            f"another Parley uses this database, process {pid} on {machine}: run one process only; stop the other one, "
            "or give this one its own PARLEY_DATA or PARLEY_DATABASE_URL"
        )


class DataFolderError(StartError):
    """The data folder cannot be used."""

    def __init__(self, folder: Path, error: OSError) -> None:
        super().__init__(
            f"PARLEY_DATA={folder} cannot be used: {error.strerror}; it must be a folder that Parley can write to"
        )


class UntrustedPathError(StartError):
    """A file or folder belongs to another user, or is open to others and cannot be closed."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} {reason}, so it is not safe to use: close it to others (chmod go-rwx), or remove it; or set "
            "PARLEY_DATA, PARLEY_DATABASE_URL, or for the cache XDG_CACHE_HOME, to a place of your own"
        )


class UsersError(StartError):
    """A user cannot be added or removed, or the key is broken or a wrong one; the message says what to do."""


# A request is refused


class APIError(ParleyError):
    """A request is refused. `code` and `param` are for programs, the message says what to do.

    `status` is the HTTP status. A WebSocket that ends with this error closes with code 4000 + `status`. Plain text
    closes with 1008 for 401 and 403.
    """

    status: int = 400
    type: ErrorType = "invalid_request_error"
    code: str
    param: str | None = None
    retry_after: int | None = None  # seconds to wait before the next try
    message: str  # used if the caller gives no message

    def __init__(self, message: str | None = None, param: str | None = None) -> None:
        super().__init__(message or self.message)
        if param is not None:
            self.param = param


class InvalidRequestError(APIError):
    """The request is wrong, or does not fit the current state: it fails again until something changes."""


class InvalidJSONError(InvalidRequestError):
    """The body or frame is not a JSON object."""

    code = "invalid_json"


class InvalidValueError(InvalidRequestError):
    """A parameter has a value that is not allowed; `allowed` describes the allowed values, or is None."""

    code = "invalid_value"

    def __init__(self, message: str, param: str, allowed: str | None = None) -> None:
        super().__init__(message, param)
        self.allowed = allowed


class MissingFieldError(InvalidRequestError):
    """A required parameter is missing."""

    code = "missing_field"


class UnknownFieldError(InvalidRequestError):
    """There is no such parameter."""

    code = "invalid_value"


class UnknownEventError(InvalidRequestError):
    """There is no client event of this type."""

    code = "unknown_type"
    param = "type"


class UnsupportedParameterError(InvalidRequestError):
    """A parameter asks for something that Parley cannot do. Ignoring it would change the reply."""

    code = "unsupported_parameter"

    def __init__(self, message: str, param: str, code: str = "unsupported_parameter") -> None:
        super().__init__(message, param)
        self.code = code


class MessagesRejectedError(InvalidRequestError):
    """The chat template of the model does not accept the messages."""

    code = "invalid_value"
    param = "input"


class ContextLengthExceededError(InvalidRequestError):
    """The prompt leaves no room for a reply in the context; `tokens` were encoded to find this out."""

    code = "context_length_exceeded"
    param = "input"
    message = "the prompt is too long for the context of the model: shorten the messages"

    def __init__(self, message: str | None = None, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens


class FormatFailedError(InvalidRequestError):
    """A reply has begun and cannot keep to its format any further: the format is too complex, or a dead end."""

    code = "format_failed"
    message = "the reply could not go on in its format: it is too complex, or a dead end; make it simpler"


class UpstreamRefusedError(InvalidRequestError):
    """The upstream refuses the request; the message is the upstream's."""

    code = "upstream_refused"
    message = "the server that runs the model refuses the request"


class BodyTooLargeError(InvalidRequestError):
    """The request body is too large."""

    status = 413
    code = "body_too_large"


class UnsupportedEncodingError(InvalidRequestError):
    """The request body is compressed in a way that Parley does not know."""

    status = 415
    code = "unsupported_encoding"
    message = "Content-Encoding must be gzip, or absent"


class ConversationNotFoundError(InvalidRequestError):
    """The conversation does not exist, or belongs to another user."""

    status = 404
    code = "conversation_not_found"
    message = "there is no such conversation"


class ItemNotFoundError(InvalidRequestError):
    """The item is not in the conversation."""

    status = 404
    code = "item_not_found"
    param = "after"
    message = "there is no such item in the conversation"


class ResponseNotFoundError(InvalidRequestError):
    """The response does not exist, is no longer kept, or belongs to another user."""

    status = 404
    code = "response_not_found"
    param = "response_id"


class PreviousResponseNotFoundError(InvalidRequestError):
    """The response that a request continues does not exist, is no longer kept, or belongs to another user."""

    code = "previous_response_not_found"
    param = "previous_response_id"

    def __init__(self, id: str) -> None:
        super().__init__(f"there is no response {id[:64]!r} to continue: send the whole conversation as input")


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that this server does not have."""

    status = 404
    code = "model_not_found"
    param = "model"

    def __init__(self, names: Sequence[str]) -> None:
        told = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        super().__init__(f"this server has {'one model' if len(names) == 1 else 'these models'}: {told}")


class ConversationLockedError(InvalidRequestError):
    """Another response is running in the conversation, or its leaf is not the one that the request has seen."""

    status = 409
    code = "conversation_locked"
    message = "a reply is running in this conversation, or it has changed meanwhile: wait, or read it again"


class ConversationFullError(InvalidRequestError):
    """The conversation has as many messages, or bytes, as one may have."""

    status = 409
    code = "conversation_full"
    message = "this conversation is full: begin a new one"


class StorageFullError(InvalidRequestError):
    """The user has as many conversations, or bytes in them, as the settings allow."""

    status = 409
    code = "storage_full"
    message = "you have stored as much as you may: delete some conversations"


class AccessError(APIError):
    """The user is unknown, or the browser page that sends the request is not trusted."""

    status = 401
    type = "authentication_error"


class WrongCredentialsError(AccessError):
    """The credentials are missing or belong to no user."""

    code = "invalid_credentials"
    message = "authentication failed"


class OriginNotAllowedError(AccessError):
    """A page of another site sends the request."""

    status = 403
    code = "origin_not_allowed"
    message = "the origin of this page is not in PARLEY_ORIGINS"


class RateLimitError(APIError):
    """There are too many requests at the moment: the client can try again later."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        if retry_after is not None:
            self.retry_after = retry_after


class RateLimitExceededError(RateLimitError):
    """The user has reached PARLEY_RATE or PARLEY_TOKEN_RATE."""

    code = "rate_limit_exceeded"


class TooManyResponsesError(RateLimitError):
    """Too many responses of the user wait."""

    code = "too_many_responses"
    retry_after = 1


class TooManyConnectionsError(RateLimitError):
    """The user has too many connections."""

    code = "too_many_sockets"
    message = "you have too many open connections"


class TooManyLoginsError(RateLimitError):
    """Too many logins from one address have failed."""

    code = "too_many_failures"
    message = "too many failed logins from your address: wait up to a minute"
    retry_after = 60


class QueueFullError(RateLimitError):
    """The wait queue is full."""

    status = 503
    code = "queue_full"
    retry_after = 5


class UpstreamBusyError(RateLimitError):
    """All upstreams with the model answer that they have too many requests."""

    status = 503
    code = "upstream_busy"
    message = "the server that runs the model has too many requests: try again later"
    retry_after = 5


class ServerError(APIError):
    """The server failed; the client did nothing wrong."""

    status = 500
    type = "server_error"
    code = "server_error"
    message = "the server failed; try again"


class ServerStoppingError(ServerError):
    """The server is stopping and accepts no new requests."""

    status = 503
    code = "server_shutdown"
    message = "the server is stopping: try again in a moment"
    retry_after = 5


class ServerUnavailableError(ServerError):
    """The process that runs replies is starting, or has just ended."""

    status = 503
    code = "server_unavailable"
    message = "the server is starting: try again in a moment"
    retry_after = 5


class DatabaseUnavailableError(ServerError):
    """The database cannot be used at the moment."""

    status = 503
    code = "database_unavailable"
    message = "the database cannot be used at the moment: try again soon"
    retry_after = 5


class UpstreamFailedError(ServerError):
    """The upstream that makes a reply fails; the log has the reason."""

    status = 502
    code = "upstream_failed"
    message = "the server that runs the model has failed: try again"


class UpstreamUnavailableError(ServerError):
    """No upstream with the model can be reached."""

    status = 503
    code = "upstream_unavailable"
    message = "no server that runs the model can be reached: try again later"
    retry_after = 5


class NotStoredError(ServerError):
    """A warning: the response goes on, but the reply cannot be stored at the moment."""

    code = "not_kept"
    message = "messages cannot be stored at the moment; they are stored as soon as possible"


# The engine fails


class EngineError(ParleyError):
    """The engine cannot do a task, such as continue a reply; the log has the reason."""


class KernelsUnavailableError(EngineError):
    """The C++ kernels cannot be compiled or loaded on this machine; the message says why."""


class CompilationError(EngineError):
    """The model cannot be compiled, or the compiled program does not run; the message says why."""


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The type and the message of an error, in one line of at most `limit` characters; our errors show no type.

    If an error wraps another one, as SQLAlchemy's do, the line describes the wrapped one, which is shorter.
    """
    if isinstance(error, BaseException):
        error = getattr(error, "orig", None) or error
        text = " ".join(str(error).split())
        prefix = [] if text and isinstance(error, ParleyError) else [type(error).__name__]
        error = ": ".join([*prefix, text] if text else prefix)
    return "".join(filter(str.isprintable, " ".join(error.split())[:limit]))  # an escape code would reach the terminal
