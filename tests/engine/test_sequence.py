from __future__ import annotations

import random

from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence


def test_a_random_number_stays_until_its_token_is_appended() -> None:
    sequence, source = Sequence([5], SamplingParams(temperature=1.0), 9, seed=3), random.Random(3)
    for token_id in range(9):
        assert [sequence.uniform, sequence.uniform] == 2 * [source.random()]
        sequence.append(token_id)


def test_sequences_without_a_seed_draw_different_numbers() -> None:
    first, second = (Sequence([5], SamplingParams(temperature=1.0), 9) for _ in range(2))
    assert first.uniform != second.uniform


def test_appended_tokens_follow_the_prompt_and_leave_it_as_it_is() -> None:
    prompt = [5, 6, 7]
    sequence = Sequence(prompt, SamplingParams(), 9)
    for token_id in (8, 9):
        sequence.append(token_id)
    assert sequence.tokens == [5, 6, 7, 8, 9]
    assert sequence.generated == 2
    assert prompt == [5, 6, 7]


def test_a_sequence_is_prefilled_once_its_whole_prompt_is_cached() -> None:
    sequence = Sequence([5, 6, 7], SamplingParams(), 9)
    states = []
    for sequence.cached in (0, 2, 3, 4):
        states.append(sequence.prefilled)
    assert states == [False, False, True, True]
