from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from models.admission import Admission, TooManyResponses
from models.rates import RateLimitExceeded, Rates
from models.reply import Usage
from models.settings import Settings
from server import create_app
from tests.conftest import BOB
from tests.test_server import Json, bearer, until_done
from tests.tiny import opens_tiny


def allowed(rates: Rates, user: str, tries: int) -> int:
    """How many of some requests in a row are let through."""
    let_through = 0
    for _ in range(tries):
        try:
            rates.ask(user)
            let_through += 1
        except RateLimitExceeded:
            pass
    return let_through


@pytest.mark.parametrize(("limit", "requests"), [("3/day", 3), ("1/hour", 1), ("2 per 30 days", 2)])
def test_a_user_may_ask_so_often_and_no_more(limit: str, requests: int) -> None:
    assert allowed(Rates(limit), "ann", 9) == requests


def test_each_user_has_a_limit_of_their_own() -> None:
    rates = Rates("2/day", "10/day")
    assert allowed(rates, "ann", 3) == 2
    rates.spend("ann", 10)
    assert allowed(rates, "bob", 3) == 2


def test_without_limits_anything_goes() -> None:
    rates = Rates()
    rates.spend("ann", 10**12)
    assert allowed(rates, "ann", 1000) == 1000


@pytest.mark.parametrize(
    ("spent", "may_ask"),
    [([], True), ([9], True), ([0] * 20, True), ([10], False), ([4, 6], False), ([1] * 10, False), ([9, 500], False)],
)
def test_whoever_has_spent_the_tokens_may_not_ask(spent: list[int], may_ask: bool) -> None:
    rates = Rates(tokens="10/day")
    for tokens in spent:
        rates.spend("ann", tokens)
    assert allowed(rates, "ann", 5) == (5 if may_ask else 0)


def test_a_request_that_the_tokens_forbid_does_not_count_as_one() -> None:
    rates = Rates("2/day", "10/day")
    assert allowed(rates, "ann", 1) == 1
    rates.spend("ann", 10)
    with pytest.raises(RateLimitExceeded, match="tokens"):
        rates.ask("ann")


@pytest.mark.parametrize(
    ("exhausted", "of", "longest"),
    [
        (lambda: Rates("1/minute"), "requests", 60),
        (lambda: Rates("1/day"), "requests", 86_400),
        (lambda: Rates(tokens="1/hour"), "tokens", 3600),
    ],
)
def test_a_refusal_says_of_what_there_was_too_much_and_when_to_try_again(
    exhausted: Callable[[], Rates], of: str, longest: int
) -> None:
    rates = exhausted()
    rates.ask("ann")
    rates.spend("ann", 5)
    with pytest.raises(RateLimitExceeded, match=rf"{of} per 1 \w+: try again in \d+ s") as raised:
        rates.ask("ann")
    refused = raised.value
    assert (refused.type, refused.code, refused.param) == ("rate_limit_error", "rate_limit_exceeded", None)
    assert refused.retry_after is not None
    assert longest / 2 < refused.retry_after <= longest
    assert f" {refused.retry_after} s" in str(refused)


def admission(rates: Rates, **changes: int) -> Admission:
    return Admission(**{"slots": 1, "queue": 9, "per_user": 9} | changes, rates=rates)


def test_a_reply_counts_as_a_request_and_its_tokens_when_it_has_ended() -> None:
    places = admission(Rates(tokens="10/day"))
    with places.place("ann") as ticket:
        ticket.usage = Usage(6, output_tokens=4)
        with places.place("ann"):
            pass
    with pytest.raises(RateLimitExceeded):
        places.enter("ann")
    places.leave(places.enter("bob"))


def test_a_reply_that_never_had_a_slot_spends_no_tokens() -> None:
    places = admission(Rates(tokens="10/day"))
    first = places.enter("ann")
    waiting = places.enter("ann")
    waiting.usage = Usage(100)
    places.leave(waiting)
    places.leave(first)
    places.leave(places.enter("ann"))


def test_a_request_that_is_refused_for_another_reason_does_not_count() -> None:
    places = admission(Rates("2/day"), per_user=1)
    first = places.enter("ann")
    for _ in range(5):
        with pytest.raises(TooManyResponses):
            places.enter("ann")
    places.leave(first)
    places.leave(places.enter("ann"))
    with pytest.raises(RateLimitExceeded):
        places.enter("ann")


def test_a_refused_request_leaves_no_place_taken() -> None:
    places = admission(Rates("1/day"))
    places.leave(places.enter("ann"))
    with pytest.raises(RateLimitExceeded):
        places.enter("ann")
    assert (places.free, places.in_flight.total()) == (1, 0)


# Over every way to ask


def complete(client: TestClient, secret: dict[str, str], **more: Any) -> Any:
    body = {"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **more}
    return client.post("/v1/chat/completions", json=body, headers=secret)


def reply(socket: Any) -> Json:
    """What is told at the end of a request: the reply's end, or why there is none."""
    socket.send_json({"type": "response.create", "response": {"input": "Hi", "max_output_tokens": 2}})
    while (event := socket.receive_json())["type"] not in ("response.done", "error"):
        pass
    return dict(event)


def test_requests_by_socket_and_by_http_count_as_one_users(settings: Settings) -> None:
    with TestClient(create_app(replace(settings, rate="4/day"), opens_tiny)) as client:
        with (
            client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as first,
            client.websocket_connect("/ws?userid=ann", ["chat.v1"], headers=bearer()) as second,
            client.websocket_connect("/ws", headers=bearer()) as plain,
        ):
            for socket in (first, second):
                socket.receive_json()
                assert reply(socket)["type"] == "response.done"
            assert complete(client, bearer()).status_code == 200
            assert complete(client, bearer(), stream=True).status_code == 200
            for stream in (False, True):
                answer = complete(client, bearer(), stream=stream)
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
                assert 0 < int(answer.headers["retry-after"]) <= 86_400
            for socket in (first, second):
                error = reply(socket)["error"]
                assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
            plain.send_text("Hi")
            assert plain.receive_text().startswith("error: you may have 4 ")
        assert complete(client, bearer(BOB)).status_code == 200


def test_the_tokens_of_a_reply_count_however_it_was_asked_for(settings: Settings) -> None:
    with TestClient(create_app(replace(settings, token_rate="30/day"), opens_tiny)) as client:
        assert complete(client, bearer()).json()["usage"]["total_tokens"] > 15
        with client.websocket_connect("/ws", ["chat.v1"], headers=bearer()) as socket:
            socket.receive_json()
            socket.send_json({"type": "response.create", "response": {"input": "Hi", "max_output_tokens": 2}})
            assert until_done(socket)[-1]["response"]["usage"]["total_tokens"] > 15
            assert "tokens" in reply(socket)["error"]["message"]
        assert complete(client, bearer()).status_code == 429
        assert complete(client, bearer(BOB)).status_code == 200
