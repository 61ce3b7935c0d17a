"""Pydantic AI's models of OpenAI's APIs, unmodified, with a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel, OpenAIResponsesModelSettings
from pydantic_ai.providers.openai import OpenAIProvider

from tests.support.client import ANN
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served

pytestmark = pytest.mark.anyio

PLACE = '{"name": "Paris", "warm": true}'


class Place(BaseModel):
    name: str
    warm: bool


def get_weather(place: str) -> str:
    """Tell the weather."""
    return f"say It is sunny in {place}"  # which the model obeys


def find_place(name: str) -> str:
    """Find a place."""
    return f"perform call final_result {PLACE}"


@pytest.fixture(params=["Chat Completions", "Responses", "Responses, which are continued", "Responses, not stored"])
async def model(request: pytest.FixtureRequest, scripted_server: Served) -> AsyncIterator[Model]:
    """The model of a server, for ann."""
    settings = {
        "Responses, which are continued": OpenAIResponsesModelSettings(openai_previous_response_id="auto"),
        "Responses, not stored": OpenAIResponsesModelSettings(openai_store=False),
    }
    url = f"{scripted_server.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=ANN, max_retries=0) as client:
        provider = OpenAIProvider(openai_client=client)
        if request.param == "Chat Completions":
            yield OpenAIChatModel("scripted", provider=provider)
        else:
            yield OpenAIResponsesModel("scripted", provider=provider, settings=settings.get(request.param))


async def test_an_agent_answers_and_goes_on(model: Model, scripted: ScriptedChat) -> None:
    agent = Agent(model, instructions="be brief", model_settings={"temperature": 0.5, "seed": 3, "max_tokens": 50})
    first = await agent.run("perform think so | say yes")
    assert first.output == "yes"
    assert first.usage.output_tokens == 2
    second = await agent.run("say again", message_history=first.all_messages())
    assert second.output == "again"
    told = [message["content"] for message in scripted.requests[-1].messages if message["role"] != "system"]
    assert list(filter(None, told)) == ["perform think so | say yes", "yes", "say again"]
    assert [message.get("reasoning") for message in scripted.requests[-1].messages].count("so") == 1
    assert scripted.requests[-1].options.temperature == 0.5


async def test_a_stream_has_all_the_text(model: Model) -> None:
    async with Agent(model).run_stream("perform think so | say all of it") as stream:
        pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
    assert pieces == ["all ", "of i", "t"]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_tools_are_called_and_answered(model: Model, scripted: ScriptedChat, streamed: bool) -> None:
    agent = Agent(model, tools=[get_weather])
    order = 'perform think so | call get_weather {"place": "Rome"} | call get_weather {"place": "Oslo"}'
    if streamed:
        async with agent.run_stream(order) as stream:
            assert await stream.get_output() == "It is sunny in Oslo"
    else:
        assert (await agent.run(order)).output == "It is sunny in Oslo"
    results = [message["content"] for message in scripted.requests[-1].messages if message["role"] == "tool"]
    assert results == ["say It is sunny in Rome", "say It is sunny in Oslo"]


@pytest.mark.parametrize(
    ("output", "order", "format"),
    [
        (Place, f"perform call final_result {PLACE}", "text"),
        (ToolOutput(Place, name="place", strict=True), f"perform call place {PLACE}", "text"),
        (NativeOutput(Place), f"say {PLACE}", "json_schema"),
        (PromptedOutput(Place), f"say {PLACE}", "json_object"),
    ],
    ids=["tool", "strict tool", "native", "prompted"],
)
async def test_an_agent_returns_an_object(
    model: Model, scripted: ScriptedChat, output: Any, order: str, format: str
) -> None:
    agent = Agent(model, output_type=output)
    assert (await agent.run(order)).output == Place(name="Paris", warm=True)
    request = scripted.requests[-1]
    assert request.format.type == format
    assert request.tools.choice == ("required" if format == "text" else "auto")


async def test_an_agent_returns_an_object_after_it_has_called_a_tool(model: Model) -> None:
    agent = Agent(model, output_type=Place, tools=[find_place])
    assert (await agent.run('perform call find_place {"name": "Paris"}')).output == Place(name="Paris", warm=True)


async def test_an_error_has_the_status_and_the_message_of_the_server(model: Model) -> None:
    with pytest.raises(ModelHTTPError, match="temperature must be a number from 0 to 2") as raised:
        await Agent(model, model_settings={"temperature": 9}).run("say yes")
    assert raised.value.status_code == 400
