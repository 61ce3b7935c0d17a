"""Pictures in requests: they keep their places, and are refused where the model reads only text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from models.errors import APIError, InvalidValueError, UnsupportedParameterError
from models.messages import Message, parts_of
from models.model_info import ModelInfo, ModelList
from models.options import Options
from models.protocols.chat_completions_request import parse_chat_completion
from models.protocols.responses.input_items import render_message
from models.protocols.responses.request import ResponsesRequest
from models.store.item import Item

PNG = "data:image/png;base64,iVBORw0KGgo="
JPEG = "data:image/jpeg;base64,/9j/4AAQ"
SEEING = ModelList([ModelInfo("seeing", 4096, Options(), (), ("images",))])
BLIND = ModelList([ModelInfo("blind", 4096, Options())])

CONTENTS = [
    [PNG],
    ["Look", PNG],
    [PNG, "Look"],
    ["One", PNG, "Two", JPEG, "Three"],
    [PNG, JPEG],
    ["One", "Two", PNG],
    [PNG, "One", "Two"],
]


def of_responses(parts: list[str], models: ModelList = SEEING) -> list[Any]:
    content = [
        {"type": "input_image", "image_url": part, "detail": "low"}
        if part.startswith("data:")
        else {"type": "input_text", "text": part}
        for part in parts
    ]
    return list(ResponsesRequest.parse({"input": [{"role": "user", "content": content}]}, models).input)


def of_chat(parts: list[str], models: ModelList = SEEING) -> list[Any]:
    content = [
        {"type": "image_url", "image_url": {"url": part, "detail": "low"}}
        if part.startswith("data:")
        else {"type": "text", "text": part}
        for part in parts
    ]
    body = {"model": models.default.name, "messages": [{"role": "user", "content": content}]}
    return list(parse_chat_completion(json.dumps(body).encode(), models, "ann").chat.messages)


PARSERS = pytest.mark.parametrize("parse", [of_responses, of_chat])


def told(message: Message) -> list[str]:
    """The texts and the URLs of a message."""
    return [part if isinstance(part, str) else part["url"] for part in parts_of(message)]


def lines(parts: list[str]) -> list[str]:
    """The parts, with those of text that stand side by side in lines."""
    joined: list[str] = []
    for part in parts:
        if joined and not part.startswith("data:") and not joined[-1].startswith("data:"):
            joined[-1] += f"\n{part}"
        else:
            joined.append(part)
    return joined


@PARSERS
@pytest.mark.parametrize("parts", CONTENTS, ids=lambda parts: " ".join(part[:11] for part in parts))
def test_pictures_and_texts_keep_their_order(parse: Any, parts: list[str]) -> None:
    (message,) = parse(parts)
    assert told(message) == lines(parts)


@pytest.mark.parametrize("parts", CONTENTS, ids=lambda parts: " ".join(part[:11] for part in parts))
def test_a_stored_message_has_its_pictures(parts: list[str]) -> None:
    (message,) = of_responses(parts)
    item = Item.of_message(message, 1.0)
    assert item.message == message
    content = render_message(item.id, item.message)["content"]
    assert [part.get("text") or part["image_url"] for part in content] == lines(parts)


@PARSERS
def test_a_model_that_reads_only_text_refuses_them_by_name(parse: Any) -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        parse(["Look", PNG], BLIND)
    assert caught.value.param in ("input[0].content[1]", "messages[0].content[1]")


@PARSERS
@pytest.mark.parametrize(
    "url",
    [
        "data:image/svg+xml;base64,PHN2Zz4=",
        "data:text/html;base64,PGI+",
        "data:image/png;base64,",
        "data:image/png;base64,<b>",
        "data:image/png,raw",
        "data:image/png;base64,A",
        "data:image/png;base64,QUFB",
        "data:image/jpeg;base64,iVBORw0KGgo=",
    ],
)
def test_what_is_no_picture_is_refused(parse: Any, url: str) -> None:
    with pytest.raises(InvalidValueError, match="PNG, JPEG, WebP or GIF"):
        parse([url])


@PARSERS
def test_a_message_has_so_many_pictures_and_no_more(parse: Any) -> None:
    (message,) = parse([PNG] * 20)
    assert told(message) == [PNG] * 20
    with pytest.raises(InvalidValueError, match="20 pictures"):
        parse([PNG] * 21)


@pytest.mark.parametrize("url", ["http://10.0.0.1/a.png", "https://example.com/a.png", "file:///etc/passwd", 5, None])
def test_no_picture_is_fetched(url: Any) -> None:
    item = {"role": "user", "content": [{"type": "input_image", "image_url": url}]}
    with pytest.raises(InvalidValueError, match="fetches none"):
        ResponsesRequest.parse({"input": [item]}, SEEING)


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_send_pictures(role: str) -> None:
    item = {"role": role, "content": [{"type": "input_image", "image_url": PNG}]}
    with pytest.raises(APIError):
        ResponsesRequest.parse({"input": [item]}, SEEING)
    body = {
        "model": "seeing",
        "messages": [{"role": role, "content": [{"type": "image_url", "image_url": {"url": PNG}}]}],
    }
    with pytest.raises(APIError):
        parse_chat_completion(json.dumps(body).encode(), SEEING, "ann")


def test_parts_beside_pictures_are_checked_as_usual() -> None:
    content = [{"type": "image_url", "image_url": PNG}, {"type": "input_audio"}]
    body = {"model": "seeing", "messages": [{"role": "user", "content": content}]}
    with pytest.raises(APIError) as of_chat:
        parse_chat_completion(json.dumps(body).encode(), SEEING, "ann")
    content = [{"type": "input_image", "image_url": PNG}, {"type": "input_file"}]
    with pytest.raises(APIError) as of_responses:
        ResponsesRequest.parse({"input": [{"role": "user", "content": content}]}, SEEING)
    assert "content[1]" in str(of_chat.value.param)
    assert "content[1]" in str(of_responses.value.param)
