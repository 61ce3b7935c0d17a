"""LangChain's client of OpenAI's API, unmodified, with both APIs of a real server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from models.settings import Settings
from server import create_app
from tests.support.client import ANN
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served, serve
from tests.support.tiny import opens_tiny

PLACE = '{"name": "Paris", "warm": true}'


class Place(BaseModel):
    """A place, and whether it is warm there."""

    name: str
    warm: bool


@tool
def get_weather(place: str) -> str:
    """Tell the weather."""
    return f"say It is sunny in {place}"  # which the model obeys


@contextmanager
def langchain(url: str, **fields: Any) -> Iterator[ChatOpenAI]:
    """A client with connections of its own. LangChain keeps those of each URL, which may be of an earlier server."""
    with openai.DefaultHttpxClient() as client:
        yield ChatOpenAI(
            model="scripted",
            base_url=f"{url}/v1",
            api_key=SecretStr(ANN),
            max_retries=0,
            http_client=client,
            **fields,
        )


@pytest.fixture(
    params=[
        {"use_responses_api": False},
        {"use_responses_api": True},
        {"use_responses_api": True, "use_previous_response_id": True},
        {"use_responses_api": True, "store": False, "include": ["reasoning.encrypted_content"]},
    ],
    ids=["Chat Completions", "Responses", "Responses, which are continued", "Responses, which are not stored"],
)
def chat(request: pytest.FixtureRequest, scripted_server: Served) -> Iterator[ChatOpenAI]:
    """The client, as ann, at a server with a scripted model."""
    with langchain(scripted_server.url, **request.param) as chat:
        yield chat


def test_messages_are_answered(chat: ChatOpenAI, scripted: ScriptedChat) -> None:
    asked = [SystemMessage("be brief"), HumanMessage("perform think so | say yes", name="ann")]
    answer = chat.invoke(asked)
    assert answer.text == "yes"
    assert answer.usage_metadata
    assert answer.usage_metadata["output_tokens"] == 2
    assert chat.invoke([*asked, answer, HumanMessage("say again")]).text == "again"
    told = [(message["role"], message["content"]) for message in scripted.requests[-1].messages if message["content"]]
    assert told == [
        *[("system", "be brief"), ("user", "perform think so | say yes")],
        *[("assistant", "yes"), ("user", "say again")],
    ]


def test_a_stream_has_all_the_text(chat: ChatOpenAI) -> None:
    pieces = [chunk.text for chunk in chat.stream("perform think so | say all of it")]
    assert "".join(pieces) == "all of it"
    assert len(list(filter(None, pieces))) == 3


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_tools_are_called_and_answered(chat: ChatOpenAI, scripted: ScriptedChat, streamed: bool) -> None:
    bound = chat.bind_tools([get_weather], strict=True, parallel_tool_calls=True)
    order = 'perform think so | say I look | call get_weather {"place": "Rome"} | call get_weather {"place": "Oslo"}'
    messages: list[BaseMessage] = [HumanMessage(order)]
    called: Any = bound.invoke(messages)
    if streamed:
        first, *others = bound.stream(messages)
        called = sum(others, first)
    assert [call["args"] for call in called.tool_calls] == [{"place": "Rome"}, {"place": "Oslo"}]
    messages += [called, *(get_weather.invoke(call) for call in called.tool_calls)]
    assert bound.invoke(messages).text == "It is sunny in Oslo"
    request = scripted.requests[-1]
    assert [offered.name for offered in request.tools.tools] == ["get_weather"]
    calls = [call for message in request.messages for call in message.get("tool_calls", [])]
    results = [message for message in request.messages if message["role"] == "tool"]
    assert [call["id"] for call in calls] == [result["tool_call_id"] for result in results]
    assert [result["content"] for result in results] == ["say It is sunny in Rome", "say It is sunny in Oslo"]


@pytest.mark.parametrize(
    ("method", "order", "format"),
    [
        ("json_schema", f"say {PLACE}", "json_schema"),
        ("json_mode", f"say {PLACE}", "json_object"),
        ("function_calling", f"perform call Place {PLACE}", "text"),
    ],
)
def test_structured_output_is_an_object(
    chat: ChatOpenAI, scripted: ScriptedChat, method: Any, order: str, format: str
) -> None:
    structured = chat.with_structured_output(Place, method=method)
    assert structured.invoke(order) == Place(name="Paris", warm=True)
    request = scripted.requests[-1]
    assert request.format.type == format
    assert request.tools.choice == ("required" if method == "function_calling" else "auto")


def test_an_unknown_model_is_not_found(chat: ChatOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        chat.bind(model="other").invoke("say yes")


@pytest.mark.parametrize("responses", [False, True], ids=["Chat Completions", "Responses"])
def test_a_context_overflow_is_told_apart_from_other_errors(settings: Settings, responses: bool) -> None:
    with (
        serve(create_app(settings, opens_tiny)) as served,
        langchain(served.url, use_responses_api=responses) as client,
    ):
        chat = client.bind(model=served.app.state.models.default.name)
        with pytest.raises(ContextOverflowError):
            chat.invoke("word " * 100)
        with pytest.raises(ContextOverflowError):
            list(chat.stream("word " * 100))
        assert isinstance(chat.invoke("word", max_tokens=5), AIMessage)
