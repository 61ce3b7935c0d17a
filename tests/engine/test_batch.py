from __future__ import annotations

from collections.abc import Iterable

import pytest

from models.engine.attention import Span
from models.engine.batch import Batch
from models.engine.sampling_params import SamplingParams
from models.engine.scheduler import Chunk
from models.engine.sequence import Sequence


def sequence_in(slot: int, prompt: list[int], cached: int, reply: Iterable[int] = ()) -> Sequence:
    """A sequence in a slot, with some of its tokens in the cache."""
    sequence = Sequence(prompt, SamplingParams(), 9)
    for token_id in reply:
        sequence.expect()
        sequence.append(token_id)
    sequence.slot, sequence.cached = slot, cached
    return sequence


def test_an_empty_batch_has_no_tokens() -> None:
    batch = Batch()
    assert (batch.ids, batch.slots, batch.positions, batch.spans, batch.logits_at) == ([], [], [], [], [])


def test_tokens_keep_their_order_slot_and_position() -> None:
    batch = Batch()
    batch.add(4, [10, 11, 12], 7)
    batch.add(1, [20], 0)
    assert batch.ids == [10, 11, 12, 20]
    assert batch.slots == [4, 4, 4, 1]
    assert batch.positions == [7, 8, 9, 0]
    assert batch.spans == [Span(4, 1, 0, 3, 10), Span(1, 1, 3, 1, 1)]


def test_single_tokens_of_neighbouring_slots_make_one_span() -> None:
    batch = Batch()
    for slot, start in ((2, 30), (3, 5), (4, 50), (5, 0)):
        batch.add(slot, [9], start)
    assert batch.spans == [Span(slot=2, rows=4, start=0, count=1, length=51)]
    assert batch.positions == [30, 5, 50, 0]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([(2, 1), (4, 1)], id="a slot between them"),
        pytest.param([(3, 1), (2, 1)], id="falling slots"),
        pytest.param([(2, 1), (2, 1)], id="the same slot"),
        pytest.param([(2, 1), (3, 2)], id="two tokens second"),
        pytest.param([(2, 2), (3, 1)], id="two tokens first"),
        pytest.param([(2, 2), (3, 2)], id="two tokens each"),
    ],
)
def test_other_tokens_make_spans_of_their_own(parts: list[tuple[int, int]]) -> None:
    batch = Batch()
    for slot, count in parts:
        batch.add(slot, [9] * count, 6)
    (first, count), (second, others) = parts
    assert batch.spans == [Span(first, 1, 0, count, 6 + count), Span(second, 1, count, others, 6 + others)]


def test_a_batch_of_chunks_has_logits_where_a_sequence_ends() -> None:
    decoding = sequence_in(0, [1, 2], cached=2, reply=[3])
    partial = sequence_in(2, [4, 5, 6, 7], cached=1)
    last = sequence_in(1, [8, 9], cached=0)
    batch = Batch([Chunk(decoding, 1), Chunk(partial, 2), Chunk(last, 2)])
    assert batch.ids == [3, 5, 6, 8, 9]
    assert batch.slots == [0, 2, 2, 1, 1]
    assert batch.positions == [2, 1, 2, 0, 1]
    assert batch.logits_at == [0, 4]


def test_a_batch_does_not_change_its_sequences() -> None:
    sequence = sequence_in(0, [1, 2, 3], cached=1)
    Batch([Chunk(sequence, 2)])
    assert (sequence.tokens, sequence.cached) == ([1, 2, 3], 1)
