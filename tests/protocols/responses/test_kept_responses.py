from __future__ import annotations

from models.messages import Message
from models.protocols.responses.kept_responses import KEPT_BYTES, KeptResponse, KeptResponses


def kept(text: str) -> KeptResponse:
    return KeptResponse(None, [Message(role="user", content=text)])


def test_a_kept_response_is_found_by_its_id() -> None:
    responses, one = KeptResponses(), kept("Hi")
    responses.add("resp_1", one)
    assert responses.find("resp_1") is one
    assert responses.find("resp_2") is None
    assert responses.find(None) is None


def test_older_responses_make_room() -> None:
    one = kept("x" * 100)
    responses = KeptResponses(max_bytes=3 * one.bytes)
    for number in range(5):
        responses.add(f"resp_{number}", one)
    assert [number for number in range(5) if responses.find(f"resp_{number}")] == [2, 3, 4]


def test_a_response_that_is_larger_than_the_room_is_not_kept_and_takes_none_of_it() -> None:
    responses, small = KeptResponses(max_bytes=1000), kept("x")
    responses.add("resp_large", kept("x" * 2000))
    assert responses.find("resp_large") is None
    responses.add("resp_small", small)
    assert responses.find("resp_small") is small


def test_a_response_that_is_added_again_takes_its_room_once() -> None:
    one = kept("x" * 100)
    responses = KeptResponses(max_bytes=2 * one.bytes)
    for _ in range(9):
        responses.add("resp_1", one)
    responses.add("resp_2", one)
    assert responses.find("resp_1") is responses.find("resp_2") is one


def test_all_messages_count_with_their_calls() -> None:
    calls = KeptResponse(
        None,
        [{"role": "assistant", "content": "", "tool_calls": [{"id": "c", "name": "f", "arguments": "x" * KEPT_BYTES}]}],
    )
    assert calls.bytes > KEPT_BYTES
