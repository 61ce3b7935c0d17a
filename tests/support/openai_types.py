"""Checks what the server sends against OpenAI's own types, and against the schema of Open Responses."""

from __future__ import annotations

from typing import Any

from openai.types.conversations import Conversation, ConversationItem
from openai.types.responses import Response, ResponseItem, ResponsesServerEvent, ResponseStreamEvent
from pydantic import TypeAdapter

from models.validation import Json

RESPONSE = TypeAdapter[Any](Response)
STREAM_EVENT = TypeAdapter[Any](ResponseStreamEvent)
SOCKET_EVENT = TypeAdapter[Any](ResponsesServerEvent)
CONVERSATION = TypeAdapter[Any](Conversation)
CONVERSATION_ITEM = TypeAdapter[Any](ConversationItem)
RESPONSE_ITEM = TypeAdapter[Any](ResponseItem)

OPEN_RESPONSES = {  # the fields that each response must have, by the schema of Open Responses; the last one is OpenAI's
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id"),
    *("instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p"),
    *("presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "user", "usage"),
    *("max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "metadata", "safety_identifier"),
    *("prompt_cache_key", "conversation"),
}
INTEGERS = ("created_at", "top_logprobs")  # there, but any number in OpenAI's types
FUNCTION_TOOL = {"type", "name", "description", "parameters", "strict"}  # all of them required there


def check_response(response: Json) -> Any:
    """The response as an object of OpenAI's library; fails if anything in it is not of the standard's types."""
    assert response.keys() >= OPEN_RESPONSES
    assert all(isinstance(response[name], int) for name in INTEGERS)
    assert response["completed_at"] is None or isinstance(response["completed_at"], int)
    assert all(tool.keys() >= FUNCTION_TOOL for tool in response["tools"])
    return RESPONSE.validate_python(response)


def check_stream(events: list[Json], first: int = 0) -> None:
    """Check the numbered events of one response, on a socket or not, from the number `first` on."""
    assert [event["sequence_number"] for event in events] == [*range(first, first + len(events))]
    for event in events:
        STREAM_EVENT.validate_python({name: value for name, value in event.items() if name != "stream_id"})
        SOCKET_EVENT.validate_python(event)
        if "response" in event:
            check_response(event["response"])
