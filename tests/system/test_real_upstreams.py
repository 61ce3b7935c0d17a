"""What clients may ask of a server in front of real ones: another Parley, llama-server, vLLM.

`ONLY` and `REFUSED` list the differences.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from models.settings import Settings
from tests.support.client import ANN, BOB
from tests.support.process import until
from tests.support.real_upstreams import Front, in_front_of, kinds, running_upstream

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "boolean"}},
    "required": ["answer"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,  # else vLLM does not keep to the parameters
        "parameters": {
            "type": "object",
            "properties": {"rain": {"type": "boolean"}},
            "required": ["rain"],
            "additionalProperties": False,
        },
    },
}
REFUSED = {"llama.cpp": {"regex", "tools"}}  # the chat template of the model knows no tools
TOLD_CACHED = {"parley", "llama.cpp"}  # kinds that tell which tokens were in their prefix cache
LONG = "Write a very long story about a dog."


@pytest.fixture(scope="module", params=kinds())
def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    data = tmp_path_factory.mktemp("upstream")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with running_upstream(request.param, data, port) as url:
        settings = Settings(
            upstream=(url,),
            upstream_key=ANN,
            users={"ann": ANN, "bob": BOB},
            data=data / "front",
            model_aliases=("gpt-4o",),
            options={"temperature": 0},
        )
        with in_front_of(request.param, settings) as front:
            yield front


def ask(front: Front, text: str = "What is the capital of France?", **options: Any) -> Any:
    """The completion of a question."""
    messages = options.pop("messages", [{"role": "user", "content": text}])
    return front.client.chat.completions.create(model=front.model, messages=messages, **{"max_tokens": 24, **options})


def text(completion: Any) -> str:
    return str(completion.choices[0].message.content)


def test_the_kind_of_the_upstream_is_known(front: Front) -> None:
    (told,) = front.http.get("/args").json()["args"]["upstreams"]
    assert (told["kind"], told["trouble"]) == (front.kind, None)
    assert front.http.get("/ready").text == "ready"


def test_its_model_is_listed_with_its_context(front: Front) -> None:
    listed = {model.id: model for model in front.client.models.list()}
    assert {front.model, "gpt-4o"} <= listed.keys()
    assert listed[front.model].model_dump()["max_model_len"] == 2048


def test_a_question_is_answered_with_its_usage(front: Front) -> None:
    completion = ask(front)
    assert text(completion)
    assert completion.usage.prompt_tokens > 10
    assert 0 < completion.usage.completion_tokens <= 24


def test_a_stream_joins_to_the_same_text(front: Front) -> None:
    chunks = list(ask(front, stream=True, stream_options={"include_usage": True}))
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert joined == text(ask(front))
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 3
    assert chunks[-1].usage


def test_the_limit_of_tokens_ends_a_reply(front: Front) -> None:
    completion = ask(front, LONG, max_tokens=5)
    assert (completion.choices[0].finish_reason, completion.usage.completion_tokens) == ("length", 5)


def test_a_stop_string_ends_a_reply_before_it(front: Front) -> None:
    whole = text(ask(front, LONG))
    word = whole.split()[3]
    completion = ask(front, LONG, stop=word)
    assert completion.choices[0].finish_reason == "stop"
    assert text(completion) == whole[: whole.index(word)]


def test_a_seed_gives_the_same_reply_again(front: Front) -> None:
    replies = [text(ask(front, LONG, temperature=1.5, seed=seed)) for seed in (7, 7, 8)]
    assert replies[0] == replies[1] != replies[2]


def test_options_that_openai_does_not_have_take_effect(front: Front) -> None:
    body = {"top_k": 1, "min_p": 0.05, "repetition_penalty": 1.0}
    greedy = text(ask(front, LONG, extra_body={"repetition_penalty": 1.0}))
    assert text(ask(front, LONG, temperature=2, seed=1, extra_body=body)) == greedy
    again = ask(front, "Say: na na na na na", max_tokens=60, extra_body={"repetition_penalty": 1.9})
    plain = ask(front, "Say: na na na na na", max_tokens=60)
    assert text(again) != text(plain)


def test_tokens_have_their_probabilities(front: Front) -> None:
    completion = ask(front, logprobs=True, top_logprobs=2, max_tokens=6)
    tokens = completion.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == text(completion)
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)


def test_a_schema_holds(front: Front) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    completion = ask(front, "Is the sky blue? Answer in JSON.", response_format=format)
    assert json.loads(text(completion)).keys() == {"answer"}


@pytest.mark.parametrize(
    ("format", "value", "allowed"),
    [
        ("choice", ["red", 'bl"ue'], {"red", 'bl"ue'}),
        ("regex", "[0-9]{3}", {f"{number:03}" for number in range(1000)}),
        ("grammar", 'root ::= "yes" | "no"', {"yes", "no"}),
    ],
)
def test_a_format_holds_or_is_refused_by_name(front: Front, format: str, value: Any, allowed: set[str]) -> None:
    body = {"structured_outputs": {format: value}}
    if format in REFUSED.get(front.kind, ()):
        with pytest.raises(openai.BadRequestError, match=f"structured_outputs.{format} is not supported"):
            ask(front, extra_body=body)
    else:
        assert text(ask(front, extra_body=body)) in allowed


def test_a_tool_that_must_be_called_is_called(front: Front) -> None:
    options = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 200}
    if "tools" in REFUSED.get(front.kind, ()):
        with pytest.raises(openai.BadRequestError, match="tools are not supported"):
            ask(front, "Will it rain?", **options)
        return
    completion = ask(front, "Will it rain?", **options)
    assert completion.choices[0].finish_reason == "tool_calls"
    for called in completion.choices[0].message.tool_calls:
        assert called.function.name == "weather"
        assert json.loads(called.function.arguments).keys() == {"rain"}


def test_a_text_is_continued(front: Front) -> None:
    completion = front.client.completions.create(
        model=front.model, prompt="The capital of France is", max_tokens=5, logprobs=1
    )
    assert "Paris" in completion.choices[0].text
    assert completion.choices[0].logprobs
    assert "".join(completion.choices[0].logprobs.tokens or ()) == completion.choices[0].text


def test_a_conversation_goes_on(front: Front) -> None:
    first = front.client.responses.create(model=front.model, input="My name is Zoe.", max_output_tokens=10)
    second = front.client.responses.create(
        model=front.model, input="What is my name?", previous_response_id=first.id, max_output_tokens=16
    )
    assert second.usage
    assert first.usage
    assert second.usage.input_tokens > first.usage.input_tokens + 10
    if front.kind in TOLD_CACHED:
        assert second.usage.input_tokens_details.cached_tokens > 10


def test_a_prompt_that_is_too_long_is_told(front: Front) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(front, "word " * 3000)
    assert raised.value.code == "context_length_exceeded"


def test_the_oldest_turns_of_a_long_conversation_are_left_out(front: Front) -> None:
    turns = [{"role": role, "content": "word " * 300} for _ in range(8) for role in ("user", "assistant")]
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"input": [*turns, question], "truncation": "auto", "max_output_tokens": 8}
    response = front.http.post("/v1/responses", json=body).json()
    assert response["error"] is None
    assert response["usage"]["input_tokens"] < 2048


def test_a_reply_ends_with_the_context(front: Front) -> None:
    body = {"input": "word " * 1900, "max_output_tokens": 2000, "ignore_eos": True}
    response = front.http.post("/v1/responses", json=body).json()
    assert response["error"] is None
    assert response["status"] == "incomplete"
    assert response["usage"]["total_tokens"] >= 2000


def test_many_replies_are_made_at_once(front: Front) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda number: ask(front, f"Count from {number}."), range(8)))
    assert all(reply.usage.completion_tokens for reply in replies)


def test_a_client_that_closes_its_stream_ends_the_reply(front: Front) -> None:
    with ask(front, LONG, stream=True, max_tokens=1500, extra_body={"ignore_eos": True}) as stream:
        for _ in range(3):
            next(stream)
        assert front.running == 1
    until(lambda: not front.running, "the end of the reply")
    assert text(ask(front))


def test_users_do_not_see_the_replies_of_others(front: Front) -> None:
    response = front.client.responses.create(model=front.model, input="Hi", max_output_tokens=4)
    answer = front.http.get(f"/v1/responses/{response.id}", headers={"Authorization": f"Bearer {BOB}"})
    assert answer.status_code == 404
