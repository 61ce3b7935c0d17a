"""A follower that gets each event once, although a reply is followed again and again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, strategies

from models.errors import ResponseNotFoundError
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
from models.generation.response import beginning_of
from models.hosts.once_follower import OnceFollower
from models.output_item import OutputItem, TokenLogprob
from models.store.item import Item, Status
from tests.support.fake_client import FakeListener

pytestmark = pytest.mark.anyio

ID = "resp_1"
REPLY = Item.of_reply(ID, 1.0, [], status=Status.COMPLETED)
CREATED, FINISHED = Created("conv_1", beginning_of(REPLY)), Finished("conv_1", REPLY)

Parts = Sequence[Sequence[str]]  # the pieces of each part


def events_of(parts: Parts, ends: bool = True) -> list[ResponseEvent]:
    """What a follower gets of a reply; without the end of its last part and its own, if it does not end."""
    events: list[ResponseEvent] = [CREATED]
    for index, pieces in enumerate(parts):
        item = OutputItem("message")
        events.append(OutputItemAdded(ID, index, item))
        events += [OutputDelta(ID, index, piece) for piece in pieces]
        if ends or index + 1 < len(parts):
            events.append(OutputItemDone(ID, index, item))
    return [*events, FINISHED] if ends else events


def told(*streams: Sequence[ResponseEvent]) -> list[ResponseEvent]:
    """What a follower hears if these events come, one stream after the other."""
    listener = FakeListener()
    follower = OnceFollower(listener, ID)
    for events in streams:
        for event in events:
            follower.on_event(event)
    return listener.rest()


def texts(events: Sequence[ResponseEvent]) -> dict[int, str]:
    """The text of each part."""
    found: dict[int, str] = {}
    for event in events:
        if isinstance(event, OutputDelta):
            found[event.index] = found.get(event.index, "") + event.text
    return found


def skeleton(events: Sequence[ResponseEvent]) -> list[tuple[str, int]]:
    """All events but the text."""
    found = [event for event in events if not isinstance(event, OutputDelta)]
    return [(type(event).__name__, getattr(event, "index", 0)) for event in found]


pieces = strategies.lists(strategies.text("ab州", min_size=1, max_size=4), min_size=1, max_size=6)


@given(
    parts=strategies.lists(pieces, min_size=1, max_size=3),
    cuts=strategies.lists(strategies.tuples(strategies.integers(0, 30), strategies.booleans()), max_size=4),
)
def test_however_often_the_events_come_again_each_character_comes_once(
    parts: Parts, cuts: list[tuple[int, bool]]
) -> None:
    whole = events_of(parts)
    joined = events_of([["".join(part)] for part in parts])  # as the database may have it
    streams = [(joined if stored else whole)[:end] for end, stored in cuts]
    streams = [[event for event in stream if event is not FINISHED] for stream in streams]
    heard = told(*streams, whole)
    assert texts(heard) == {index: "".join(part) for index, part in enumerate(parts)}
    assert skeleton(heard) == skeleton(whole)


def test_text_that_the_database_lacks_is_not_told_again() -> None:
    live, stored = events_of([["ab", "cd"]], ends=False), events_of([["a"]], ends=False)
    assert texts(told(live, stored, events_of([["abcd", "e"]]))) == {0: "abcde"}


def test_pieces_that_are_new_keep_their_probabilities() -> None:
    delta = OutputDelta(ID, 0, "b", [TokenLogprob(b"b", -0.5)])
    first = events_of([["a"]], ends=False)
    assert told(first, [*first, delta])[-1] is delta


def test_what_tells_of_a_moment_is_passed_on() -> None:
    moments: list[ResponseEvent] = [Queued(ID, 2), Queued(ID, 1), Warned(ID, ResponseNotFoundError("x"))]
    assert told([CREATED, *moments]) == [CREATED, *moments]


def test_nothing_comes_after_the_end() -> None:
    assert told(events_of([["a"]]), events_of([["a", "b"]])) == events_of([["a"]])


def test_a_reply_that_was_deleted_ends_as_cancelled() -> None:
    listener = FakeListener()
    follower = OnceFollower(listener, ID)
    follower.on_event(CREATED)
    follower.end_deleted()
    _, end = listener.rest()
    assert isinstance(end, Finished)
    assert (end.conversation, end.reply.id, end.reply.status) == ("conv_1", ID, Status.CANCELLED)
    assert follower.ended


def test_a_reply_that_was_deleted_before_it_came_is_not_found() -> None:
    listener = FakeListener()
    follower = OnceFollower(listener, ID)
    follower.end_deleted()
    (end,) = listener.rest()
    assert isinstance(end, Rejected)
    assert isinstance(end.error, ResponseNotFoundError)


async def test_it_waits_for_the_follower_behind_it() -> None:
    listener = FakeListener()
    await OnceFollower(listener, ID).wait_sent()
    assert listener.behind.is_set()
