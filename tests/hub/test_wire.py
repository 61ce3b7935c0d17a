from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec import DecodeError, Raw, ValidationError

from models.chat_request import ChatRequest
from models.errors import APIError, InvalidValueError, QueueFullError, ServerError
from models.generation.events import (
    Created,
    Finished,
    OutputDelta,
    OutputItemAdded,
    OutputItemDone,
    Queued,
    Rejected,
    ResponseEvent,
    Warned,
)
from models.generation.interface import (
    Branch,
    NewConversation,
    ResponseRequest,
    Stateless,
    StoredConversation,
    Target,
    Unstored,
)
from models.hosts.door import Door
from models.hosts.followers import Followers
from models.hosts.peer_service import PeerService
from models.hub.service import HubService, Opened
from models.hub.wire import (
    FRAME_BYTES,
    Call,
    Cancel,
    Failure,
    Frame,
    Hello,
    OnceEncoder,
    Result,
    encode,
    encode_failure,
    frame_of,
    signature_of,
    take_frames,
)
from models.hub.worker import Worker
from models.hub.worker_calls import WorkerCalls
from models.messages import Message, Usage
from models.model_info import ModelInfo
from models.options import Options
from models.output_format import PLAIN_TEXT, OutputFormat
from models.output_item import OutputItem, TokenLogprob
from models.store.conversations import Conversation
from models.store.item import Edge, Item, Status
from models.tools import NO_TOOLS, Tool, Tools
from models.users.users import Logins, User

FRAMES: list[Frame] = [
    Hello(1, 4711),
    Call(1, "create", Raw(encode(("ann", 1)))),
    Result(1, Raw(encode(None))),
    Failure(2, QueueFullError("it is full", 7)),
    Cancel(3),
]

MESSAGES: list[Message] = [
    {"role": "system", "content": "Be brief. \U0001f600\0"},
    {"role": "user", "content": "What is the weather?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning": "I have to look.",
        "tool_calls": [{"id": "call_1", "name": "weather", "arguments": '{"place": "Bonn"}'}],
    },
    {"role": "tool", "content": "It rains.", "tool_call_id": "call_1"},
]
OPTIONS = Options(
    instructions="Rhyme.",
    temperature=0.0,
    top_p=0.5,
    top_k=40,
    min_p=0.1,
    repetition_penalty=1.2,
    frequency_penalty=-1.0,
    presence_penalty=1.5,
    max_output_tokens=100,
    stop=("END", "\n\n"),
    seed=2**63 - 1,
    logit_bias={"17": -100.0},
    reasoning_effort="high",
)
SCHEMA = {"type": "object", "properties": {"place": {"enum": ["Bonn", None, 1, 2.5, True]}}}
FORMATS = [
    PLAIN_TEXT,
    OutputFormat("json_object"),
    OutputFormat("json_schema", SCHEMA, "response_format"),
    OutputFormat("regex", r"\d+"),
    OutputFormat("choice", ("yes", "no")),
    OutputFormat("grammar", 'start: "a"'),
]
TARGETS: list[Target] = [
    Stateless(),
    Unstored(),
    Unstored("resp_1"),
    NewConversation("conv_1"),
    NewConversation("conv_1", listed=False),
    StoredConversation("conv_1"),
    StoredConversation("conv_1", Edge.START),
    StoredConversation("conv_1", "msg_1", create=True),
    Branch("resp_1"),
]
TOOLS = [
    NO_TOOLS,
    Tools((Tool("weather", "Tells it.", SCHEMA, strict=True), Tool("time")), "required", frozenset({"time"}), False),
]
LOGPROBS = [
    TokenLogprob(b"\xf0\x9f", -0.5, [(b"\xf0\x9f", -0.5), (b"\xff", -9999.0)]),
    TokenLogprob(b"\x98\x80", 0.0, []),
]
OUTPUT = [
    OutputItem("reasoning", ["I ", "look."], complete=True),
    OutputItem("function_call", ['{"place"'], "weather", "call_1"),
    OutputItem("message", ["\U0001f600", "!"], logprobs=[LOGPROBS, []]),
]
REPLY = Item(
    "resp_1",
    "assistant",
    "\U0001f600!",
    1.5,
    parent="msg_1",
    status=Status.FAILED,
    reason="server_error",
    usage=Usage(3, 1, 2).counts(),
    options={"stop": ["END"], "temperature": 0.0},
    left_out=2,
    output=OUTPUT,
    request={"tools": [SCHEMA], "text": None},
    previous="resp_0",
    ended=2.5,
    decode_seconds=0.25,
)
MESSAGE = Item(
    "msg_1",
    "assistant",
    "",
    1.0,
    reasoning="So.",
    tool_calls=MESSAGES[2]["tool_calls"],
    tool_call_id="call_1",
    output=[],
)
ERROR = InvalidValueError("top_p must be less", "top_p", "a number above 0")
EVENTS: list[ResponseEvent] = [
    Created("conv_1", MESSAGE),
    Created(None, REPLY),
    Queued("resp_1", 2),
    OutputItemAdded("resp_1", 2, OUTPUT[2]),
    OutputDelta("resp_1", 2, "\U0001f600", LOGPROBS, Usage(3, 1, 2, 1)),
    OutputDelta("resp_1", 0, "I "),
    OutputItemDone("resp_1", 1, OUTPUT[1]),
    Finished("conv_1", REPLY),
]

VALUES: dict[str, Any] = {  # of the parameters of errors
    "message": "it is told",
    "param": "top_p",
    "retry_after": 7,
    "allowed": "a number",
    "code": "no_number",
    "tokens": 5,
    "id": "resp_1",
    "names": ["scripted", "large"],
}


def public_methods(*classes: type) -> list[Any]:
    """Each public method of some classes, with a name for the test."""
    return [
        pytest.param(method, id=f"{cls.__name__}.{name}")
        for cls in classes
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and not name.startswith("_")
    ]


def error_classes(cls: type[APIError]) -> Iterator[type[APIError]]:
    """A class of errors that have a code, and those below it."""
    if cls.__module__ == "models.errors":
        if hasattr(cls, "code"):
            yield cls
        for below in cls.__subclasses__():
            yield from error_classes(below)


def new_error(cls: type[APIError]) -> APIError:
    """An error of a class, with a value for each parameter."""
    return cls(**{name: VALUES[name] for name in inspect.signature(cls).parameters})


def described(error: APIError) -> dict[str, Any]:
    """The class of an error, its message, and all that protocols show of it."""
    shown = {name: getattr(error, name) for name in ("status", "type", "code", "param", "retry_after")}
    return {"class": type(error), "message": str(error), **shown, **vars(error)}


def sent(method: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """The arguments of a call as they come out at the other side."""
    return signature_of(method).arguments.decode(encode(arguments))


def returned(method: Callable[..., Any], value: Any) -> Any:
    """The result of a call as it comes out at the other side."""
    return signature_of(method).result.decode(encode(value))


# What crosses comes out as it went in


@pytest.mark.parametrize("method", public_methods(HubService, WorkerCalls, Door, Followers, PeerService))
def test_each_method_has_hints_that_can_be_decoded(method: Callable[..., Any]) -> None:
    parameters = [*inspect.signature(method).parameters.values()][1:]
    assert signature_of(method).is_coroutine == inspect.iscoroutinefunction(method)
    with pytest.raises(ValidationError, match=f"`array` of length {len(parameters)}, got"):
        signature_of(method).arguments.decode(encode([None] * (len(parameters) + 1)))


@pytest.mark.parametrize("method", public_methods(WorkerCalls))
def test_a_worker_has_each_method_that_the_hub_calls(method: Callable[..., Any]) -> None:
    assert inspect.signature(getattr(Worker, method.__name__)) == inspect.signature(method)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_request_keeps_its_target(target: Target) -> None:
    request = ResponseRequest(ChatRequest("ann", MESSAGES, Options()), target)
    assert sent(HubService.create, request, 1) == (request, 1)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.type)
def test_a_request_keeps_its_format(format: OutputFormat) -> None:
    request = ResponseRequest(ChatRequest("ann", MESSAGES, Options(), format=format), Stateless())
    assert sent(HubService.create, request, 1) == (request, 1)


@pytest.mark.parametrize("tools", TOOLS, ids=["no tools", "tools"])
def test_a_request_keeps_all_else(tools: Tools) -> None:
    chat = ChatRequest("ann", MESSAGES, OPTIONS, tools, PLAIN_TEXT, 20, {"date": [1, None]}, True, "Once", True)
    request = ResponseRequest(chat, Stateless(), True, False, "resp_0", {"metadata": {"a": "b"}, "big": 2**64 - 1})
    (came, _) = sent(HubService.create, request, 1)
    assert (came, came.id) == (request, request.id)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_out_as_it_went_in(event: ResponseEvent) -> None:
    assert sent(WorkerCalls.on_event, [1, 2], event) == ([1, 2], event)


@pytest.mark.parametrize("kind", [Rejected, Warned])
def test_an_event_with_an_error_comes_out_with_it(kind: type[Rejected | Warned]) -> None:
    _, came = sent(WorkerCalls.on_event, [1], kind("resp_1", ERROR))
    assert (type(came), came.response_id, described(came.error)) == (kind, "resp_1", described(ERROR))


@pytest.mark.parametrize("cls", [*error_classes(APIError)])
def test_an_error_keeps_its_class_its_message_and_its_attributes(cls: type[APIError]) -> None:
    error = new_error(cls)
    (failure,) = take_frames(bytearray(frame_of(encode_failure(1, error))))
    assert isinstance(failure, Failure)
    assert described(failure.error) == described(error)


def test_an_error_without_arguments_keeps_the_attributes_of_its_class() -> None:
    (failure,) = take_frames(bytearray(frame_of(encode_failure(1, QueueFullError("full")))))
    assert isinstance(failure, Failure)
    assert (failure.error.status, failure.error.retry_after, vars(failure.error)) == (503, 5, {})


def test_an_error_that_cannot_be_encoded_becomes_a_server_error() -> None:
    (failure,) = take_frames(bytearray(frame_of(encode_failure(1, ServerError("half \ud83d")))))
    assert isinstance(failure, Failure)
    assert described(failure.error) == described(ServerError())


def test_results_come_out_as_they_went_in() -> None:
    conversation = Conversation("conv_1", "Weather", 1.0, 2.0, "resp_1", {"a": "b"}, "resp_1")
    assert returned(HubService.find, ("conv_1", REPLY)) == ("conv_1", REPLY)
    assert returned(HubService.find_message, MESSAGES[2]) == MESSAGES[2]
    assert returned(HubService.append_items, [MESSAGE]) == [MESSAGE]
    assert returned(HubService.create_conversation, conversation) == conversation
    assert returned(HubService.log_in, User("ann", b"\xff")) == User("ann", b"\xff")
    assert returned(HubService.metrics, b"a 1\n") == b"a 1\n"
    assert returned(HubService.arguments, {"model": None, "names": ["a"]}) == {"model": None, "names": ["a"]}
    assert sent(WorkerCalls.logins_changed, Logins((User("ann", b"\xff"),), ())) == (
        Logins((User("ann", b"\xff"),), ()),
    )


def test_the_model_of_a_hub_keeps_its_options() -> None:
    opened = Opened((ModelInfo("scripted", 4096, OPTIONS, ("*",), ("tools",)),), 1, "owner")
    assert returned(HubService.opened, opened) == opened


def test_a_value_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(ValidationError):
        sent(HubService.find, "ann", 1)


def test_what_is_no_type_of_ours_cannot_be_sent() -> None:
    with pytest.raises((NotImplementedError, TypeError), match="object"):
        encode(object())


# Frames


def test_frames_that_come_byte_by_byte_are_taken_when_they_are_whole() -> None:
    data, taken = bytearray(), list[Frame]()
    for byte in b"".join(frame_of(encode(frame)) for frame in FRAMES):
        data.append(byte)
        taken += take_frames(data)
    assert [encode(frame) for frame in taken] == [encode(frame) for frame in FRAMES]
    assert data == b""


def test_frames_that_come_at_once_are_taken_in_order_and_the_rest_stays() -> None:
    rest = frame_of(encode(Cancel(4)))[:-1]
    data = bytearray(b"".join(frame_of(encode(frame)) for frame in FRAMES) + rest)
    assert [encode(frame) for frame in take_frames(data)] == [encode(frame) for frame in FRAMES]
    assert data == rest


def test_a_frame_that_is_too_long_is_an_error_before_it_is_there() -> None:
    with pytest.raises(ValueError, match="too long"):
        next(take_frames(bytearray((FRAME_BYTES + 1).to_bytes(4, "big"))))


def test_frames_may_be_longer_after_one_that_says_so() -> None:
    longest = [20]
    data = bytearray(frame_of(encode(Cancel(4))) + frame_of(encode(Call(1, "x" * 30, Raw(b"\x90")))))
    frames = take_frames(data, lambda: longest[0])
    assert next(frames) == Cancel(4)
    longest[0] = 100
    assert isinstance(next(frames), Call)


@pytest.mark.parametrize("body", [b"", b"\xc1", encode("text"), encode((9, 1)), encode((0, 1))])
def test_a_frame_that_is_none_of_ours_is_an_error(body: bytes) -> None:
    with pytest.raises(DecodeError):
        next(take_frames(bytearray(frame_of(body))))


# One encoding


def test_a_value_is_encoded_once_in_a_row() -> None:
    encoder, value = OnceEncoder(), [1]
    assert encoder.encode(value) is encoder.encode(value)


def test_another_value_is_encoded_anew_although_it_is_equal() -> None:
    encoder, first, second = OnceEncoder(), [1], [1]
    assert encoder.encode(first) is not encoder.encode(second)
    second.append(2)
    assert encoder.encode(first) == encode([1])
    assert encoder.encode(second) == encode([1, 2])
