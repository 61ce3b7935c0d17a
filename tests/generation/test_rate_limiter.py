from __future__ import annotations

import asyncio

import pytest

from models.errors import RateLimitExceededError, TooManyResponsesError
from models.generation.admission import Admission
from models.generation.rate_limiter import RateLimiter
from models.messages import Usage

pytestmark = pytest.mark.anyio


async def count_allowed(limiter: RateLimiter, user: str, requests: int) -> int:
    """How many of some requests in a row are allowed."""
    allowed = 0
    for _ in range(requests):
        try:
            await limiter.count_request(user)
            allowed += 1
        except RateLimitExceededError:
            pass
    return allowed


# Requests and tokens


@pytest.mark.parametrize(("limit", "requests"), [("3/day", 3), ("1/hour", 1), ("2 per 30 days", 2)])
async def test_requests_are_allowed_up_to_the_limit(limit: str, requests: int) -> None:
    assert await count_allowed(RateLimiter(limit), "ann", 9) == requests


async def test_each_user_has_their_own_limit() -> None:
    limiter = RateLimiter("2/day", "10/day")
    assert await count_allowed(limiter, "ann", 3) == 2
    await limiter.count_tokens("ann", 10)
    assert await count_allowed(limiter, "bob", 3) == 2


async def test_without_limits_everything_is_allowed() -> None:
    limiter = RateLimiter()
    await limiter.count_tokens("ann", 10**12)
    assert await count_allowed(limiter, "ann", 1000) == 1000


@pytest.mark.parametrize(
    ("spent", "allowed"),
    [
        pytest.param([], True, id="none"),
        pytest.param([9], True, id="fewer"),
        pytest.param([0] * 20, True, id="replies without tokens"),
        pytest.param([10], False, id="all at once"),
        pytest.param([4, 6], False, id="all in two replies"),
        pytest.param([1] * 10, False, id="all in ten replies"),
        pytest.param([9, 500], False, id="more"),
    ],
)
async def test_a_request_is_refused_once_all_tokens_are_spent(spent: list[int], allowed: bool) -> None:
    limiter = RateLimiter(tokens="10/day")
    for tokens in spent:
        await limiter.count_tokens("ann", tokens)
    assert await count_allowed(limiter, "ann", 5) == (5 if allowed else 0)


async def test_a_request_that_the_token_limit_refuses_is_not_counted() -> None:
    limiter = RateLimiter("2/day", "10/second")
    await limiter.count_request("ann")
    await limiter.count_tokens("ann", 10)
    with pytest.raises(RateLimitExceededError, match="tokens"):
        await limiter.count_request("ann")
    async with asyncio.timeout(10):
        while not await count_allowed(limiter, "ann", 1):
            await limiter.count_tokens("ann", 1)  # does not prolong the window, which began with the first tokens
            await asyncio.sleep(0.01)
    with pytest.raises(RateLimitExceededError, match="requests"):
        await limiter.count_request("ann")


@pytest.mark.parametrize(
    ("limiter", "kind", "longest"),
    [
        pytest.param(RateLimiter(requests="1/minute"), "requests", 60, id="requests in a minute"),
        pytest.param(RateLimiter(requests="1/day"), "requests", 86_400, id="requests in a day"),
        pytest.param(RateLimiter(tokens="1/hour"), "tokens", 3600, id="tokens in an hour"),
    ],
)
async def test_the_error_says_what_is_limited_and_when_to_retry(limiter: RateLimiter, kind: str, longest: int) -> None:
    await limiter.count_request("ann")
    await limiter.count_tokens("ann", 5)
    with pytest.raises(RateLimitExceededError, match=rf"{kind} per 1 \w+: try again in \d+ s") as raised:
        await limiter.count_request("ann")
    error = raised.value
    assert (error.status, error.type, error.code, error.param) == (429, "rate_limit_error", "rate_limit_exceeded", None)
    assert error.retry_after is not None
    assert longest / 2 < error.retry_after <= longest
    assert f" {error.retry_after} s" in str(error)


# In the admission


def make_admission(limiter: RateLimiter, per_user: int = 9) -> Admission:
    return Admission(slots=1, queue=9, per_user=per_user, rate_limiter=limiter)


async def test_the_tokens_of_a_reply_count_when_it_has_ended() -> None:
    admission = make_admission(RateLimiter(tokens="10/day"))
    async with admission.ticket("ann") as ticket:
        ticket.usage = Usage(6, output_tokens=4)
        async with admission.ticket("ann"):
            pass
    with pytest.raises(RateLimitExceededError):
        await admission.enter("ann")
    admission.leave(await admission.enter("bob"))


async def test_a_reply_that_never_had_a_slot_spends_no_tokens() -> None:
    admission = make_admission(RateLimiter(tokens="10/day"))
    first = await admission.enter("ann")
    async with admission.ticket("ann") as waiting:
        waiting.usage = Usage(100)
    admission.leave(first)
    admission.leave(await admission.enter("ann"))


async def test_a_request_that_is_refused_for_another_reason_is_not_counted() -> None:
    admission = Admission(slots=1, queue=0, per_user=1, rate_limiter=RateLimiter("2/day"))
    first = await admission.enter("ann")
    for _ in range(5):
        with pytest.raises(TooManyResponsesError):
            await admission.enter("ann")
    admission.leave(first)
    admission.leave(await admission.enter("ann"))
    with pytest.raises(RateLimitExceededError):
        await admission.enter("ann")


async def test_a_rate_limited_request_takes_no_slot() -> None:
    admission = make_admission(RateLimiter("1/day"))
    admission.leave(await admission.enter("ann"))
    with pytest.raises(RateLimitExceededError):
        await admission.enter("ann")
    assert (admission.free, admission.in_flight.total()) == (1, 0)
