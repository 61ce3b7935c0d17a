from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from models import errors
from models.errors import APIError
from tests.support.client import assert_security_headers, bearer
from tests.support.running_app import RunningApp
from tests.support.workers import one_process


def failing(error: Exception) -> Any:
    """A function that raises an error."""

    def fail(*arguments: object) -> None:
        raise error

    return fail


@one_process
def test_a_bug_is_a_server_error_without_details(own_app: RunningApp) -> None:
    fail = failing(RuntimeError("a bug"))
    own_app.app.state.metrics = SimpleNamespace(text=fail)
    own_app.app.state.conversations = SimpleNamespace(list_page=fail)
    client = own_app.client(raise_server_exceptions=False)
    for path in ("/metrics", "/v1/conversations"):
        response = client.get(path, headers=bearer())
        assert (response.status_code, response.json()["error"]["code"]) == (500, "server_error")
        assert "a bug" not in response.text
        assert_security_headers(response)


@one_process
@pytest.mark.parametrize(
    "error",
    [OSError("no route to host"), OperationalError("SELECT", {}, OSError("away"))],
    ids=["no connection", "SQLAlchemy"],
)
def test_a_database_error_says_when_to_try_again(
    own_app: RunningApp, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    own_app.app.state.conversations = SimpleNamespace(list_page=failing(error))
    response = own_app.client().get("/v1/conversations", headers=bearer())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "database_unavailable")
    assert response.headers["retry-after"] == "5"
    assert_security_headers(response)
    assert "the database or a file cannot be used: OSError" in caplog.text


def test_an_unknown_path_is_json_in_the_api_and_text_elsewhere(client: TestClient) -> None:
    response = client.get("/v1/unknown", headers=bearer())
    error = response.json()["error"]
    assert response.status_code == 404
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "unknown_url")
    assert "/v1/models, /v1/chat/completions, /v1/completions" in error["message"]
    response = client.get("/unknown")
    assert (response.status_code, response.text) == (404, "Not Found")


def test_the_api_is_recognized_behind_a_path_of_a_proxy(shared_app: RunningApp) -> None:
    client = TestClient(shared_app.app, "http://testserver/parley", root_path="/parley")
    client.portal = shared_app.client().portal
    assert client.get("/v1/models", headers=bearer()).status_code == 200
    for path in ("/v1", "/v1/", "/v1/unknown", "/v1/unknown/", "/v1/conversations/conv_1/unknown", "/v1//models"):
        response = client.get(path, headers=bearer())
        assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")
    response = client.put("/v1/models/", headers=bearer())
    assert (response.status_code, response.json()["error"]["message"]) == (405, "Method Not Allowed")
    assert client.get("/unknown").text == "Not Found"


def test_errors_of_the_api_are_json_where_the_path_has_no_root_path(shared_app: RunningApp) -> None:
    client = TestClient(shared_app.app, root_path="/parley")  # some web servers say it so
    client.portal = shared_app.client().portal
    assert client.get("/v1/unknown", headers=bearer()).json()["error"]["code"] == "unknown_url"


def test_a_wrong_method_is_json_in_the_api_and_text_elsewhere(client: TestClient) -> None:
    response = client.delete("/v1/models", headers=bearer())
    assert (response.status_code, response.json()["error"]["message"]) == (405, "Method Not Allowed")
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}
    response = client.delete("/health")
    assert (response.status_code, response.text) == (405, "Method Not Allowed")


def test_an_api_error_names_what_is_wrong(client: TestClient) -> None:
    response = client.get("/v1/conversations", params={"limit": "0"}, headers=bearer())
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "limit must be a whole number from 1 to 100",
        "type": "invalid_request_error",
        "param": "limit",
        "code": "invalid_value",
    }


def test_a_client_that_hangs_up_in_its_request_is_no_bug(own_app: RunningApp, caplog: pytest.LogCaptureFixture) -> None:
    messages: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)

    headers = [(name.lower().encode(), value.encode()) for name, value in bearer().items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
    own_app.call(asyncio.wait_for, own_app.app(scope, receive, send), 10)
    assert messages[0]["status"] == 400
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# fmt: off
SENT = {  # status, type, code, param, retry_after: programs depend on these
    "InvalidRequestError": (400, "invalid_request_error", None, None, None),
    "InvalidJSONError": (400, "invalid_request_error", "invalid_json", None, None),
    "InvalidValueError": (400, "invalid_request_error", "invalid_value", None, None),
    "MissingFieldError": (400, "invalid_request_error", "missing_field", None, None),
    "UnknownFieldError": (400, "invalid_request_error", "invalid_value", None, None),
    "UnknownEventError": (400, "invalid_request_error", "unknown_type", "type", None),
    "UnsupportedParameterError": (400, "invalid_request_error", "unsupported_parameter", None, None),
    "MessagesRejectedError": (400, "invalid_request_error", "invalid_value", "input", None),
    "ContextLengthExceededError": (400, "invalid_request_error", "context_length_exceeded", "input", None),
    "PreviousResponseNotFoundError": (
        400, "invalid_request_error", "previous_response_not_found", "previous_response_id", None,
    ),
    "UnsupportedEncodingError": (415, "invalid_request_error", "unsupported_encoding", None, None),
    "FormatFailedError": (400, "invalid_request_error", "format_failed", None, None),
    "UpstreamRefusedError": (400, "invalid_request_error", "upstream_refused", None, None),
    "BodyTooLargeError": (413, "invalid_request_error", "body_too_large", None, None),
    "ConversationNotFoundError": (404, "invalid_request_error", "conversation_not_found", None, None),
    "ItemNotFoundError": (404, "invalid_request_error", "item_not_found", "after", None),
    "ResponseNotFoundError": (404, "invalid_request_error", "response_not_found", "response_id", None),
    "ModelNotFoundError": (404, "invalid_request_error", "model_not_found", "model", None),
    "ConversationLockedError": (409, "invalid_request_error", "conversation_locked", None, None),
    "ConversationFullError": (409, "invalid_request_error", "conversation_full", None, None),
    "StorageFullError": (409, "invalid_request_error", "storage_full", None, None),
    "AccessError": (401, "authentication_error", None, None, None),
    "WrongCredentialsError": (401, "authentication_error", "invalid_credentials", None, None),
    "OriginNotAllowedError": (403, "authentication_error", "origin_not_allowed", None, None),
    "RateLimitError": (429, "rate_limit_error", None, None, None),
    "RateLimitExceededError": (429, "rate_limit_error", "rate_limit_exceeded", None, None),  # with a time of its own
    "TooManyResponsesError": (429, "rate_limit_error", "too_many_responses", None, 1),
    "TooManyConnectionsError": (429, "rate_limit_error", "too_many_sockets", None, None),
    "TooManyLoginsError": (429, "rate_limit_error", "too_many_failures", None, 60),
    "QueueFullError": (503, "rate_limit_error", "queue_full", None, 5),
    "UpstreamBusyError": (503, "rate_limit_error", "upstream_busy", None, 5),
    "ServerError": (500, "server_error", "server_error", None, None),
    "ServerStoppingError": (503, "server_error", "server_shutdown", None, 5),
    "ServerUnavailableError": (503, "server_error", "server_unavailable", None, 5),
    "DatabaseUnavailableError": (503, "server_error", "database_unavailable", None, 5),
    "UpstreamFailedError": (502, "server_error", "upstream_failed", None, None),
    "UpstreamUnavailableError": (503, "server_error", "upstream_unavailable", None, 5),
    "NotStoredError": (500, "server_error", "not_kept", None, None),
}
# fmt: on


def test_the_errors_are_sent_as_they_always_were() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, APIError)]
    kinds.remove(APIError)
    sent = {
        kind.__name__: (kind.status, kind.type, getattr(kind, "code", None), kind.param, kind.retry_after)
        for kind in kinds
    }
    assert sent == SENT
