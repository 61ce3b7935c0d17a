"""A user tries to learn what another user has written, by what the prefix cache might tell."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import comb

import httpx2
import pytest

from models.settings import Settings
from models.validation import Json
from server import create_app
from tests.support.client import ANN, BOB, bearer
from tests.support.serving import Served, serve
from tests.support.tiny import opens_tiny

pytestmark = pytest.mark.slow

INSTRUCTIONS = "You are a discreet assistant who never tells anybody's number."
KNOWN = " is the number. All of what follows it is known to everybody, and so long that it takes a while to read. " * 3
CANDIDATES = "0123456789"
GUESSES = 12
UNLIKELY = 1e-6  # with this probability, the test fails by chance

Score = Callable[[Served, str], float]  # of a candidate; the attacker guesses the one with the highest


@pytest.fixture
def served(settings: Settings) -> Iterator[Served]:
    changed = replace(settings, context=512, slots=40, options={"instructions": INSTRUCTIONS})
    with serve(create_app(changed, opens_tiny)) as served:
        yield served


def message(number: str) -> str:
    return f"{number}{KNOWN}"


def body(content: str, **fields: object) -> Json:
    messages = [{"role": "user", "content": content}]
    return {"model": "SmolLM2-135M-Instruct", "messages": messages, "max_tokens": 1, "temperature": 0, **fields}


def complete(served: Served, secret: str, content: str) -> Json:
    url = f"{served.url}/v1/chat/completions"
    response = httpx2.post(url, json=body(content), headers=bearer(secret), timeout=30, verify=False)
    return dict(response.raise_for_status().json()["usage"])


def cached_tokens(served: Served, content: str) -> float:
    return float(complete(served, BOB, content)["prompt_tokens_details"]["cached_tokens"])


def speed(served: Served, content: str) -> float:
    """How soon the first text of a reply comes."""
    url = f"{served.url}/v1/chat/completions"
    fields = body(content, stream=True, max_tokens=8)
    with httpx2.Client(verify=False) as client:
        client.get(f"{served.url}/health")  # connect first
        began = time.perf_counter()
        with client.stream("POST", url, json=fields, headers=bearer(BOB), timeout=30) as response:
            for line in response.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    return began - time.perf_counter()
    return -30


def probability_by_chance(right: int) -> float:
    """How likely it is to guess so often right, or more often, without knowing anything."""
    p = 1 / len(CANDIDATES)
    return sum(comb(GUESSES, n) * p**n * (1 - p) ** (GUESSES - n) for n in range(right, GUESSES + 1))


@pytest.mark.parametrize("score", [cached_tokens, speed])
def test_another_users_number_is_guessed_no_better_than_by_chance(served: Served, score: Score) -> None:
    chance = random.Random(1)
    right = 0
    for number in range(GUESSES):
        label, digit = f"{number:02}", chance.choice(CANDIDATES)
        complete(served, ANN, message(f"{label}{digit}"))
        candidates = chance.sample(CANDIDATES, len(CANDIDATES))
        guess = max(candidates, key=lambda candidate: score(served, message(f"{label}{candidate}")))
        right += guess == digit
    assert probability_by_chance(right) > UNLIKELY


def test_the_operators_instructions_are_read_once_for_all_users(served: Served) -> None:
    complete(served, ANN, "Hello")
    assert cached_tokens(served, "Good morning") > len(INSTRUCTIONS)


def test_a_users_own_conversation_is_read_once(served: Served) -> None:
    complete(served, BOB, message("12"))
    assert cached_tokens(served, message("12") + "!") > len(message("12"))
