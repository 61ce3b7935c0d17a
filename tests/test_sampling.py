from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.sampling import Sampler, Sampling

VOCABULARY = 60
PROMPT = [3, 1, 4, 1, 5, 9]
LARGEST = 1 - 2**-53  # what random.random() gives at most


def random_logits(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def drawn(logits: Tensor, sampling: Sampling, uniforms: list[float], prompt: list[int] | None = None) -> list[int]:
    """The next token for each of some random numbers, each after the same prompt and logits."""
    sampler = Sampler(len(uniforms), VOCABULARY, torch.device("cpu"))
    for slot in range(len(uniforms)):
        sampler.place(slot, sampling, prompt or PROMPT)
    return sampler.sample(logits.expand(len(uniforms), -1), list(range(len(uniforms))), uniforms)


def reply(logits: Tensor, sampling: Sampling, uniforms: list[float], prompt: list[int] | None = None) -> list[int]:
    """What one sequence says, alone with the sampler, where the logits are one row for each step."""
    sampler = Sampler(1, VOCABULARY, torch.device("cpu"))
    sampler.place(0, sampling, prompt or PROMPT)
    return [sampler.sample(row[None], [0], [uniform])[0] for row, uniform in zip(logits, uniforms, strict=True)]


def expected_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Those that transformers draws by."""
    processors: list[LogitsProcessor] = [
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
    ]
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processed: Tensor = LogitsProcessorList(processors)(torch.tensor([PROMPT]), logits)  # type: ignore[arg-type]
    return processed.softmax(-1)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.45, top_p=0.9, repetition_penalty=1.1),
        Sampling(1.5, top_k=7),
        Sampling(2.0, top_p=0.5),
        Sampling(0.7, top_p=0.95, top_k=20, repetition_penalty=2.0),
        Sampling(1.0, top_k=1000, repetition_penalty=0.5),
        Sampling(1.0, top_p=1e-9),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tokens_come_as_often_as_with_transformers_and_no_others(sampling: Sampling, seed: int) -> None:
    logits, draws = random_logits(seed=seed), 4000
    uniforms = [(index + 0.5) / draws for index in range(draws)]
    counts = torch.bincount(torch.tensor(drawn(logits, sampling, uniforms)), minlength=VOCABULARY)
    expected = expected_probabilities(logits, sampling)
    assert not counts[expected == 0].any()
    assert counts[expected > 1 / draws].all()
    assert (counts / draws - expected).abs().max() < 1.5 / draws


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.5), Sampling(2.0, top_k=50)])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1 - 2**-30, LARGEST])
def test_no_random_number_draws_a_token_that_was_cut_off(sampling: Sampling, uniform: float) -> None:
    logits = random_logits()
    kept = expected_probabilities(logits, sampling).nonzero()[:, 0].tolist()
    assert drawn(logits, sampling, [uniform])[0] in kept


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, [7, 8, 9, 10]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    grid = [index / 100 for index in range(100)]
    for top_p, kept in ((0.3, {7}), (0.5, {7, 8}), (0.75, {7, 8, 9}), (0.95, {7, 8, 9, 10})):
        assert set(drawn(logits, Sampling(1.0, top_p=top_p), grid, prompt=[0])) == kept


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.51, 3), (1.0, 4)])
def test_top_p_keeps_no_more_where_a_set_reaches_it_exactly(top_p: float, kept: int) -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, :4] = 1.0
    assert len(set(drawn(logits, Sampling(1.0, top_p=top_p), [n / 50 for n in range(50)]))) == kept


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.0),
        Sampling(0.0, top_p=0.5, top_k=5),
        Sampling(1.5, top_k=1),
        Sampling(1.5, top_p=1e-6),
        *(Sampling(temperature, top_p=0.9) for temperature in (1e-6, 1e-30, 1e-38, 1e-45, 1e-300)),
    ],
)
@pytest.mark.parametrize("uniform", [0.0, 0.5, LARGEST])
def test_greedy_and_what_comes_down_to_it_take_the_likeliest_token(sampling: Sampling, uniform: float) -> None:
    logits = random_logits(rows=20)
    for row in logits:
        assert drawn(row[None], sampling, [uniform]) == [int(row.argmax())]


parameters = strategies.builds(
    Sampling,
    strategies.floats(0, 2),
    strategies.floats(0, 1, exclude_min=True),
    strategies.integers(0, 2**31),
    strategies.floats(0, 2, exclude_min=True),
    strategies.floats(-2, 2),
    strategies.floats(-2, 2),
)
numbers = strategies.floats(0, 1, exclude_max=True)


@settings(max_examples=100, deadline=None)
@given(
    strategies.lists(strategies.tuples(parameters, numbers), min_size=8, max_size=8), strategies.permutations(range(8))
)
def test_a_draw_depends_on_its_own_row_only(rows: list[tuple[Sampling, float]], slots: list[int]) -> None:
    logits = random_logits(rows=8)
    together = Sampler(8, VOCABULARY, torch.device("cpu"))
    for slot, (sampling, _) in zip(slots, rows, strict=True):
        together.place(slot, sampling, PROMPT)
    steps = [together.sample(logits, slots, [uniform for _, uniform in rows]) for _ in range(3)]
    for row, (sampling, uniform) in enumerate(rows):
        assert [tokens[row] for tokens in steps] == reply(logits[[row]].expand(3, -1), sampling, [uniform] * 3)
    assert all(0 <= token < VOCABULARY for token in steps[-1])


def test_larger_random_numbers_draw_less_likely_tokens() -> None:
    logits = random_logits()
    probabilities = [
        float(logits[0, token]) for token in drawn(logits, Sampling(1.0, top_p=0.999), [n / 50 for n in range(50)])
    ]
    assert all(before >= after for before, after in pairwise(probabilities))


def test_the_repetition_penalty_covers_the_prompt_and_what_was_generated() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [5, 6, 7, 8]] = torch.tensor([4.0, 3.9, 3.8, 3.7])
    sampler = Sampler(1, VOCABULARY, torch.device("cpu"))
    sampler.place(0, Sampling(repetition_penalty=2.0), [5])
    assert [sampler.sample(logits, [0], [0.5])[0] for _ in range(4)] == [6, 7, 8, 5]


@pytest.mark.parametrize(("penalty", "token"), [(2.0, 6), (1.0, 5), (0.5, 5)])
def test_the_penalty_makes_a_repetition_less_likely_whatever_the_sign(penalty: float, token: int) -> None:
    logits = torch.full((1, VOCABULARY), -9.0)
    logits[0, 5], logits[0, 6] = -1.0, -1.5
    assert drawn(logits, Sampling(repetition_penalty=penalty), [0.5], prompt=[5]) == [token]


def penalised(logits: Tensor, sampling: Sampling, said: list[int]) -> Tensor:
    """One row of logits, with the penalties as their formulas have them, token by token."""
    values = logits.tolist()
    for token in {*PROMPT, *said}:
        values[token] *= sampling.repetition_penalty ** (1 if values[token] < 0 else -1)
        values[token] -= said.count(token) * sampling.frequency_penalty
        values[token] -= (token in said) * sampling.presence_penalty
    return torch.tensor(values)


@pytest.mark.parametrize("usual", [Sampling(), Sampling(1.0), Sampling(0.7, top_p=0.9), Sampling(1.5, top_k=9)])
@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"),
    [(1.0, 0.4, 0.0), (1.0, 0.0, 0.9), (1.0, -0.2, 0.5), (1.0, 2.0, -2.0), (1.0, -2.0, -2.0), (1.7, 0.6, 0.3)],
)
def test_frequency_and_presence_are_penalised_by_their_formula_after_repetition(
    usual: Sampling, repetition: float, frequency: float, presence: float
) -> None:
    logits, uniforms = random_logits(rows=60) / 3, [(7 * step % 60 + 0.5) / 60 for step in range(60)]
    sampling = replace(usual, repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    said: list[int] = []
    for row, uniform in zip(logits, uniforms, strict=True):
        said += reply(penalised(row, sampling, said)[None], usual, [uniform])
    assert reply(logits, sampling, uniforms) == said


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [5, 5, 5, 5, 5, 5]),
        (Sampling(presence_penalty=2.0), [5, 6, 7, 8, 5, 5]),
        (Sampling(frequency_penalty=2.0), [5, 6, 7, 8, 5, 6]),
        (Sampling(frequency_penalty=-1.0, presence_penalty=1.0), [5, 5, 5, 5, 5, 5]),
    ],
)
def test_what_a_greedy_reply_repeats_is_penalised_and_what_the_prompt_said_is_not(
    sampling: Sampling, expected: list[int]
) -> None:
    logits = torch.zeros(VOCABULARY)
    logits[[5, 6, 7, 8]] = torch.tensor([4.0, 3.9, 3.8, 3.7])
    assert reply(logits.expand(6, -1), sampling, [0.5] * 6, prompt=[5, 5, 6]) == expected


@pytest.mark.parametrize("asked", [Sampling(frequency_penalty=-0.1), Sampling(1.0, presence_penalty=0.1)])
def test_tokens_are_counted_only_where_a_penalty_asks_and_from_none(asked: Sampling) -> None:
    sampler = Sampler(3, VOCABULARY, torch.device("cpu"))
    for slot, sampling in enumerate((Sampling(1.0, 0.9, 5, 1.5), asked, Sampling())):
        sampler.place(slot, sampling, PROMPT)
    said = sampler.sample(random_logits(rows=3), [0, 1, 2], [0.5] * 3)
    assert sampler.counts == {1: {said[1]: 1}}
    sampler.place(1, asked, PROMPT)
    assert sampler.counts == {1: {}}
    sampler.place(1, Sampling(1.0), PROMPT)
    assert sampler.counts == {}


def test_a_step_that_failed_and_is_tried_again_counts_once() -> None:
    logits = random_logits(rows=2)
    asked = [Sampling(repetition_penalty=1.5, frequency_penalty=1.0), Sampling(1.0, presence_penalty=1.0)]
    sampler = Sampler(2, VOCABULARY, torch.device("cpu"))
    for slot, sampling in enumerate(asked):
        sampler.place(slot, sampling, PROMPT)
    steps = []
    for _ in range(9):
        with pytest.raises(IndexError):
            sampler.sample(logits, [0, 1], [])
        steps.append(sampler.sample(logits, [0, 1], [0.5, 0.5]))
    for row, sampling in enumerate(asked):
        assert [tokens[row] for tokens in steps] == reply(logits[[row]].expand(9, -1), sampling, [0.5] * 9)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-5])
@pytest.mark.parametrize("repetition", [1.0, 1e-300, 2.0])
def test_a_token_said_millions_of_times_is_never_or_always_next(temperature: float, repetition: float) -> None:
    logits = random_logits()
    for penalty in (2.0, -2.0):
        sampler = Sampler(1, VOCABULARY, torch.device("cpu"))
        sampler.place(0, Sampling(temperature, 1.0, 0, repetition, penalty, penalty), [5])
        sampler.counts[0][5] = 2**24
        said = {sampler.sample(logits, [0], [n / 20])[0] for n in range(20)}
        assert said == {5} if penalty < 0 else 5 not in said


def test_place_forgets_the_sequence_that_had_the_slot() -> None:
    logits = random_logits()
    sampler = Sampler(2, VOCABULARY, torch.device("cpu"))
    sampler.place(1, Sampling(2.0, 0.5, 3, 2.0), range(VOCABULARY))
    sampler.sample(logits, [1], [0.9])
    sampler.place(1, Sampling(1.0, repetition_penalty=1.5), PROMPT)
    assert sampler.sample(logits, [1], [0.9]) == drawn(logits, Sampling(1.0, repetition_penalty=1.5), [0.9])


def test_the_logits_are_left_as_they_were() -> None:
    logits = random_logits()
    before = logits.clone()
    drawn(logits, Sampling(0.7, 0.9, 5, 1.5), [0.5])
    reply(logits.expand(2, -1), Sampling(frequency_penalty=1.0), [0.5, 0.5])
    assert logits.equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_drawn_from_in_full_precision(dtype: torch.dtype) -> None:
    logits = random_logits().to(dtype)
    uniforms = [n / 50 for n in range(50)]
    assert drawn(logits, Sampling(1.0, 0.9), uniforms) == drawn(logits.float(), Sampling(1.0, 0.9), uniforms)


def test_logits_that_are_no_numbers_harm_no_other_row() -> None:
    logits = random_logits().expand(2, -1).clone()
    logits[0] = torch.nan
    sampler = Sampler(2, VOCABULARY, torch.device("cpu"))
    for slot in range(2):
        sampler.place(slot, Sampling(1.0, top_p=0.9), PROMPT)
    broken, sound = sampler.sample(logits, [0, 1], [0.5, 0.5])
    assert 0 <= broken < VOCABULARY
    assert [sound] == drawn(logits[1:], Sampling(1.0, top_p=0.9), [0.5])


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, top_p=0.9), Sampling(0.7, top_k=400), Sampling(1.0, 0.95, top_k=40)]
)
def test_a_vocabulary_too_large_to_sort_is_drawn_from_as_if_it_were_sorted(sampling: Sampling, spread: float) -> None:
    """Flat logits need more tokens than the sampler looks at first."""
    logits = spread * torch.randn(1, 3000, generator=torch.Generator().manual_seed(3))
    uniforms = [n / 20 for n in range(20)]
    scaled, order = (logits[0].double() / sampling.temperature).sort(descending=True)
    probability = scaled[: sampling.top_k or None].softmax(-1)
    probability = probability[(probability.cumsum(-1) - probability) < sampling.top_p]
    bounds = probability.cumsum(-1) / probability.sum()
    expected = [int(order[int((bounds <= uniform).sum())]) for uniform in uniforms]
    sampler = Sampler(1, 3000, torch.device("cpu"))
    sampler.place(0, sampling, [1])
    assert [sampler.sample(logits, [0], [uniform])[0] for uniform in uniforms] == expected
