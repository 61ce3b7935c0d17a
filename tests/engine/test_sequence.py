from __future__ import annotations

import random

from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence


def test_a_random_number_stays_until_its_token_is_expected() -> None:
    sequence, source = Sequence([5], SamplingParams(temperature=1.0), 9, seed=3), random.Random(3)
    for token_id in range(9):
        assert [sequence.uniform, sequence.uniform] == 2 * [source.random()]
        sequence.expect()
        sequence.append(token_id)


def test_sequences_without_a_seed_draw_different_numbers() -> None:
    first, second = (Sequence([5], SamplingParams(temperature=1.0), 9) for _ in range(2))
    assert first.uniform != second.uniform


def test_appended_tokens_follow_the_prompt_and_leave_it_as_it_is() -> None:
    prompt = [5, 6, 7]
    sequence = Sequence(prompt, SamplingParams(), 9)
    for token_id in (8, 9):
        sequence.expect()
        sequence.append(token_id)
    assert sequence.tokens == [5, 6, 7, 8, 9]
    assert sequence.generated == 2
    assert prompt == [5, 6, 7]


def test_a_sequence_decodes_once_its_prompt_is_cached_and_a_token_is_in_flight() -> None:
    sequence = Sequence([5, 6, 7], SamplingParams(), 9)
    states = [sequence.decodes]
    sequence.cached = 2
    states.append(sequence.decodes)  # the last token of the prompt is still part of it
    sequence.cached = 3
    sequence.expect()
    states.append(sequence.decodes)
    sequence.append(8)
    states.append(sequence.decodes)
    sequence.cached = 0  # it lost its blocks
    states.append(sequence.decodes)
    assert states == [False, False, True, True, False]


def test_a_token_in_flight_counts_for_the_length_and_not_as_generated() -> None:
    sequence = Sequence([5, 6, 7], SamplingParams(), 9)
    sequence.expect()
    sequence.expect()
    assert (sequence.length, sequence.generated, sequence.tokens) == (5, 0, [5, 6, 7])
    sequence.append(8)
    assert (sequence.length, sequence.generated, sequence.tokens) == (5, 1, [5, 6, 7, 8])
