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
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.engine.sampler import Sampler
from models.engine.sampling_params import SamplingParams
from models.engine.token_masks import TokenMasks
from tests.support.no_waiting import NoWaiting

VOCABULARY = 60
PROMPT = [3, 1, 4, 1, 5, 9]
LARGEST = 1 - 2**-53  # the largest number that random.random() returns


def describe(value: object) -> str | None:
    """A short id for the parameters of a test: what differs from greedy sampling."""
    if not isinstance(value, SamplingParams):
        return None
    changed = {name: each for name, each in vars(value).items() if each != getattr(SamplingParams(), name)}
    return " ".join(f"{name}={each}" for name, each in changed.items()) or "greedy"


def random_logits(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def new_sampler(params: list[SamplingParams], prompt: list[int] | None = None, vocabulary: int = VOCABULARY) -> Sampler:
    """A sampler with a slot for each of the parameters."""
    sampler = Sampler(len(params), vocabulary, torch.device("cpu"))
    for slot, each in enumerate(params):
        sampler.assign(slot, each, prompt or PROMPT)
    return sampler


def sampled(sampler: Sampler, logits: Tensor, slots: list[int], uniforms: list[float]) -> list[int]:
    """The next tokens of some slots, which count from then on."""
    where = torch.tensor(slots)
    tokens = sampler.sample(logits, slots, where, uniforms)
    sampler.count(slots, where, tokens)
    ids: list[int] = tokens.tolist()
    return ids


def masked(rows: list[int], *allowed: set[int]) -> TokenMasks:
    """The masks of some rows, each with the tokens that it may have."""
    masks = TokenMasks(rows, VOCABULARY, torch.device("cpu"))
    masks.bits.zero_()
    for bits, tokens in zip(masks.bits, allowed, strict=True):
        for token in tokens:
            bits[token // 32] |= (1 << token % 32) - (1 << 32 if token % 32 == 31 else 0)
    return masks


def sample_each(
    logits: Tensor, params: SamplingParams, uniforms: list[float], prompt: list[int] | None = None
) -> list[int]:
    """The next token for each random number, always after the same prompt and logits."""
    sampler = new_sampler([params] * len(uniforms), prompt)
    return sampled(sampler, logits.expand(len(uniforms), -1), list(range(len(uniforms))), uniforms)


def sample_reply(
    logits: Tensor, params: SamplingParams, uniforms: list[float], prompt: list[int] | None = None
) -> list[int]:
    """The tokens of one sequence that runs alone; `logits` has a row for each step."""
    sampler = new_sampler([params], prompt)
    return [sampled(sampler, row[None], [0], [uniform])[0] for row, uniform in zip(logits, uniforms, strict=True)]


def transformers_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    processors: list[LogitsProcessor] = [
        RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        TemperatureLogitsWarper(params.temperature),
    ]
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    processed: Tensor = LogitsProcessorList(processors)(torch.tensor([PROMPT]), logits)  # type: ignore[arg-type]
    return processed.softmax(-1)[0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0),
        SamplingParams(0.45, top_p=0.9, repetition_penalty=1.1),
        SamplingParams(1.5, top_k=7),
        SamplingParams(2.0, top_p=0.5),
        SamplingParams(0.7, top_p=0.95, top_k=20, repetition_penalty=2.0),
        SamplingParams(1.0, top_k=1000, repetition_penalty=0.5),
        SamplingParams(1.0, top_p=1e-9),
        SamplingParams(1.0, min_p=0.1),
        SamplingParams(1.7, min_p=0.02, repetition_penalty=1.3),
        SamplingParams(1.5, top_k=7, min_p=0.3),
    ],
    ids=describe,
)
@pytest.mark.parametrize("seed", [0, 1, 2], ids=lambda seed: f"seed {seed}")
def test_tokens_have_the_probabilities_of_transformers(params: SamplingParams, seed: int) -> None:
    logits, draws = random_logits(seed=seed), 4000
    uniforms = [(index + 0.5) / draws for index in range(draws)]
    counts = torch.bincount(torch.tensor(sample_each(logits, params, uniforms)), minlength=VOCABULARY)
    expected = transformers_probabilities(logits, params)
    assert not counts[expected == 0].any()
    assert counts[expected > 1 / draws].all()
    assert (counts / draws - expected).abs().max() < 1.5 / draws


@pytest.mark.parametrize(
    "params",
    [SamplingParams(1.0, top_k=3), SamplingParams(1.0, top_p=0.5), SamplingParams(2.0, top_k=50)],
    ids=describe,
)
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1 - 2**-30, LARGEST])
def test_no_random_number_gives_a_token_that_was_cut_off(params: SamplingParams, uniform: float) -> None:
    logits = random_logits()
    kept = transformers_probabilities(logits, params).nonzero()[:, 0].tolist()
    assert sample_each(logits, params, [uniform])[0] in kept


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, [7, 8, 9, 10]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    uniforms = [index / 100 for index in range(100)]
    for top_p, kept in ((0.3, {7}), (0.5, {7, 8}), (0.75, {7, 8, 9}), (0.95, {7, 8, 9, 10})):
        assert set(sample_each(logits, SamplingParams(1.0, top_p=top_p), uniforms, prompt=[0])) == kept


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.51, 3), (1.0, 4)])
def test_top_p_keeps_no_more_tokens_than_reach_it_exactly(top_p: float, kept: int) -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, :4] = 1.0
    assert len(set(sample_each(logits, SamplingParams(1.0, top_p=top_p), [n / 50 for n in range(50)]))) == kept


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(0.0),
        SamplingParams(0.0, top_p=0.5, top_k=5),
        SamplingParams(1.5, top_k=1),
        SamplingParams(1.5, top_p=1e-6),
        *(SamplingParams(temperature, top_p=0.9) for temperature in (1e-6, 1e-30, 1e-38, 1e-45, 1e-300)),
    ],
    ids=describe,
)
@pytest.mark.parametrize("uniform", [0.0, 0.5, LARGEST])
def test_greedy_and_nearly_greedy_sampling_take_the_most_probable_token(params: SamplingParams, uniform: float) -> None:
    logits = random_logits(rows=20)
    for row in logits:
        assert sample_each(row[None], params, [uniform]) == [int(row.argmax())]


any_params = strategies.builds(
    SamplingParams,
    strategies.floats(0, 2),
    strategies.floats(0, 1, exclude_min=True),
    strategies.integers(0, 2**31),
    strategies.floats(0, 2, exclude_min=True),
    strategies.floats(-2, 2),
    strategies.floats(-2, 2),
    strategies.floats(0, 1),
    strategies.dictionaries(strategies.integers(0, VOCABULARY - 1), strategies.floats(-100, 100), max_size=5),
)
any_uniform = strategies.floats(0, 1, exclude_max=True)


@settings(max_examples=100, deadline=None)
@given(
    strategies.lists(strategies.tuples(any_params, any_uniform), min_size=8, max_size=8),
    strategies.permutations(range(8)),
)
def test_a_token_depends_on_its_own_row_only(rows: list[tuple[SamplingParams, float]], slots: list[int]) -> None:
    logits = random_logits(rows=8)
    sampler = Sampler(8, VOCABULARY, torch.device("cpu"))
    for slot, (params, _) in zip(slots, rows, strict=True):
        sampler.assign(slot, params, PROMPT)
    steps = [sampled(sampler, logits, slots, [uniform for _, uniform in rows]) for _ in range(3)]
    for row, (params, uniform) in enumerate(rows):
        assert [tokens[row] for tokens in steps] == sample_reply(logits[[row]].expand(3, -1), params, [uniform] * 3)
    assert all(0 <= token < VOCABULARY for token in steps[-1])


def test_larger_random_numbers_give_less_probable_tokens() -> None:
    logits = random_logits()
    tokens = sample_each(logits, SamplingParams(1.0, top_p=0.999), [n / 50 for n in range(50)])
    assert all(logits[0, before] >= logits[0, after] for before, after in pairwise(tokens))


def test_the_repetition_penalty_covers_the_prompt_and_the_reply() -> None:
    logits = torch.zeros(VOCABULARY)
    logits[[5, 6, 7, 8]] = torch.tensor([4.0, 3.9, 3.8, 3.7])
    params = SamplingParams(repetition_penalty=2.0)
    assert sample_reply(logits.expand(4, -1), params, [0.5] * 4, prompt=[5]) == [6, 7, 8, 5]


@pytest.mark.parametrize(("penalty", "token"), [(2.0, 6), (1.0, 5), (0.5, 5)])
def test_the_repetition_penalty_lowers_negative_logits_too(penalty: float, token: int) -> None:
    logits = torch.full((1, VOCABULARY), -9.0)
    logits[0, 5], logits[0, 6] = -1.0, -1.5
    assert sample_each(logits, SamplingParams(repetition_penalty=penalty), [0.5], prompt=[5]) == [token]


def penalized(logits: Tensor, params: SamplingParams, reply: list[int]) -> Tensor:
    """One row of logits after the penalties, token by token, as their formulas say."""
    values = logits.tolist()
    for token in {*PROMPT, *reply}:
        values[token] *= params.repetition_penalty ** (1 if values[token] < 0 else -1)
        values[token] -= reply.count(token) * params.frequency_penalty
        values[token] -= (token in reply) * params.presence_penalty
    return torch.tensor(values)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(1.0), SamplingParams(0.7, top_p=0.9), SamplingParams(1.5, top_k=9)],
    ids=describe,
)
@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"),
    [(1.0, 0.4, 0.0), (1.0, 0.0, 0.9), (1.0, -0.2, 0.5), (1.0, 2.0, -2.0), (1.0, -2.0, -2.0), (1.7, 0.6, 0.3)],
    ids=["frequency", "presence", "small of both signs", "large of both signs", "negative", "all three"],
)
def test_frequency_and_presence_penalties_follow_their_formula_after_repetition(
    params: SamplingParams, repetition: float, frequency: float, presence: float
) -> None:
    logits, uniforms = random_logits(rows=60) / 3, [(7 * step % 60 + 0.5) / 60 for step in range(60)]
    penalties = replace(params, repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    reply: list[int] = []
    for row, uniform in zip(logits, uniforms, strict=True):
        reply += sample_reply(penalized(row, penalties, reply)[None], params, [uniform])
    assert sample_reply(logits, penalties, uniforms) == reply


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), [5, 5, 5, 5, 5, 5]),
        (SamplingParams(presence_penalty=2.0), [5, 6, 7, 8, 5, 5]),
        (SamplingParams(frequency_penalty=2.0), [5, 6, 7, 8, 5, 6]),
        (SamplingParams(frequency_penalty=-1.0, presence_penalty=1.0), [5, 5, 5, 5, 5, 5]),
    ],
    ids=describe,
)
def test_frequency_and_presence_penalties_ignore_the_prompt(params: SamplingParams, expected: list[int]) -> None:
    logits = torch.zeros(VOCABULARY)
    logits[[5, 6, 7, 8]] = torch.tensor([4.0, 3.9, 3.8, 3.7])
    assert sample_reply(logits.expand(6, -1), params, [0.5] * 6, prompt=[5, 5, 6]) == expected


@pytest.mark.parametrize(
    "params", [SamplingParams(frequency_penalty=-0.1), SamplingParams(1.0, presence_penalty=0.1)], ids=describe
)
def test_tokens_are_counted_only_for_slots_with_a_penalty(params: SamplingParams) -> None:
    sampler = new_sampler([SamplingParams(1.0, 0.9, 5, 1.5), params, SamplingParams()])
    tokens = sampled(sampler, random_logits(rows=3), [0, 1, 2], [0.5] * 3)
    assert list(sampler.counts) == [1]
    assert sampler.counts[1].nonzero().tolist() == [[tokens[1]]]
    sampler.assign(1, params, PROMPT)
    assert not sampler.counts[1].any()
    sampler.assign(1, SamplingParams(1.0), PROMPT)
    assert sampler.counts == {}


def test_a_step_that_failed_and_is_tried_again_counts_its_tokens_once() -> None:
    logits = random_logits(rows=2)
    both = [SamplingParams(repetition_penalty=1.5, frequency_penalty=1.0), SamplingParams(1.0, presence_penalty=1.0)]
    sampler, steps = new_sampler(both), []
    for _ in range(9):
        sampler.sample(logits, [0, 1], torch.tensor([0, 1]), [0.5, 0.5])
        steps.append(sampled(sampler, logits, [0, 1], [0.5, 0.5]))
    for row, params in enumerate(both):
        assert [tokens[row] for tokens in steps] == sample_reply(logits[[row]].expand(9, -1), params, [0.5] * 9)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-5])
@pytest.mark.parametrize("repetition", [1.0, 1e-300, 2.0])
def test_a_token_that_was_used_millions_of_times_comes_never_or_always(temperature: float, repetition: float) -> None:
    logits = random_logits()
    for penalty in (2.0, -2.0):
        sampler = new_sampler([SamplingParams(temperature, 1.0, 0, repetition, penalty, penalty)], [5])
        with torch.inference_mode():
            sampler.counts[0][5] = 2**24
        tokens = {sampled(sampler, logits, [0], [n / 20])[0] for n in range(20)}
        assert tokens == {5} if penalty < 0 else 5 not in tokens


def test_sampling_never_makes_the_host_wait_for_a_device() -> None:
    every = [SamplingParams(), SamplingParams(0.5, 0.9, 0, 1.1), SamplingParams(1.0, 1.0), SamplingParams(1.0, 0.9, 5)]
    every.append(SamplingParams(0.7, 0.5, 7, 1.2, 0.5, 0.5))
    every.append(SamplingParams(1.0, min_p=0.1, logit_bias={5: 1.0}, logprobs=3))
    meta = torch.device("meta")  # has shapes and no numbers
    sampler = Sampler(len(every), 3000, meta)
    with NoWaiting():
        for slot, params in enumerate(every):
            sampler.assign(slot, params, PROMPT)
        slots, where = list(range(len(every))), torch.arange(len(every), device="meta")
        logits = torch.empty(len(every), 3000, device="meta")
        tokens = sampler.sample(logits, slots, where, [0.5] * len(every), TokenMasks([1, 3], 3000, meta))
        assert sampler.logprobs(logits, slots, tokens)
        sampler.count(slots, where, tokens)
    assert tokens.shape == (len(every),)


def test_assign_forgets_the_previous_sequence_of_the_slot() -> None:
    logits, params = random_logits(), SamplingParams(1.0, repetition_penalty=1.5)
    sampler = Sampler(2, VOCABULARY, torch.device("cpu"))
    sampler.assign(1, SamplingParams(2.0, 0.5, 3, 2.0), range(VOCABULARY))
    sampled(sampler, logits, [1], [0.9])
    sampler.assign(1, params, PROMPT)
    assert sampled(sampler, logits, [1], [0.9]) == sample_each(logits, params, [0.9])


def test_the_logits_are_not_changed() -> None:
    logits = random_logits()
    before = logits.clone()
    sample_each(logits, SamplingParams(0.7, 0.9, 5, 1.5), [0.5])
    sample_reply(logits.expand(2, -1), SamplingParams(frequency_penalty=1.0), [0.5, 0.5])
    sample_reply(logits, SamplingParams(logit_bias={3: 5.0}), [0.5])
    new_sampler([SamplingParams()]).sample(logits, [0], torch.tensor([0]), [0.5], masked([0], {1, 2}))
    assert logits.equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_sampled_in_full_precision(dtype: torch.dtype) -> None:
    logits, params, uniforms = random_logits().to(dtype), SamplingParams(1.0, 0.9), [n / 50 for n in range(50)]
    assert sample_each(logits, params, uniforms) == sample_each(logits.float(), params, uniforms)


def test_nan_logits_change_no_other_row() -> None:
    logits, params = random_logits().expand(2, -1).clone(), SamplingParams(1.0, top_p=0.9)
    logits[0] = torch.nan
    broken, healthy = sampled(new_sampler([params, params]), logits, [0, 1], [0.5, 0.5])
    assert 0 <= broken < VOCABULARY
    assert [healthy] == sample_each(logits[1:], params, [0.5])


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(
    "params",
    [SamplingParams(1.0, top_p=0.9), SamplingParams(0.7, top_k=400), SamplingParams(1.0, 0.95, top_k=40)],
    ids=describe,
)
def test_a_large_vocabulary_is_sampled_as_if_it_were_sorted(params: SamplingParams, spread: float) -> None:
    """Flat logits need more tokens than the sampler looks at first."""
    logits = spread * torch.randn(1, 3000, generator=torch.Generator().manual_seed(3))
    uniforms = [n / 20 for n in range(20)]
    scaled, order = (logits[0].double() / params.temperature).sort(descending=True)
    probability = scaled[: params.top_k or None].softmax(-1)
    probability = probability[(probability.cumsum(-1) - probability) < params.top_p]
    bounds = probability.cumsum(-1) / probability.sum()
    expected = [int(order[int((bounds <= uniform).sum())]) for uniform in uniforms]
    sampler = new_sampler([params], [1], vocabulary=3000)
    assert [sampled(sampler, logits, [0], [uniform])[0] for uniform in uniforms] == expected


def test_min_p_is_a_share_of_the_largest_probability_after_the_temperature_and_before_top_p() -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, [7, 8, 9, 10]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    uniforms = [index / 100 for index in range(100)]
    cases = [
        (SamplingParams(1.0, min_p=0.2), {7, 8, 9, 10}),
        (SamplingParams(1.0, min_p=0.3), {7, 8, 9}),
        (SamplingParams(0.5, min_p=0.3), {7, 8}),  # 0.16, 0.09, 0.04, 0.01
        (SamplingParams(2.0, min_p=0.49), {7, 8, 9, 10}),
        (SamplingParams(1.0, top_p=0.56, min_p=0.6), {7}),  # of 0.57 and 0.43; before min-p, top-p would keep two
        (SamplingParams(1.0, min_p=1.0), {7}),
    ]
    for params, kept in cases:
        assert set(sample_each(logits, params, uniforms, prompt=[0])) == kept


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(0.7, top_p=0.9), SamplingParams(1.0, top_k=5)], ids=describe
)
def test_a_bias_is_added_to_the_logits_before_penalties_and_temperature(params: SamplingParams) -> None:
    logits, uniforms = random_logits(rows=40), [(7 * step % 40 + 0.5) / 40 for step in range(40)]
    bias = {token: 3.0 * (-1) ** token for token in range(0, VOCABULARY, 3)}
    biased = logits.clone()
    for token, value in bias.items():
        biased[:, token] += value
    penalties = replace(params, repetition_penalty=1.4, presence_penalty=0.5)
    expected = sample_reply(biased, penalties, uniforms)
    assert sample_reply(logits, replace(penalties, logit_bias=bias), uniforms) == expected
    assert sample_reply(logits, penalties, uniforms) != expected


def test_the_next_sequence_of_a_slot_has_no_bias_of_the_one_before() -> None:
    logits, sampler = random_logits(), new_sampler([SamplingParams(logit_bias={5: 100.0})])
    assert sampled(sampler, logits, [0], [0.5]) == [5]
    sampler.assign(0, SamplingParams(), PROMPT)
    assert sampled(sampler, logits, [0], [0.5]) == [int(logits.argmax())]


@settings(max_examples=100, deadline=None)
@given(
    strategies.lists(strategies.tuples(any_params, any_uniform), min_size=4, max_size=4),
    strategies.dictionaries(
        strategies.integers(0, 3), strategies.sets(strategies.integers(0, VOCABULARY - 1), min_size=1), min_size=1
    ),
)
def test_a_masked_row_gets_an_allowed_token_and_the_other_rows_do_not_change(
    rows: list[tuple[SamplingParams, float]], allowed: dict[int, set[int]]
) -> None:
    logits, slots, uniforms = random_logits(rows=4), [0, 1, 2, 3], [uniform for _, uniform in rows]
    sampler, where = new_sampler([params for params, _ in rows]), torch.arange(4)
    free = sampler.sample(logits, slots, where, uniforms).tolist()
    tokens = sampler.sample(logits, slots, where, uniforms, masked(list(allowed), *allowed.values())).tolist()
    for row in slots:
        assert tokens[row] in allowed[row] if row in allowed else tokens[row] == free[row]


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 60])
def test_each_bit_of_a_mask_is_one_token(vocabulary: int) -> None:
    sampler = new_sampler([SamplingParams()], [0], vocabulary)
    for token in range(vocabulary):
        masks = TokenMasks([0], vocabulary, torch.device("cpu"))
        words = [0] * masks.bits.shape[1]
        words[token // 32] = 1 << token % 32
        masks.bits[0] = torch.tensor(words, dtype=torch.int64).to(torch.int32)
        logits = torch.arange(vocabulary, dtype=torch.float32)[None] * (-1) ** token
        assert sampler.sample(logits, [0], torch.tensor([0]), [0.5], masks).tolist() == [token]


def test_log_probabilities_are_those_of_the_model_whatever_the_parameters() -> None:
    logits = random_logits(rows=3)
    logits[2, :4] = -torch.inf
    changing = SamplingParams(1.5, 0.9, 0, 1.5, 0.5, 0.5, 0.1, {7: 50.0}, logprobs=20)
    sampler = new_sampler([SamplingParams(logprobs=0), SamplingParams(), changing])
    tokens = torch.tensor([4, 5, 7])
    asked = sampler.logprobs(logits, [0, 1, 2], tokens)
    assert asked
    read, expected = asked.read(), logits.log_softmax(-1)
    assert list(read) == [0, 2]
    assert read[0].chosen == pytest.approx(float(expected[0, 4]))
    assert read[0].top == []
    chosen, best = read[2]
    assert chosen == pytest.approx(float(expected[2, 7]))
    order = expected[2].argsort(descending=True).tolist()[:20]
    assert [token for token, _ in best] == order
    assert [value for _, value in best] == pytest.approx(expected[2, order].tolist())


def test_a_token_without_probability_has_a_finite_logarithm() -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, 3] = 0.0
    asked = new_sampler([SamplingParams(logprobs=2)]).logprobs(logits, [0], torch.tensor([5]))
    assert asked
    assert asked.read()[0].chosen == -9999.0
    assert asked.read()[0].top[0] == (3, 0.0)
